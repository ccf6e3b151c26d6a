"""Losses against sums done by hand."""

import math

import pytest
import torch

from losses import BCEDiceLoss, DiceLoss

LOGITS = torch.zeros(2, 1, 2, 2)  # a probability of 1/2 everywhere
TARGET = torch.tensor([[[[1.0, 1], [1, 1]]], [[[1, 0], [0, 0]]]])  # of the second sample one voxel is true
SURE = torch.full((1, 1, 2, 2), 200.0)  # its sigmoid is 1 in float32, that of its negative is 0


@pytest.mark.parametrize(("loss", "logits", "target", "expected"), [
    (DiceLoss(), LOGITS[1:], TARGET[1:], 2 / 3),  # 1 - 2 * 0.5 / (2 + 1)
    (DiceLoss(), LOGITS, TARGET, 4 / 9),  # summed over the batch: 1 - 2 * 2.5 / (4 + 5)
    (DiceLoss(per_sample=True), LOGITS, TARGET, 1 / 2),  # the mean of 1 - 4 / 6 and 2 / 3
    (DiceLoss(reduce=torch.tensor([2, 6]).add), LOGITS[1:], TARGET[1:], 4 / 9),  # another process has the first sample
    (BCEDiceLoss(), LOGITS[1:], TARGET[1:], 2 / 3 + math.log(2)),
    (DiceLoss(), -SURE, SURE * 0, 0),  # empty, and predicted empty
    (DiceLoss(), SURE, SURE * 0, 1),  # empty, and predicted full
    (DiceLoss(), 200 * (2 * TARGET - 1), TARGET, 0),
])
def test_by_hand(loss, logits, target, expected):
    assert loss(logits, target).item() == pytest.approx(expected, abs=1e-6)


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


@pytest.mark.parametrize("kind", [DiceLoss, BCEDiceLoss])
def test_any_number_of_axes_a_gradient_that_helps_and_what_raises(kind):
    torch.manual_seed(0)
    for size in ((5,), (4, 5), (3, 4, 5)):
        logits = torch.randn(2, 1, *size, requires_grad=True)
        target = (torch.rand(2, 1, *size) > 0.5).float()
        before = kind()(logits, target)
        before.backward()
        assert kind()(logits - 0.5 * logits.grad, target) < before
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*\(2, 4, 4\)"):  # which would broadcast
        kind()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="take one"):  # processes share no sample
        kind(per_sample=True, reduce=torch.clone)
