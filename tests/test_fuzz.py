"""Random input: scores, losses, networks, crops and orientations keep their promises; damaged files raise DataError.

    python tests/test_fuzz.py --minutes 10 --seed 1      # the mutations of NIfTI files, for longer than a test may take
"""

import argparse
import gzip
import sys
import tempfile
import time
import warnings
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the command above
import data  # noqa: E402
from data import DataError  # noqa: E402
from losses import BCEDiceLoss, DiceLoss  # noqa: E402
from metrics import score  # noqa: E402
from unet import UNet  # noqa: E402

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)  # the same examples in every run
CODES = ["".join(codes) for order in permutations(("LR", "PA", "IS")) for codes in product(*order)]


# ------------------------------------------------------------------------------------------------------------- scores


@st.composite
def two_masks(draw):
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7))
    spacing = draw(st.lists(st.floats(0.1, 10), min_size=len(shape), max_size=len(shape)))
    return (*(draw(arrays.arrays(bool, shape)) for _ in range(2)), spacing)


@quick
@given(two_masks())
def test_scores_keep_their_promises(case):
    a, b, spacing = case
    there, back, itself = score(a, b, spacing), score(b, a, spacing), score(a, a, spacing)
    for name in ("dice", "jaccard", "hd95", "assd"):
        assert there[name] == pytest.approx(back[name], abs=1e-9)  # symmetric
        assert itself[name] == (1 if name in ("dice", "jaccard") else 0)
    assert 0 <= there["jaccard"] <= there["dice"] <= 1
    assert there["jaccard"] == pytest.approx(there["dice"] / (2 - there["dice"]))
    assert np.isfinite(there["hd95"]) == (a.any() == b.any())  # infinite where one is empty, never nan
    if np.isfinite(there["hd95"]):
        diagonal = np.linalg.norm(np.multiply(np.subtract(a.shape, 1), spacing))
        assert 0 <= there["assd"] <= diagonal + 1e-9 and 0 <= there["hd95"] <= diagonal + 1e-9
    assert there["volume_ml"] == pytest.approx(a.sum() * np.prod(spacing) / 1000)


@quick
@given(two_masks(), st.sampled_from([np.uint8, np.float32, np.int64]))
def test_scores_refuse_what_is_no_mask(case, dtype):
    a, b, spacing = case
    for wrong in ((a.astype(dtype), b, spacing), (a, np.pad(b, 1), spacing), (a, b, [*spacing, 1.0]),
                  (a, b, [-1.0, *spacing[1:]]), (a, b, [np.nan, *spacing[1:]])):
        with pytest.raises(ValueError, match="expected|must be|a mask is bool"):
            score(*wrong)


# ------------------------------------------------------------------------------------------------------------- losses


@quick
@given(st.lists(st.integers(1, 5), min_size=3, max_size=5), st.floats(0, 1e4), st.integers(0, 2**31),
       st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.booleans(),
       st.sampled_from([torch.float32, torch.uint8, torch.bool]))
def test_losses_are_finite_and_in_range(shape, scale, seed, dtype, per_sample, target_dtype):
    """Any shape, scale and dtype of the logits, masks of any dtype, the empty one among them."""
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=random) * scale).to(dtype).clamp(-6e4, 6e4).requires_grad_()
    target = (torch.rand(shape, generator=random) < (seed % 3) / 2).to(target_dtype)
    dice = DiceLoss(per_sample=per_sample)(logits, target)
    both = BCEDiceLoss(per_sample=per_sample)(logits, target)
    assert dice.dtype == both.dtype == torch.float32 and -1e-6 <= dice.item() <= 1 and both.item() >= dice.item() - 1e-6
    both.backward()
    assert torch.isfinite(both) and torch.isfinite(logits.grad).all()
    right = (target.float() * 2 - 1) * 1e4
    assert DiceLoss(per_sample=per_sample)(right, target).item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------ networks


