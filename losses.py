"""Dice loss and Dice plus cross-entropy, on logits, for masks of any number of dimensions; needs only PyTorch.

    Milletari, Navab, Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image Segmentation",
    3DV 2016 (the Dice loss; here with the plain sum in the denominator, as in the Dice coefficient itself)

Contract: `loss(logits, target)`, both (B, C, *size) of one shape; logits any real number (no sigmoid before), target
0 or 1 (not checked: 255, a label 2, or a soft label gives a wrong loss). Computed in float32 whatever comes in, also
under autocast: sums over 10,000s of voxels overflow float16.

    from losses import DiceLoss
    loss = DiceLoss()(network(image), mask)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DiceLoss(nn.Module):
    """`1 - 2 * sum(p * y) / (sum(p) + sum(y))` with p = sigmoid(logits), summed over the whole batch and all channels.

    Several masks: a large organ outvotes a small one. Better take the mean of `loss(logits[:, [c]], target[:, [c]])`
    over the channels c.

    The empty mask: with y = 0 everywhere the loss is about 1 and has almost no gradient, unless sum(p) vanishes too
    (below `smooth`), where it is 0. Dice alone therefore teaches little from a sample without foreground; summed over a
    batch, which holds other slices too, every false voxel still counts. So the sum runs over the batch by default.

    Args:
        per_sample: sum over each sample, then average over the batch. Not together with `reduce`.
        smooth: added to numerator and denominator, so that 0/0 is a perfect score. 1 is common too: it softens the
            empty mask and biases small ones.
        reduce: applied to the sums before they are divided. With several processes it adds those of the others, so that
            the batch is that of all processes together. `train.sum_over_processes` is that: the value is
            all_reduce(x), and x gets its gradient times the number of processes, by which DDP divides it.
            (`dist.all_reduce` alone passes no gradient on.)

    Raises:
        ValueError: logits and target differ in shape (broadcasting would hide it); `per_sample` with `reduce`.
    """

    def __init__(self, *, per_sample: bool = False, smooth: float = 1e-6,
                 reduce: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        if per_sample and reduce:
            raise ValueError("reduce adds up what processes share, and with per_sample they share nothing: take one")
        self.per_sample, self.smooth, self.reduce = per_sample, smooth, reduce

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if logits.shape != target.shape:
            raise ValueError(f"logits are {tuple(logits.shape)}, target is {tuple(target.shape)}; they must be equal")
        probability, target = torch.sigmoid(logits.float()), target.float()
        axes = tuple(range(1 if self.per_sample else 0, logits.ndim))
        overlap = (probability * target).sum(axes)  #               () or (B,)
        total = probability.sum(axes) + target.sum(axes)
        if self.reduce:
            overlap, total = self.reduce(torch.stack([overlap, total]))
        return (1 - (2 * overlap + self.smooth) / (total + self.smooth)).mean()


class BCEDiceLoss(nn.Module):
    """Binary cross-entropy plus Dice loss, their plain sum.

    Cross-entropy sees each voxel, so it gives early training a steady gradient and calibrates the empty slices; Dice
    sees the overlap, so that the few voxels of the organ are not outvoted by the background.
    """

    def __init__(self, **dice):
        """Takes the arguments of `DiceLoss`."""
        super().__init__()
        self.dice = DiceLoss(**dice)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        dice = self.dice(logits, target)
        return dice + F.binary_cross_entropy_with_logits(logits.float(), target.float())
