"""Scores against hand-computed cases and against MedPy, the library that the left-atrium literature scores with."""

import math

import numpy as np
import pytest
from scipy import ndimage

from metrics import score


def box(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in bounds)] = True
    return mask


def test_two_voxels_three_apart():
    """One voxel each, 3 steps of 2 mm apart along W: no overlap, every distance is 6 mm."""
    prediction, truth = box((1, 1, 9), (0, 1), (0, 1), (1, 2)), box((1, 1, 9), (0, 1), (0, 1), (4, 5))
    result = score(prediction, truth, (5.0, 1.0, 2.0))
    assert result == {"dice": 0, "jaccard": 0, "hd95": 6, "assd": 6, "volume_ml": 0.01, "truth_ml": 0.01}


def test_half_overlap():
    """Two 1 x 1 x 4 bars shifted by 2 voxels of 1 mm. Distances of the surface, each way: 2, 1, 0, 0."""
    prediction, truth = box((1, 1, 9), (0, 1), (0, 1), (0, 4)), box((1, 1, 9), (0, 1), (0, 1), (2, 6))
    result = score(prediction, truth, (1, 1, 1))
    assert result["dice"] == 0.5 and result["jaccard"] == pytest.approx(2 / 6)
    assert result["assd"] == pytest.approx(0.75)
    assert result["hd95"] == pytest.approx(np.percentile([0, 0, 0, 0, 1, 1, 2, 2], 95))


def test_a_cube_inside_a_cube():
    """A 4-cube 1 mm inside a 6-cube, slices 3 mm thick: Dice 2 * 64 / (64 + 216); volumes in ml."""
    truth, prediction = box((10, 10, 10), (2, 8), (2, 8), (2, 8)), box((10, 10, 10), (3, 7), (3, 7), (3, 7))
    result = score(prediction, truth, (3, 1, 1))
    assert result["dice"] == pytest.approx(128 / 280)
    assert result["volume_ml"] == pytest.approx(64 * 3 / 1000) and result["truth_ml"] == pytest.approx(216 * 3 / 1000)
    assert 1 < result["assd"] < 3 and result["hd95"] <= math.sqrt(9 + 1 + 1)


def test_identity_and_empty():
    full, empty = box((4, 4, 4), (1, 3), (1, 3), (1, 3)), np.zeros((4, 4, 4), bool)
    same, none = score(full, full, (1, 1, 1)), score(empty, empty, (1, 1, 1))
    assert (same["dice"], same["jaccard"], same["hd95"], same["assd"]) == (1, 1, 0, 0)
    assert (none["dice"], none["jaccard"], none["hd95"], none["assd"]) == (1, 1, 0, 0)
    for one_empty in (score(full, empty, (1, 1, 1)), score(empty, full, (1, 1, 1))):
        assert (one_empty["dice"], one_empty["jaccard"]) == (0, 0)
        assert one_empty["hd95"] == one_empty["assd"] == math.inf  # not nan: a mean cannot drop it silently


def test_agrees_with_medpy_on_50_random_masks():
    medpy = pytest.importorskip("medpy.metric.binary", reason="pip install -r requirements-dev.txt")
    rng = np.random.default_rng(0)
    for _ in range(50):
        shape, spacing = rng.integers(5, 24, 3), rng.uniform(0.4, 4, 3)
        prediction, truth = (ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > -0.02 for _ in range(2))
        result = score(prediction, truth, spacing)
        assert result["dice"] == pytest.approx(medpy.dc(prediction, truth))
        assert result["jaccard"] == pytest.approx(medpy.jc(prediction, truth))
        assert result["hd95"] == pytest.approx(medpy.hd95(prediction, truth, voxelspacing=spacing))
        assert result["assd"] == pytest.approx(medpy.assd(prediction, truth, voxelspacing=spacing))


def test_wrong_input_raises():
    mask = np.zeros((3, 3, 3), bool)
    with pytest.raises(ValueError, match="uint8"):
        score(mask.astype(np.uint8), mask, (1, 1, 1))
    with pytest.raises(ValueError, match=r"\(3, 3, 2\)"):
        score(mask[..., :2], mask, (1, 1, 1))
    for spacing in ((1, 1), (1, 1, 0), (1, 1, math.inf)):
        with pytest.raises(ValueError, match="spacing"):
            score(mask, mask, spacing)