@settings(quick, max_examples=25)
@given(st.data(), st.sampled_from([2, 3]), st.integers(1, 2), st.integers(0, 2), st.sampled_from(["none", "instance"]),
       st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_network_takes_any_size(draw, dims, channels, depth, norm, attention, dtype):
    size = draw.draw(st.lists(st.integers(2 if norm == "instance" else 1, 9), min_size=dims, max_size=dims))
    net = UNet(in_channels=channels, out_channels=2, dims=dims, width=2, depth=depth, norm="none" if
               min(size) < 2 * 2**depth else norm, attention=attention).to(dtype)
    x = torch.randn(1, channels, *size).to(dtype)
    logits = net(x)
    assert logits.shape == (1, 2, *size) and logits.dtype == dtype and torch.isfinite(logits).all()
    probability = net.predict(x)
    assert probability.dtype == torch.float32 and probability.min() >= 0 and probability.max() <= 1
    with pytest.raises(ValueError, match="this network takes"):
        net(x[0])


# ------------------------------------------------------------------------------------------- crop, pad and orientation


@quick
@given(arrays.array_shapes(min_dims=2, max_dims=4, max_side=9), st.lists(st.integers(1, 12), min_size=2, max_size=2))
def test_fit_there_and_back(shape, size):
    """What fits comes back as it was; what is cropped comes back in the centre, with zeros around it."""
    array = np.arange(1, 1 + np.prod(shape)).reshape(shape)
    there = data.fit(array, size)
    assert there.shape == (*shape[:-2], *size)
    back = data.fit(there, shape[-2:])
    assert back.shape == shape and ((back == array) | (back == 0)).all()
    assert (back != 0).sum() == np.prod(shape[:-2], dtype=int) * np.prod(np.minimum(shape[-2:], size))


@quick
@given(st.sampled_from(CODES), st.sampled_from([0, 1, 2]), arrays.array_shapes(min_dims=3, max_dims=3, max_side=6),
       st.lists(st.floats(0.2, 9), min_size=3, max_size=3), st.floats(-20, 20))
def test_restore_gives_back_the_array_of_the_file(codes, axis, shape, spacing, degrees):
    """Any of the 48 orientations, also oblique, any spacing, each slice axis: nothing is lost or moved."""
    turn = np.eye(4)
    a = np.deg2rad(degrees)
    turn[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    affine = turn @ nib.orientations.inv_ornt_aff(
        ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes)), shape) @ np.diag([*spacing, 1])
    stored = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        nib.save(nib.Nifti1Image(stored, affine), Path(folder, "a.nii"))
        scan = data.read_scan(Path(folder, "a.nii"), axis)
    assert np.array_equal(scan.restore(scan.array), stored)
    way = ornt_transform(nib.orientations.io_orientation(affine), axcodes2ornt(data.PLANES[axis]))
    assert np.array_equal(apply_orientation(stored, way), scan.array)
    assert sorted(scan.spacing) == pytest.approx(sorted(spacing), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ damaged files


def files():
    """Valid files of several kinds, as bytes with the ending of their name."""
    voxels = np.random.default_rng(0).integers(0, 2, (5, 4, 3))
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        for dtype in (np.uint8, np.int16, np.float32, np.float64):
            image = kind(voxels.astype(dtype), np.diag([1, 2, 3, 1]))
            if dtype is np.int16:
                image.header.set_slope_inter(2, -1)
                image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"anything"))
            content = image.to_bytes()
            yield ".nii", content
            yield ".nii.gz", gzip.compress(content)


# The largest and smallest int16, int32, int64; float32 infinity, NaN and the largest; 0; the smallest float32.
EXTREME = [bytes.fromhex(digits) for digits in ("ff7f", "0080", "ffff", "ffffff7f", "ffffffffffffff7f", "0000807f",
                                                "0000c07f", "ffff7f7f", "00000000", "01000000")]


def mutate(rng, content, ending):
    """Some bytes changed, cut off, inserted, or a field of the header overwritten, of the file or of what is zipped."""
    inside = ending == ".nii.gz" and rng.random() < 0.7
    content = bytearray(gzip.decompress(content) if inside else content)
    for _ in range(rng.integers(1, 4)):
        way, end = rng.integers(5), max(len(content), 1)
        where = int(rng.integers(min(end, 600) if rng.random() < 0.7 else end))  # mostly in the header
        if way == 0 and content:
            content[where] ^= 1 << int(rng.integers(8))
        elif way == 1:
            del content[where:]
        elif way == 2:
            content[where:where] = rng.bytes(int(rng.integers(1, 40)))
        elif way == 3:
            content[where : where + 8] = rng.bytes(8)
        else:  # a number that is extreme for some type, at the place of a field
            field, where = EXTREME[int(rng.integers(len(EXTREME)))], where // 2 * 2
            content[where : where + len(field)] = field
    return gzip.compress(bytes(content), 1) if inside else bytes(content)


def survive(folder, seed, mutations, until=None):
    """Read mutated files as scan and as label: how many were read, and how many refused; nothing else may happen."""
    rng, valid, counts = np.random.default_rng(seed), list(files()), {"read": 0, "refused": 0, "slowest": 0.0}
    nib.imageglobals.logger.setLevel("CRITICAL")  # it tells of every field that it corrects
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(mutations):
            if until and time.time() > until:
                break
            ending, content = valid[int(rng.integers(len(valid)))]
            path = Path(folder, f"a{ending}")
            path.write_bytes(mutate(rng, content, ending))
            begun = time.perf_counter()
            try:
                scan = data.read_scan(path, number % 3)
                assert np.isfinite(scan.array).all() and scan.restore(scan.array).shape == scan.source.shape
                data.read_mask(path, scan, number % 3)
                for kind in ("zscore", "percentile", "minmax"):
                    recipe = {"spacing": [None, 1, 1], "crop": 0, "normalise": kind}
                    assert np.isfinite(data.preprocess(scan.array, scan.spacing, recipe)).all()
                counts["read"] += 1
            except DataError as error:
                assert str(path) in str(error) or "spacing" in str(error) or "every voxel" in str(error)
                assert "\n" not in str(error)
                counts["refused"] += 1
            except BaseException:
                print(f"seed {seed}, mutation {number}: {path.read_bytes()[:1000]!r}", file=sys.stderr)
                raise
            counts["slowest"] = max(counts["slowest"], time.perf_counter() - begun)
    return counts


def test_mutated_files_raise_nothing_but_data_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_GB", 0.1)
    counts = survive(tmp_path, seed=0, mutations=1500)
    assert min(counts["read"], counts["refused"]) > 200 and counts["slowest"] < 5


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    data.MAX_GB = 0.1
    with tempfile.TemporaryDirectory() as folder:
        print(survive(folder, arguments.seed, 10**9, time.time() + 60 * arguments.minutes))
