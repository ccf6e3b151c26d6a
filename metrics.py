"""Scores of one predicted mask against the truth: overlap, surface distance in mm, volume; needs numpy and scipy.

    Dice, "Measures of the amount of ecologic association between species", Ecology 26, 1945
    Taha, Hanbury, "Metrics for evaluating 3D medical image segmentation", BMC Medical Imaging 15:29, 2015

Contract: bool masks (D, H, W), or of other axes, of one whole scan in the scan's own space, spacing along them in mm.
Counts are integers over the scan and are divided once: never average slices or batches. One mask a call: of several
organs, each has its own.

    from metrics import score
    score(prediction, truth, spacing=(0.625, 0.625, 0.625))["dice"]

Empty masks: both empty is a perfect answer (dice = jaccard = 1, distances 0). One empty is a failure: dice = jaccard
= 0 and the distances are inf, not nan, so that a mean cannot drop the failure silently. Whoever averages distances
counts the failures and reports them apart, as `predict.py` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |P and T| / (|P| + |T|), 0 to 1, of two masks; 1 where both are empty.

    Raises:
        ValueError: masks that are not bool, or differ in shape.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != bool:
            raise ValueError(f"{name} is {mask.dtype}; a mask is bool (threshold it first, for instance `x > 0.5`)")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth is {truth.shape}; they must be equal")
    total = int(np.count_nonzero(prediction) + np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(prediction & truth)) / total if total else 1.0


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distances in mm from each surface voxel of one mask to the surface of the other, both ways, pooled: (N,).

    A surface voxel is a foreground voxel with a background face neighbour; beyond the array all is background.
    Two bool masks of one shape, neither empty, and a spacing for each axis: `score` checks them, this does not.
    """
    # The centres of the surface voxels in mm, (N, axes): few, whatever the size of the scan.
    prediction, truth = (np.argwhere(mask & ~ndimage.binary_erosion(mask)) * spacing for mask in (prediction, truth))
    return np.concatenate([KDTree(truth).query(prediction)[0], KDTree(prediction).query(truth)[0]])


def score(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Scores of one scan.

    Args:
        prediction, truth: bool masks of one shape, any number of axes.
        spacing: voxel size in mm along each axis.

    Returns:
        dice: see above.
        jaccard: |P and T| / |P or T|, 0 to 1.
        hd95, assd: 95th percentile and mean of the surface distances of both directions, pooled, in mm (as in MedPy
            0.5, which the left-atrium literature uses; MONAI's hd95 is the larger of the two directed percentiles).
        volume_ml, truth_ml: volume of prediction and truth; of 2D masks the area in mm2, over 1000.

    Raises:
        ValueError: masks that are not bool, differ in shape, or a spacing that does not fit them.
    """
    overlap, prediction, truth = dice(prediction, truth), np.asarray(prediction), np.asarray(truth)
    spacing = np.asarray(spacing, float)
    if np.shape(spacing) != (truth.ndim,) or not all(0 < step < np.inf for step in spacing):
        raise ValueError(f"spacing is {spacing}; expected {truth.ndim} positive lengths in mm")

    volumes = [int(np.count_nonzero(mask)) for mask in (prediction, truth)]
    if all(volumes):
        distances = surface_distances(prediction, truth, spacing)
        hd95, assd = np.percentile(distances, 95), distances.mean()
    else:
        hd95 = assd = np.inf if any(volumes) else 0.0
    voxel_ml = float(np.prod(spacing)) / 1000
    return {
        "dice": overlap,
        "jaccard": overlap / (2 - overlap),
        "hd95": float(hd95),
        "assd": float(assd),
        "volume_ml": volumes[0] * voxel_ml,
        "truth_ml": volumes[1] * voxel_ml,
    }
