"""Scores against hand-computed cases and against MedPy, the library that the left-atrium literature scores with."""

from functools import partial
from math import inf

import numpy as np
import pytest
from scipy import ndimage

from metrics import dice, score


def row(voxels):
    return np.array([[[voxel == "#" for voxel in voxels]]])


PERFECT = {"dice": 1, "jaccard": 1, "hd95": 0, "assd": 0}
FAILED = {"dice": 0, "jaccard": 0, "hd95": inf, "assd": inf}  # not nan: a mean cannot drop it silently
CUBE = np.zeros((3, 3, 3), bool)


@pytest.mark.parametrize(("prediction", "truth", "spacing", "expected"), [
    # One voxel each, 3 steps of 2 mm apart: no overlap, every distance is 6 mm.
    (row(".#......."), row("....#...."), (5.0, 1.0, 2.0),
     {"dice": 0, "jaccard": 0, "hd95": 6, "assd": 6, "volume_ml": 0.01, "truth_ml": 0.01}),
    # Shifted by 2 voxels of 1 mm. Distances of the surface, each way: 2, 1, 0, 0.
    (row("####....."), row("..####..."), (1, 1, 1),
     {"dice": 0.5, "jaccard": 2 / 6, "assd": 0.75, "hd95": np.percentile([0, 0, 0, 0, 1, 1, 2, 2], 95)}),
    # A 4-cube inside a 6-cube, slices 3 mm thick: 2 * 64 / (64 + 216).
    (np.pad(np.ones((4, 4, 4), bool), 1), np.ones((6, 6, 6), bool), (3, 1, 1),
     {"dice": 128 / 280, "volume_ml": 0.192, "truth_ml": 0.648}),
    (row(".##."), row(".##."), (1, 1, 1), PERFECT), (row("...."), row("...."), (1, 1, 1), PERFECT),
    (row(".##."), row("...."), (1, 1, 1), FAILED), (row("...."), row(".##."), (1, 1, 1), FAILED),
    (row(".##.").tolist(), row(".##.").tolist(), [1, 1, 1], PERFECT),
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
