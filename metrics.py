"""Scores of one predicted mask against the truth: overlap, surface distance in mm, volume; needs numpy and scipy.

    Dice, "Measures of the amount of ecologic association between species", Ecology 26, 1945
    Taha, Hanbury, "Metrics for evaluating 3D medical image segmentation", BMC Medical Imaging 15:29, 2015

Contract: bool masks (D, H, W) of one whole scan in the scan's own space, spacing (D, H, W) in mm. Counts are integers
over the scan and are divided once: never average slices or batches.

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


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distances in mm from each surface voxel of one mask to the surface of the other, both ways, pooled: (N,).

    A surface voxel is a foreground voxel with a background face neighbour; beyond the array all is background.
    Neither mask may be empty.
    """
    bounds = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]
    # One voxel of margin, so that the distance transform is computed on the organ and not on the whole scan.
    prediction, truth = np.pad(prediction[bounds], 1), np.pad(truth[bounds], 1)
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (prediction, truth)]
    to_surface = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    return np.concatenate([to_surface[1][surfaces[0]], to_surface[0][surfaces[1]]])


def score(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Scores of one scan.

    Args:
        prediction, truth: bool masks of one shape, any number of axes.
        spacing: voxel size in mm along each axis.

    Returns:
        dice: 2 |P and T| / (|P| + |T|), 0 to 1.
        jaccard: |P and T| / |P or T|, 0 to 1.
        hd95, assd: 95th percentile and mean of the surface distances of both directions, pooled, in mm (as in MedPy,
            which the left-atrium literature uses; MONAI's hd95 is the larger of the two directed percentiles).
        volume_ml, truth_ml: volume of prediction and truth.

    Raises:
        ValueError: masks that are not bool, differ in shape, or a spacing that does not fit them.
    """
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != bool:
            raise ValueError(f"{name} is {mask.dtype}; a mask is bool (threshold it first, for instance `x > 0.5`)")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction is {prediction.shape}, truth is {truth.shape}; they must be equal")
    if len(spacing) != truth.ndim or not all(0 < step < np.inf for step in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}; expected {truth.ndim} positive lengths in mm")

    overlap, predicted, true = (int(np.count_nonzero(mask)) for mask in (prediction & truth, prediction, truth))
    if predicted and true:
        distances = surface_distances(prediction, truth, spacing)
        hd95, assd = np.percentile(distances, 95), distances.mean()
    else:
        hd95 = assd = np.inf if predicted or true else 0.0
    voxel_ml = float(np.prod(spacing)) / 1000
    return {
        "dice": 2 * overlap / (predicted + true) if predicted + true else 1.0,
        "jaccard": overlap / (predicted + true - overlap) if predicted + true else 1.0,
        "hd95": float(hd95),
        "assd": float(assd),
        "volume_ml": predicted * voxel_ml,
        "truth_ml": true * voxel_ml,
    }
