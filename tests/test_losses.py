"""Losses against sums done by hand."""

import math

import pytest
import torch

from losses import BCEDiceLoss, DiceLoss

HALF = 0.0  # the logit of probability 1/2


def test_dice_loss_by_hand():
    """p = 1/2 on 4 voxels, 1 of them true: 1 - 2 * 0.5 / (2 + 1) = 2/3."""
    loss = DiceLoss()(torch.full((1, 1, 2, 2), HALF), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
    assert loss.item() == pytest.approx(2 / 3, abs=1e-6)


def test_sum_runs_over_the_batch_unless_per_sample():
    """Sample 1: p = 1/2, all 4 true, 1 - 4/6. Sample 2: p = 1/2, 1 of 4 true, 2/3. Together: 1 - 2 * 2.5 / (4 + 5)."""
    logits, target = torch.full((2, 1, 2, 2), HALF), torch.ones(2, 1, 2, 2)
    target[1] = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert DiceLoss()(logits, target).item() == pytest.approx(4 / 9, abs=1e-6)
    assert DiceLoss(per_sample=True)(logits, target).item() == pytest.approx((1 / 3 + 2 / 3) / 2, abs=1e-6)


def test_perfect_and_empty():
    target = torch.zeros(1, 1, 4, 4)
    sure = torch.full_like(target, -200.0)  # its sigmoid is 0 in float32
    assert DiceLoss()(sure, target).item() == 0  # empty, and predicted empty
    assert DiceLoss()(-sure, target).item() == pytest.approx(1)  # empty, predicted full
    target[..., :2] = 1
    assert DiceLoss()(torch.where(target > 0, 200.0, -200.0), target).item() == pytest.approx(0, abs=1e-6)


def test_empty_sample_alone_teaches_little_but_within_a_batch_it_counts():
    target = torch.zeros(2, 1, 8, 8)
    target[0, 0, :4] = 1
    logits = torch.zeros_like(target, requires_grad=True)
    DiceLoss(per_sample=True)(logits, target).backward()
    assert logits.grad[1].abs().max() < 1e-6
    logits.grad = None
    DiceLoss()(logits, target).backward()
    assert logits.grad[1].min() > 1e-4


def test_bce_dice_is_the_sum_of_both():
    logits, target = torch.full((1, 1, 2, 2), HALF), torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert BCEDiceLoss()(logits, target).item() == pytest.approx(2 / 3 + math.log(2), abs=1e-6)


@pytest.mark.parametrize("loss", [DiceLoss(), DiceLoss(per_sample=True), BCEDiceLoss()])
def test_float32_inside_whatever_comes_in(loss):
    """300,000 voxels: a sum in float16 would be infinite, one in bfloat16 off by percents."""
    target = (torch.rand(1, 1, 3, 100_000) > 0.5).to(torch.uint8)
    logits = torch.randn(target.shape).half()
    value = loss(logits, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.double(), target).item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(logits, target).item() == pytest.approx(value.item(), rel=1e-6)


@pytest.mark.parametrize("loss", [DiceLoss(), BCEDiceLoss()])
@pytest.mark.parametrize("size", [(5,), (4, 5), (3, 4, 5)])
def test_any_number_of_axes_and_a_gradient_that_helps(loss, size):
    torch.manual_seed(0)
    logits = torch.randn(2, 1, *size, requires_grad=True)
    target = (torch.rand(2, 1, *size) > 0.5).float()
    before = loss(logits, target)
    before.backward()
    assert loss(logits - 0.5 * logits.grad, target) < before


@pytest.mark.parametrize("loss", [DiceLoss(), BCEDiceLoss()])
def test_shapes_that_would_broadcast_raise(loss):
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*\(2, 4, 4\)"):
        loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))
