"""The network's contract: sizes, parameters, gradients, modes."""

import io

import pytest
import torch
from conftest import same

from unet import AttentionGate, UNet, depth_to_space, space_to_depth, upsample


def test_seed_network_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in UNet(width=64, depth=3, norm="none").parameters()) == 7_781_761


@pytest.mark.parametrize(("attention", "stem"), [(False, 1), (True, 1), (False, 2), (True, 4)])
def test_any_slice_size_comes_back(attention, stem):
    net = UNet(width=4, depth=3, attention=attention, stem=stem).eval()
    for size in ((97, 131), (8, 8), (1, 1), (64, 3)):
        assert net(torch.randn(2, 1, *size)).shape == (2, 1, *size)


@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
@pytest.mark.parametrize("stem", [1, 2])
@pytest.mark.parametrize("size", [(17, 23), (9, 14, 11)])
def test_gradients_reach_every_parameter(size, norm, stem):
    torch.manual_seed(0)  # of two inner channels of a gate, both can be dead by chance
    net = UNet(in_channels=2, out_channels=3, dims=len(size), width=8, depth=2, norm=norm, attention=True, stem=stem)
    logits = net(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [(8, 12), (8, 12, 4)])
def test_the_stem_turns_blocks_into_channels_and_back(size):
    """And answers for every voxel: two neighbours in one block may still differ."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size)
    blocks = space_to_depth(x, 2)
    assert blocks.shape == (2, 3 * 2 ** len(size), *(n // 2 for n in size))
    assert torch.equal(depth_to_space(blocks, 2), x)
    assert len(size) == 3 or torch.equal(blocks, torch.nn.functional.pixel_unshuffle(x, 2))
    logits = UNet(in_channels=3, dims=len(size), width=4, depth=1, stem=2)(x)
    assert not torch.allclose(logits[..., ::2, :], logits[..., 1::2, :])


def test_padding_copies_the_border():
    """A constant image has the same logits where it is padded: zeros would be an edge that it does not have."""
    torch.manual_seed(0)
    net = UNet(width=4, depth=3, norm="none").eval()
    assert torch.allclose(net(torch.ones(1, 1, 64, 64))[..., :59], net(torch.ones(1, 1, 64, 59)), atol=1e-6)


@torch.no_grad()
def test_skips_and_bottom_both_carry_the_image():
    torch.manual_seed(0)
    net, x = UNet(width=4, depth=2, norm="none"), torch.randn(2, 1, 16, 16)
    whole = net(x)
    for p in net.bottom.parameters():
        p.zero_()
    without = net(x)
    assert not torch.allclose(whole, without) and not torch.allclose(*without)


def test_attention_gate_scales_each_voxel_between_0_and_1():
    skip, signal = torch.rand(2, 6, 5, 7) + 0.1, torch.randn(2, 12, 5, 7)
    ratio = AttentionGate(6, 12, dims=2)(skip, signal) / skip
    assert (ratio > 0).all() and (ratio < 1).all()
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-6)  # one weight for all channels


def test_predict_gives_probabilities_or_a_mask_and_leaves_each_part_in_its_mode():
    """A frozen batch norm within a network that trains used to be back in training mode."""
    net, x = UNet(width=4, depth=1), torch.randn(2, 1, 9, 9)
    torch.save(net, io.BytesIO())  # a memory format among its attributes cannot be pickled
    net.bottom[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    probability, mask = net.predict(x), net.predict(x, threshold=0.3)
    assert [part for part in net.modules() if not part.training] == [net.bottom[1]]
    assert same(net.state_dict(), before)  # batch norm untouched
    assert probability.dtype == torch.float32 and torch.equal(probability, torch.sigmoid(net.eval()(x)))
    assert mask.dtype == torch.bool and torch.equal(mask, probability > 0.3) and not probability.requires_grad


@pytest.mark.parametrize(("name", "value"), [("dims", 4), ("norm", "layer"), ("width", 0), ("depth", -1), ("depth", 30),
                                             ("out_channels", 0), ("stem", 0), ("attention", "none")])
def test_wrong_arguments_are_told(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        UNet(**{name: value})


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 2, 8, 8), (1, 1, 8, 8, 8)])
def test_wrong_shapes_are_told(shape):
    with pytest.raises(ValueError, match=r"takes \(B, 1, H, W\)"):
        UNet(width=4)(torch.zeros(shape))


def test_the_upsampling_gets_a_gradient_without_gaps():
    """`cat` hands back a slice of a larger gradient, on which a CPU's backward pass took many times as long."""
    dense, x = [], upsample(torch.randn(2, 1, 4, 4, requires_grad=True))
    x.grad_fn.register_prehook(lambda gradients: dense.append(gradients[0].is_contiguous()))
    torch.cat([x.detach(), x], dim=1).square().sum().backward()
    assert dense == [True]
