"""U-Net in 2D or 3D, with optional attention gates and stem: the whole network in one file that needs only PyTorch.

    Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015
    Cicek et al., "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation", MICCAI 2016
    Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018
    Shi et al., "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel CNN", CVPR 2016 (stem)

Contract: float images (B, C, H, W), or (B, C, D, H, W) with dims=3, any size, in; logits of the same size out. Maps
of the lowest level, of 1 / (stem * 2**depth) of the size, must hold more than one voxel: with norm="instance" always;
with "batch" to train, over the batch. On a CPU in 3D, gradients in bfloat16 are wrong where a level's D is 2: with
depth 1 or more, of images of D up to 2 * stem * 2**depth.

    from unet import UNet
    net = UNet(width=64, depth=3, norm="none")      # 7,781,761 parameters
    mask = net.predict(image, threshold=0.5)        # bool (B, 1, H, W)

Departures from Ronneberger: padded convolutions, so that the output has the input's size (theirs shrinks); linear
upsampling followed by convolutions instead of transposed convolutions (no checkerboard), so that a level on the way up
gets all channels of the one below, and not half of them; optional normalisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------- building blocks

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
# Channels last in memory: what most convolutions are fastest with, on CPUs and GPUs.
MEMORY = {2: torch.channels_last, 3: torch.channels_last_3d}
NORM = {
    "none": {2: None, 3: None},
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
}


class DoubleConv(nn.Sequential):
    """(3x3 convolution, normalisation, ReLU) twice; keeps the size, changes the channels."""

    def __init__(self, in_channels: int, out_channels: int, *, dims: int, norm: str):
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            # A normalisation that follows subtracts the mean, and any bias with it.
            layers.append(CONV[dims](channels, out_channels, kernel_size=3, padding=1, bias=norm == "none"))
            if norm != "none":
                layers.append(NORM[norm][dims](out_channels, affine=True))
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class AttentionGate(nn.Module):
    """Weigh each voxel of a skip by how much the coarser signal asks for it (Oktay et al. 2018, eq. 1 and 2).

    Additive attention: `skip * sigmoid(psi(relu(W_s skip + W_g signal)))`. The paper computes the weights on the
    coarser grid; here the signal is upsampled before it meets the skip, so they are computed on the finer one.
    """

    def __init__(self, skip_channels: int, signal_channels: int, *, dims: int):
        super().__init__()
        inner = max(skip_channels // 2, 1)
        self.skip = CONV[dims](skip_channels, inner, kernel_size=1, bias=False)
        self.signal = CONV[dims](signal_channels, inner, kernel_size=1)
        self.weight = CONV[dims](inner, 1, kernel_size=1)

    def forward(self, skip: Tensor, signal: Tensor) -> Tensor:
        return skip * torch.sigmoid(self.weight(F.relu(self.skip(skip) + self.signal(signal))))  # weight: one channel


def upsample(x: Tensor) -> Tensor:
    """Twice the size, linearly interpolated."""
    x = F.interpolate(x, scale_factor=2, mode="bilinear" if x.ndim == 4 else "trilinear")
    if x.requires_grad and x.device.type == "cpu":
        # `torch.cat` hands back a gradient with gaps, on which PyTorch's upsampling is several times slower. Where none
        # is needed, autograd may hand back None.
        x.register_hook(lambda gradient: gradient if gradient is None else gradient.clone())
    return x


def space_to_depth(x: Tensor, n: int) -> Tensor:
    """(B, C, H, W) to (B, C * n * n, H / n, W / n): the voxels of each n x n block become channels. In 3D likewise, for
    which `F.pixel_unshuffle` has no form."""
    batch, channels, *size = x.shape
    blocks = x.reshape(batch, channels, *(part for length in size for part in (length // n, n)))
    coarse, fine = range(2, blocks.ndim, 2), range(3, blocks.ndim, 2)
    return blocks.permute(0, 1, *fine, *coarse).flatten(1, 1 + len(size))


def depth_to_space(x: Tensor, n: int) -> Tensor:
    """The way back: (B, C * n * n, H / n, W / n) to (B, C, H, W)."""
    batch, channels, *size = x.shape
    blocks = x.reshape(batch, channels // n ** len(size), *[n] * len(size), *size)
    fine, coarse = range(2, 2 + len(size)), range(2 + len(size), blocks.ndim)
    blocks = blocks.permute(0, 1, *(axis for pair in zip(coarse, fine, strict=True) for axis in pair))
    return blocks.reshape(*blocks.shape[:2], *(length * n for length in size))


# -------------------------------------------------------------------------------------------------------- the network


class UNet(nn.Module):
    """U-Net that maps an image to the logits of a mask.

    The network returns logits, not probabilities: cross-entropy takes the sigmoid itself, where log and exp cancel
    (`binary_cross_entropy_with_logits`), so that a voxel that is confidently wrong keeps its gradient.
    `predict` is the way to probabilities and masks.

    Args:
        in_channels: channels of the image, 1 for MRI.
        out_channels: masks to predict, each on its own (sigmoid, not softmax).
        dims: 2 for slices, 3 for volumes.
        width: channels after the first block; each level down doubles them.
        depth: number of poolings, so `depth + 1` resolutions.
        norm: "none", "batch" or "instance".
        attention: put attention gates on the skips.
        stem: 1 is the classical U-Net. With 2 the network works at half the resolution, in a quarter of the time (in
            3D an eighth), and still answers for every voxel: each block of 2 x 2 (x 2) voxels enters and leaves as
            channels.

    Raises:
        ValueError: an argument outside these, or an input of another rank or number of channels.
    """

    def __init__(self, *, in_channels: int = 1, out_channels: int = 1, dims: int = 2, width: int = 64, depth: int = 3,
                 norm: str = "batch", attention: bool = False, stem: int = 1):
        super().__init__()
        checks = (("dims", dims, CONV), ("norm", norm, NORM), ("depth", depth, range(9)), ("stem", stem, range(1, 9)),
                  ("attention", attention, (False, True)))
        for name, value, choices in checks:
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose from {', '.join(map(str, choices))}")
        if min(in_channels, out_channels, width) < 1:
            raise ValueError(f"in_channels, out_channels, width are {in_channels}, {out_channels}, {width}; "
                             "each must be at least 1")
        self.dims, self.in_channels, self.stem = dims, in_channels, stem
        self.multiple = stem * 2**depth  # what a size is padded up to

        voxels = stem**dims  # of a block, which become channels
        widths = [width * 2**level for level in range(depth + 1)]  # 64, 128, 256, 512 with the defaults
        levels = list(zip(widths[:-1], widths[1:], strict=True))  # (fine, coarse) of each level, finest first
        inputs = [in_channels * voxels, *widths]  # channels that each level is given
        self.down = nn.ModuleList(DoubleConv(inputs[i], widths[i], dims=dims, norm=norm) for i in range(depth))
        self.pool = POOL[dims](kernel_size=2)
        self.bottom = DoubleConv(inputs[depth], widths[depth], dims=dims, norm=norm)
        self.gates = nn.ModuleList(AttentionGate(fine, coarse, dims=dims) for fine, coarse in levels[::-1] if attention)
        self.up = nn.ModuleList(DoubleConv(fine + coarse, fine, dims=dims, norm=norm) for fine, coarse in levels[::-1])
        self.head = CONV[dims](width, out_channels * voxels, kernel_size=1)

    @property
    def memory_format(self) -> torch.memory_format:
        """For network and images: `net.to(memory_format=net.memory_format)`. An attribute could not be pickled."""
        return MEMORY[self.dims]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, out_channels, *size) of images (B, in_channels, *size); `size` is (H, W) or (D, H, W), any.

        The margin draws the U, level by level, not line by line: its sizes are those of width 64, depth 3, stem 1.
        """
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = "H, W" if self.dims == 2 else "D, H, W"
            raise ValueError(f"input is {tuple(x.shape)}; this network takes (B, {self.in_channels}, {axes})")
        padding = [n for length in reversed(x.shape[2:]) for n in (0, -length % self.multiple)]
        if any(padding):  # Copies of the border, not zeros: zeros would be an edge that the image does not have.
            x = F.pad(x, padding, mode="replicate")
        if self.stem > 1:
            x = space_to_depth(x, self.stem).contiguous(memory_format=self.memory_format)

        skips = []
        for block in self.down:                                                     # (B,  64, H,   W  ) ───────────┐
            skips.append(block(x))                                                  #   (B, 128, H/2, W/2) ──────┐  │
            x = self.pool(skips[-1])                                                #     (B, 256, H/4, W/4) ─┐  │  │
        x = self.bottom(x)                                                          #       (B, 512, H/8, W/8)│  │  │
        for level, block in enumerate(self.up):                                     #                         │  │  │
            x = upsample(x)                                                         #                         │  │  │
            skip = self.gates[level](skips.pop(), x) if self.gates else skips.pop() #     (B, 256, H/4, W/4) ◁┘  │  │
            x = block(torch.cat([skip, x], dim=1))                                  #   (B, 128, H/2, W/2) ◁─────┘  │
                                                                                    # (B,  64, H,   W  ) ◁──────────┘
        x = self.head(x)                                                            # (B,   1, H,   W  )

        if self.stem > 1:
            x = depth_to_space(x, self.stem)
        return F.pad(x, [-n for n in padding])  # what was padded, off again

    @torch.no_grad()
    def predict(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """Probabilities, float32 of `forward`'s shape; with a threshold the bool mask `probability > threshold`.

        Runs in evaluation mode, whatever mode the network is in, and leaves each part of it in its mode.
        """
        modes = {part: part.training for part in self.modules()}
        self.eval()
        try:
            probability = torch.sigmoid(self(x).float())  # float32: bfloat16 has only 128 steps between 0.5 and 1
        finally:
            for part, training in modes.items():
                part.training = training
        return probability if threshold is None else probability > threshold
