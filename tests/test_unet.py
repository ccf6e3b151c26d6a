"""The network's contract: sizes, parameters, gradients, modes."""

import pytest
import torch

from unet import AttentionGate, UNet, depth_to_space, space_to_depth


def test_seed_network_has_the_published_number_of_parameters():
    net = UNet(width=64, depth=3, norm="none")
    assert sum(p.numel() for p in net.parameters()) == 7_781_761
    assert [block[0].out_channels for block in net.down] + [net.bottom[0].out_channels] == [64, 128, 256, 512]


@pytest.mark.parametrize("size", [(97, 131), (8, 8), (1, 1), (64, 3)])
@pytest.mark.parametrize(("attention", "stem"), [(False, 1), (True, 1), (False, 2), (True, 4)])
def test_any_slice_size_comes_back(size, attention, stem):
    net = UNet(width=4, depth=3, attention=attention, stem=stem).eval()
    assert net(torch.randn(2, 1, *size)).shape == (2, 1, *size)


@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
@pytest.mark.parametrize("stem", [1, 2])
@pytest.mark.parametrize(("dims", "size"), [(2, (17, 23)), (3, (9, 14, 11))])
def test_gradients_reach_every_parameter(dims, size, norm, stem):
    torch.manual_seed(0)  # of two inner channels of a gate, both can be dead by chance
    net = UNet(in_channels=2, out_channels=3, dims=dims, width=8, depth=2, norm=norm, attention=True, stem=stem)
    logits = net(torch.randn(2, 2, *size))
    assert logits.shape == (2, 3, *size)
    logits.square().mean().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("size", [(8, 12), (8, 12, 4)])
def test_the_stem_turns_blocks_into_channels_and_back(size):
    x = torch.randn(2, 3, *size)
    blocks = space_to_depth(x, 2)
    assert blocks.shape == (2, 3 * 2 ** len(size), *(n // 2 for n in size))
    assert torch.equal(depth_to_space(blocks, 2), x)
    if len(size) == 2:
        assert torch.equal(blocks, torch.nn.functional.pixel_unshuffle(x, 2))


def test_a_stem_answers_for_every_voxel_at_a_quarter_of_the_work():
    """The classical network is the one with stem 1; with stem 2 two pixels of one block may still differ."""
    torch.manual_seed(0)
    assert {k: v.shape for k, v in UNet(width=4, stem=1).state_dict().items()} == {
        k: v.shape for k, v in UNet(width=4).state_dict().items()}
    logits = UNet(width=4, depth=2, stem=2)(torch.randn(1, 1, 16, 16))
    assert not torch.allclose(logits[..., ::2, :], logits[..., 1::2, :])


def test_padding_copies_the_border():
    """The right half of a constant image is as constant in the logits as the left: no edge where the padding begins."""
    torch.manual_seed(0)
    net = UNet(width=4, depth=3, norm="none").eval()
    wide, odd = (net(torch.ones(1, 1, 64, width))[0, 0, 32, 20:30] for width in (64, 59))
    assert torch.allclose(wide, odd, atol=1e-5)


def test_skips_and_bottom_both_matter():
    torch.manual_seed(0)
    net, x = UNet(width=4, depth=2, norm="none"), torch.randn(1, 1, 16, 16)
    whole = net(x)
    for part in (net.bottom, net.down[0], net.up[1]):
        saved = [p.clone() for p in part.parameters()]
        with torch.no_grad():
            for p in part.parameters():
                p.zero_()
        assert not torch.allclose(net(x), whole)
        with torch.no_grad():
            for p, old in zip(part.parameters(), saved, strict=True):
                p.copy_(old)


def test_attention_gate_scales_each_voxel_between_0_and_1():
    skip, signal = torch.rand(2, 6, 5, 7) + 0.1, torch.randn(2, 12, 5, 7)
    ratio = AttentionGate(6, 12, dims=2)(skip, signal) / skip
    assert (ratio > 0).all() and (ratio < 1).all()
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-6)  # one weight for all channels


def test_predict_gives_probabilities_or_a_mask_and_keeps_the_mode():
    net, x = UNet(width=4, depth=1), torch.randn(2, 1, 9, 9)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    probability, mask = net.predict(x), net.predict(x, threshold=0.3)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # batch norm untouched
    assert probability.dtype == torch.float32 and torch.equal(probability, torch.sigmoid(net.eval()(x)))
    assert mask.dtype == torch.bool and torch.equal(mask, probability > 0.3)
    assert not probability.requires_grad


@pytest.mark.parametrize("wrong", [{"dims": 4}, {"norm": "layer"}, {"width": 0}, {"depth": -1}, {"depth": 30},
                                   {"out_channels": 0}, {"stem": 0}])
def test_wrong_arguments_say_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        UNet(**wrong)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 2, 8, 8), (1, 1, 8, 8, 8)])
def test_wrong_input_names_the_shape_expected(shape):
    with pytest.raises(ValueError, match=r"takes \(B, 1, H, W\)"):
        UNet(width=4)(torch.zeros(shape))


def test_the_upsampling_gets_a_gradient_without_gaps(monkeypatch):
    """`cat` hands back a slice of a larger gradient; on a CPU the backward pass of the upsampling, given that, took
    many times as long."""
    last, dense, interpolate = torch.channels_last, [], torch.nn.functional.interpolate

    def watched(*args, **kwargs):
        x = interpolate(*args, **kwargs)
        x.grad_fn.register_hook(lambda _, gradients: dense.append(gradients[0].is_contiguous(memory_format=last)))
        return x

    monkeypatch.setattr("unet.F.interpolate", watched)
    net = UNet(width=4, depth=2, norm="none").to(memory_format=last)
    net(torch.randn(2, 1, 16, 16).to(memory_format=last)).sum().backward()
    assert dense == [True, True]
