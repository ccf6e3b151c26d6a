"""U-Net in 2D or 3D, with optional attention gates: the whole network in one file that needs only PyTorch.

    Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015
    Cicek et al., "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation", MICCAI 2016
    Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018

Contract: float images (B, C, H, W), or (B, C, D, H, W) with dims=3, any size, in; logits of the same size out.

    from unet import UNet
    net = UNet(width=64, depth=3, norm="none")      # 7,781,761 parameters
    mask = net.predict(image, threshold=0.5)        # bool (B, 1, H, W)

Departures from Ronneberger: padded convolutions, so that the output has the input's size (theirs shrinks); linear
upsampling followed by convolutions instead of transposed convolutions (no checkerboard); optional normalisation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------- building blocks

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
# Channels last in memory: what convolutions are fastest with, on CPUs and GPUs.
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


# -------------------------------------------------------------------------------------------------------- the network


class UNet(nn.Module):
    """U-Net that maps an image to the logits of a mask.

    The network returns logits, not probabilities: the losses take the sigmoid themselves, where log and exp cancel
    (`binary_cross_entropy_with_logits`), so that a confident voxel still has a gradient and float16 does not overflow.
    `predict` is the way to probabilities and masks.

    Args:
        in_channels: channels of the image, 1 for MRI.
        out_channels: masks to predict, each on its own (sigmoid, not softmax).
        dims: 2 for slices, 3 for volumes.
        width: channels after the first block; each level down doubles them.
        depth: number of poolings, so `depth + 1` resolutions.
        norm: "none", "batch" or "instance".
        attention: put attention gates on the skips.

    Raises:
        ValueError: an argument outside these, or an input of another rank or number of channels.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1,
        out_channels: int = 1,
        dims: int = 2,
        width: int = 64,
        depth: int = 3,
        norm: str = "batch",
        attention: bool = False,
    ):
        super().__init__()
        if dims not in CONV:
            raise ValueError(f"dims is {dims}; a U-Net has 2 or 3")
        if norm not in NORM:
            raise ValueError(f"norm is {norm!r}; choose from {', '.join(NORM)}")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if depth < 0:
            raise ValueError(f"depth is {depth}; it must be at least 0")
        self.dims, self.in_channels, self.multiple = dims, in_channels, 2**depth
        self.memory_format = MEMORY[dims]  # for network and images: `net.to(memory_format=net.memory_format)`
        self.interpolation = {2: "bilinear", 3: "trilinear"}[dims]

        widths = [width * 2**level for level in range(depth + 1)]  # 64, 128, 256, 512 with the defaults
        levels = list(zip(widths[:-1], widths[1:], strict=True))  # (fine, coarse) of each level, finest first
        self.down = nn.ModuleList(
            DoubleConv(channels, fine, dims=dims, norm=norm)
            for channels, fine in zip([in_channels, *widths], widths[:-1], strict=False)
        )
        self.pool = POOL[dims](kernel_size=2)
        self.bottom = DoubleConv(widths[-2] if depth else in_channels, widths[-1], dims=dims, norm=norm)
        self.gates = nn.ModuleList(AttentionGate(fine, coarse, dims=dims) for fine, coarse in levels[::-1] if attention)
        self.up = nn.ModuleList(DoubleConv(fine + coarse, fine, dims=dims, norm=norm) for fine, coarse in levels[::-1])
        self.head = CONV[dims](width, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, out_channels, *size) of images (B, in_channels, *size); `size` is (H, W) or (D, H, W), any.

        The sizes in the margin are those of width 64 and depth 3 on slices.
        """
        if x.ndim != self.dims + 2 or x.shape[1] != self.in_channels:
            axes = "H, W" if self.dims == 2 else "D, H, W"
            raise ValueError(f"input is {tuple(x.shape)}; this network takes (B, {self.in_channels}, {axes})")
        size = x.shape[2:]
        padding = [n for length in reversed(size) for n in (0, -length % self.multiple)]
        if any(padding):  # Copies of the border, not zeros: zeros would be an edge that the image does not have.
            x = F.pad(x, padding, mode="replicate")

        skips = []
        for block in self.down:                                                     # (B,  64, H,   W  ) ───────────┐
            skips.append(block(x))                                                  #   (B, 128, H/2, W/2) ──────┐  │
            x = self.pool(skips[-1])                                                #     (B, 256, H/4, W/4) ─┐  │  │
        x = self.bottom(x)                                                          #       (B, 512, H/8, W/8)│  │  │
        for level, block in enumerate(self.up):                                     #                         │  │  │
            x = F.interpolate(x, scale_factor=2, mode=self.interpolation)           #                         │  │  │
            if x.requires_grad and x.device.type == "cpu":                          #                         │  │  │
                # `cat` hands back a gradient with gaps, and PyTorch's upsampling is several times slower on these.
                x.register_hook(torch.clone)                                        #                         │  │  │
            skip = self.gates[level](skips.pop(), x) if self.gates else skips.pop() #     (B, 256, H/4, W/4) ◁┘  │  │
            x = block(torch.cat([skip, x], dim=1))                                  #   (B, 128, H/2, W/2) ◁─────┘  │
        assert not skips                                                            # (B,  64, H,   W  ) ◁──────────┘
        return self.head(x)[(..., *map(slice, size))]                               # (B,   1, H,   W  )

    @torch.no_grad()
    def predict(self, x: Tensor, threshold: float | None = None) -> Tensor:
        """Probabilities, float32 of `forward`'s shape; with a threshold the bool mask `probability > threshold`.

        Runs in evaluation mode, whatever mode the network is in, and leaves it in that mode.
        """
        training = self.training
        self.eval()
        try:
            probability = torch.sigmoid(self(x).float())  # float32: bfloat16 has only 128 steps between 0.5 and 1
        finally:
            self.train(training)
        return probability if threshold is None else probability > threshold
