"""Scores against hand-computed cases and against MedPy, the library that the left-atrium literature scores with."""

from functools import partial
from math import inf

import numpy as np
import pytest
from scipy import ndimage

from metrics import dice, score


def box(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


def bar(first, last):
    """Voxels of a row of nine."""
    return box((1, 1, 9), (0, 1), (0, 1), (first, last))


FULL, EMPTY, CUBE = bar(2, 6), bar(0, 0), np.zeros((3, 3, 3), bool)
PERFECT = {"dice": 1, "jaccard": 1, "hd95": 0, "assd": 0}
FAILED = {"dice": 0, "jaccard": 0, "hd95": inf, "assd": inf}  # not nan: a mean cannot drop it silently


@pytest.mark.parametrize(("prediction", "truth", "spacing", "expected"), [
    # One voxel each, 3 steps of 2 mm apart: no overlap, every distance is 6 mm.
    (bar(1, 2), bar(4, 5), (5.0, 1.0, 2.0),
     {"dice": 0, "jaccard": 0, "hd95": 6, "assd": 6, "volume_ml": 0.01, "truth_ml": 0.01}),
    # Bars shifted by 2 voxels of 1 mm. Distances of the surface, each way: 2, 1, 0, 0.
    (bar(0, 4), FULL, (1, 1, 1),
     {"dice": 0.5, "jaccard": 2 / 6, "assd": 0.75, "hd95": np.percentile([0, 0, 0, 0, 1, 1, 2, 2], 95)}),
    # A 4-cube inside a 6-cube, slices 3 mm thick: 2 * 64 / (64 + 216).
    (box((10, 10, 10), *[(3, 7)] * 3), box((10, 10, 10), *[(2, 8)] * 3), (3, 1, 1),
     {"dice": 128 / 280, "volume_ml": 0.192, "truth_ml": 0.648}),
    (FULL, FULL, (1, 1, 1), PERFECT), (EMPTY, EMPTY, (1, 1, 1), PERFECT),
    (FULL, EMPTY, (1, 1, 1), FAILED), (EMPTY, FULL, (1, 1, 1), FAILED),
    (FULL.tolist(), FULL.tolist(), [1, 1, 1], PERFECT),
])
def test_by_hand(prediction, truth, spacing, expected):
    result = score(prediction, truth, spacing)
    assert result == pytest.approx(result | expected) and dice(prediction, truth) == result["dice"]


def test_agrees_with_medpy_on_50_random_masks():
    medpy = pytest.importorskip("medpy.metric.binary", reason="pip install -r requirements-dev.txt")
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape, spacing = rng.integers(5, 24, 3), rng.uniform(0.4, 4, 3)
        masks = [ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > -0.02 for _ in range(2)]
        expected = {"dice": medpy.dc(*masks), "jaccard": medpy.jc(*masks)}
        expected |= {name: getattr(medpy, name)(*masks, voxelspacing=spacing) for name in ("hd95", "assd")}
        result = score(*masks, spacing)
        assert result == pytest.approx(result | expected)


@pytest.mark.parametrize(("prediction", "truth", "told"), [
    (CUBE.astype(np.uint8), CUBE, "prediction is uint8"), (CUBE, CUBE * 0.5, "truth is float64"),
    ([[[0, 1]]], [[[1, 1]]], "prediction is int"), (CUBE[..., :2], CUBE, r"\(3, 3, 2\), truth is \(3, 3, 3\)"),
])
def test_what_are_no_masks_raises(prediction, truth, told):
    for function in (dice, partial(score, spacing=(1, 1, 1))):
        with pytest.raises(ValueError, match=told):
            function(prediction, truth)


@pytest.mark.parametrize("spacing", [1.0, (1, 1), (1, 1, 0), (1, 1, inf)])
def test_a_spacing_that_does_not_fit_raises(spacing):
    with pytest.raises(ValueError, match="spacing is .*; expected 3 positive lengths"):
        score(CUBE, CUBE, spacing)
