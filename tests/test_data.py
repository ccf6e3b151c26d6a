"""The data path: files, orientation, preprocessing, cache, split, augmentation, check."""

import gzip
import json
import os
import subprocess
import sys
import time
import warnings
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from data import DataError

RECIPE = {"axis": 2, "label": None, "spacing": [None, 1.0, 1.0], "crop": 0, "normalise": "zscore"}


def affine_of(codes, spacing=(1.0, 2.0, 3.0)):
    """Affine of a file stored with axes towards `codes` and `spacing` along right, front, head."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, code in enumerate(codes):
        row = "LRPAIS".index(code) // 2
        affine[row, axis] = spacing[row] * (1 if code in "RAS" else -1)
    return affine


@pytest.fixture
def pairs(tmp_path, write_nifti):
    """Three sound scans of different sizes with masks, isotropic."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(12, 10, 6), (13, 11, 5), (9, 15, 7)]):
        mask = np.zeros(shape, np.uint8)
        mask[3:7, 3:7, 1:4] = 1
        image = rng.normal(100, 20, shape) + 80 * mask
        write_nifti(tmp_path / "set" / "imagesTr" / f"la_{i}.nii.gz", image.astype(np.int16))
        write_nifti(tmp_path / "set" / "labelsTr" / f"la_{i}.nii.gz", mask)
    return data.find_pairs(tmp_path / "set")


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(("images", "labels"), [("imagesTr", "labelsTr"), ("images", "labels")])
def test_layouts_and_hidden_files(tmp_path, write_nifti, images, labels):
    """macOS puts `._la_003.nii.gz` beside each file of the Decathlon archive; nnU-Net adds `_0000` to scans."""
    for name in ("b.nii.gz", "a_0000.nii"):
        write_nifti(tmp_path / images / name, np.zeros((2, 2, 2), np.uint8))
        (tmp_path / images / f"._{name}").write_bytes(b"not nifti")
        write_nifti(tmp_path / labels / name.replace("_0000", ""), np.zeros((2, 2, 2), np.uint8))
    pairs = data.find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a", "b"]
    assert pairs[0].image.name == "a_0000.nii" and pairs[0].label.name == "a.nii"
    assert [pair.name for pair in data.find_pairs(tmp_path, labels=False)] == ["a", "b"]
    assert [pair.name for pair in data.find_pairs(tmp_path / images, labels=False)] == ["a", "b"]


def test_missing_partners_are_named_on_both_sides(tmp_path, write_nifti):
    for folder, name in (("imagesTr", "only_scan"), ("labelsTr", "only_label"), ("imagesTr", "x"), ("labelsTr", "x")):
        write_nifti(tmp_path / folder / f"{name}.nii.gz", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(DataError, match=r"label in labelsTr/: only_scan.*scan in imagesTr/: only_label"):
        data.find_pairs(tmp_path)


def test_split_by_scan():
    names = [f"la_{i:03}" for i in range(17)]
    parts = [data.split_scans(names[::-1], 5, fold) for fold in range(5)]
    assert sorted(name for part in parts for name in part["val"]) == names  # each scan is validated on exactly once
    for part in parts:
        assert not set(part["train"]) & set(part["val"]) and sorted(part["train"] + part["val"]) == names
    assert data.split_scans(names, 5, "all") == {"train": names, "val": []}
    for folds, fold in ((5, 5), (5, -1), (18, 0), (1, 0)):
        with pytest.raises(DataError, match="expected"):
            data.split_scans(names, folds, fold)
    with pytest.raises(DataError, match="same name: a"):
        data.split_scans(["a", "b", "a"], 2, 0)


# --------------------------------------------------------------------------------------------------- scans and masks


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_all_48_orientations_come_upright_and_go_back(tmp_path, write_nifti, axis):
    """The same patient, stored in each of the 48 ways, reads as one array; what is written lies where it was."""
    patient = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)  # on axes R, A, S
    first = None
    for order in permutations(("LR", "PA", "IS")):
        for codes in product(*order):
            to_file = nib.orientations.ornt_transform(
                nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
            )
            stored = nib.orientations.apply_orientation(patient, to_file)
            path = write_nifti(tmp_path / "scan.nii", stored, affine_of(codes))
            scan = data.read_scan(path, axis)
            first = scan.array if first is None else first
            assert np.array_equal(scan.array, first)
            assert scan.spacing == {0: (1, 3, 2), 1: (2, 3, 1), 2: (3, 2, 1)}[axis]
            assert np.array_equal(scan.restore(scan.array), stored)
    # Upright: the first row is the head (of an axial slice the front); the first column the front (or the right).
    assert first[0, 0, 0] == {0: patient[-1, -1, -1], 1: patient[-1, -1, -1], 2: patient[-1, -1, 0]}[axis]
    assert first[0, 0, -1] == {0: patient[-1, 0, -1], 1: patient[0, -1, -1], 2: patient[0, -1, 0]}[axis]
    assert first[0, -1, 0] == {0: patient[-1, -1, 0], 1: patient[-1, -1, 0], 2: patient[-1, 0, 0]}[axis]


def test_coarsest_axis_is_the_slice_axis(tmp_path, write_nifti):
    for i, spacing in enumerate([(4, 1, 1), (5, 1, 1), (1, 1, 9)]):
        write_nifti(tmp_path / "images" / f"{i}.nii", np.zeros((3, 3, 3), np.uint8), affine_of("LPS", spacing))
    spacing = data.survey(data.find_pairs(tmp_path, labels=False))
    assert spacing == (4, 1, 1) and data.slice_axis(spacing) == 0
    assert data.slice_axis((1, 1, 1)) == 2  # a tie goes to inferior-superior


def test_nan_and_infinity_are_repaired_and_told(tmp_path, write_nifti):
    voxels = np.ones((3, 3, 3), np.float32)
    voxels[0, 0, 0], voxels[1, 1, 1], voxels[2, 2, 2] = np.nan, np.inf, -7
    with pytest.warns(UserWarning, match="2 voxels"):
        scan = data.read_scan(write_nifti(tmp_path / "a.nii", voxels))
    assert np.isfinite(scan.array).all() and scan.array.min() == -7 and (scan.array == -7).sum() == 3


@pytest.mark.parametrize(
    ("values", "label", "foreground"),
    [([0, 1], None, [1]), ([0, 255], None, [255]), ([0, 1, 2, 3], None, [1, 2, 3]), ([0, 1, 2, 3], [2, 3], [2, 3])],
)
def test_label_rule(tmp_path, write_nifti, values, label, foreground):
    stored = np.resize(values, (4, 4, 4)).astype(np.float32)
    scan = data.read_scan(write_nifti(tmp_path / "scan.nii", np.zeros((4, 4, 4), np.uint8)))
    mask = data.read_mask(write_nifti(tmp_path / "label.nii", stored), scan, label=label)
    assert mask.dtype == np.uint8 and np.array_equal(scan.restore(mask), np.isin(stored, foreground))


@pytest.mark.parametrize("values", [[0, 0.5], [0, -1], [0, 1.001]])
def test_labels_that_are_no_labels_raise_with_file_and_values(tmp_path, write_nifti, values):
    scan = data.read_scan(write_nifti(tmp_path / "scan.nii", np.zeros((4, 4, 4), np.uint8)))
    path = write_nifti(tmp_path / "label.nii", np.resize(values, (4, 4, 4)).astype(np.float32))
    with pytest.raises(DataError, match=f"label.nii: values are .*{values[1]}"):
        data.read_mask(path, scan)


def test_label_geometry(tmp_path, write_nifti):
    scan = data.read_scan(write_nifti(tmp_path / "scan.nii", np.zeros((4, 4, 4), np.uint8)))
    for off, expected in ((0, None), (1e-5, "warn"), (5, "raise")):
        affine = np.eye(4)
        affine[0, 3] = off
        path = write_nifti(tmp_path / f"{off}.nii", np.zeros((4, 4, 4), np.uint8), affine)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if expected == "raise":
                with pytest.raises(DataError, match="differs from its scan's by 5 mm"):
                    data.read_mask(path, scan)
            else:
                data.read_mask(path, scan)
        assert len(told) == (expected == "warn")
    with pytest.raises(DataError, match=r"shape is \(4, 4, 5\), its scan's is \(4, 4, 4\)"):
        data.read_mask(write_nifti(tmp_path / "b.nii", np.zeros((4, 4, 5), np.uint8)), scan)


def test_files_that_are_no_scan(tmp_path, write_nifti):
    noise = np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)
    good = write_nifti(tmp_path / "good.nii.gz", noise)
    (tmp_path / "cut.nii.gz").write_bytes(good.read_bytes()[:4000])
    (tmp_path / "text.nii").write_text("hello" * 200)
    (tmp_path / "noise.nii.gz").write_bytes(os.urandom(2000))
    write_nifti(tmp_path / "four.nii", np.zeros((3, 3, 3, 2), np.uint8))
    write_nifti(tmp_path / "flat.nii", np.zeros((3, 3), np.uint8))
    write_nifti(tmp_path / "complex.nii", np.zeros((3, 3, 3), np.complex64))
    write_nifti(tmp_path / "nan.nii", np.full((3, 3, 3), np.nan, np.float32))
    for name in ("cut.nii.gz", "noise.nii.gz", "text.nii", "four.nii", "flat.nii", "complex.nii", "nan.nii", "no.nii"):
        with pytest.raises(DataError, match=name):
            data.read_scan(tmp_path / name)
    assert data.read_scan(write_nifti(tmp_path / "one.nii", np.zeros((3, 4, 5, 1), np.uint8))).array.shape == (5, 4, 3)


# --------------------------------------------------------------------------------------------------------- preprocess


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (3.0, 1.6, 1.6), (3.0, 0.7, 0.9)])
@pytest.mark.parametrize("crop", [0, 3])
def test_undo_preprocess_puts_a_mask_back(spacing, crop):
    """A ball, sent through and back at any spacing, is itself up to its rim."""
    d, h, w = np.mgrid[:9, :31, :41]
    ball = ((d - 4) ** 2 * 4 + (h - 15) ** 2 + (w - 20) ** 2 < 64).astype(np.uint8)
    recipe = RECIPE | {"crop": crop}
    seen = data.preprocess(ball, spacing, recipe)
    assert seen.dtype == np.uint8 and set(np.unique(seen)) == {0, 1}
    back = data.undo_preprocess(seen.astype(np.float32), ball.shape, recipe) > 0.5
    assert 2 * (back & (ball > 0)).sum() / (back.sum() + ball.sum()) > (0.93 if spacing[1] != 1 else 0.9999)


def test_normalisation():
    rng = np.random.default_rng(0)
    scan = rng.gamma(2, 50, (6, 20, 20)).astype(np.float32)
    scan[0, 0, 0] = 1e5  # one bright voxel, as in many scans
    z, p, m = (data.preprocess(scan, (1, 1, 1), RECIPE | {"normalise": n}) for n in ("zscore", "percentile", "minmax"))
    assert z.dtype == p.dtype == m.dtype == np.float16
    assert abs(z.mean(dtype=float)) < 1e-2 and abs(z.std(dtype=float) - 1) < 1e-2
    assert p.max() < 6 < z.max() and abs(p.std(dtype=float) - 1) < 1e-2
    assert m.min() == 0 and m.max() == 1
    with pytest.raises(DataError, match="every voxel is 3"):
        data.preprocess(np.full((2, 4, 4), 3, np.float32), (1, 1, 1), RECIPE)
    with pytest.raises(DataError, match="--crop 10"):
        data.preprocess(scan, (1, 1, 1), RECIPE | {"crop": 10})


def test_fit_centres():
    array = np.arange(20).reshape(4, 5) + 1
    assert np.array_equal(data.fit(array, (4, 5)), array)
    assert np.array_equal(data.fit(array, (2, 3)), array[1:3, 1:4])
    padded = data.fit(array, (6, 3))
    assert np.array_equal(padded[1:5], array[:, 1:4]) and not padded[[0, 5]].any()
    assert data.fit(array[None, None], (7, 2)).shape == (1, 1, 7, 2)


# -------------------------------------------------------------------------------------------------------------- cache


def test_cache_second_start_reads_no_nifti(pairs, tmp_path, monkeypatch):
    first = data.cache_scans(pairs, RECIPE, tmp_path / "cache")
    spacing = data.survey(pairs, tmp_path / "cache")
    monkeypatch.setattr(nib, "load", lambda path: pytest.fail(f"{path} was read"))
    assert data.cache_scans(pairs, RECIPE, tmp_path / "cache") == first
    assert data.survey(pairs, tmp_path / "cache") == spacing
    for scan, pair in zip(first, pairs, strict=True):
        image, mask = np.load(scan.image, mmap_mode="r"), np.load(scan.mask, mmap_mode="r")
        assert image.dtype == np.float16 and mask.dtype == np.uint8 and image.shape == mask.shape
        assert scan.name == pair.name and list(scan.foreground) == mask.sum(axis=(1, 2)).tolist()


def test_cache_stale_or_damaged_is_rebuilt(pairs, tmp_path, write_nifti):
    scans = data.cache_scans(pairs, RECIPE, tmp_path / "cache")
    whole = np.load(scans[0].image)
    scans[0].image.write_bytes(scans[0].image.read_bytes()[:300])  # cut short
    assert np.array_equal(np.load(data.cache_scan(pairs[0], RECIPE, tmp_path / "cache").image), whole)
    scans[0].mask.unlink()
    assert data.cache_scan(pairs[0], RECIPE, tmp_path / "cache").mask.exists()
    assert data.cache_scan(pairs[0], RECIPE | {"normalise": "minmax"}, tmp_path / "cache").image != scans[0].image
    mask = np.zeros((12, 10, 6), np.uint8)
    mask[:2] = 1
    time.sleep(0.01)  # so that the time of the change differs, should the clock be coarse
    write_nifti(pairs[0].label, mask)
    assert np.load(data.cache_scan(pairs[0], RECIPE, tmp_path / "cache").mask).sum() == 2 * 10 * 6
    assert not list((tmp_path / "cache").glob("*.tmp"))


START_AT = """
import sys, time, data
time.sleep(max(float(sys.argv[3]) - time.time(), 0))  # imports take seconds; both begin at the same moment
recipe = {"axis": 2, "label": None, "spacing": [None, 1.0, 1.0], "crop": 0, "normalise": "zscore"}
pairs = data.find_pairs(sys.argv[1])
for i in range(20):
    for scan in data.cache_scans(pairs, recipe | {"crop": i % 4}, sys.argv[2]):
        data.np.load(scan.image), data.np.load(scan.truth)
    data.survey(pairs, sys.argv[2])
"""


def test_two_runs_may_fill_one_cold_cache(pairs, tmp_path):
    """At once, with temporary names that do not meet even where two containers give both processes the same number."""
    root, cache = pairs[0].image.parents[1], tmp_path / "cache"
    code = "import os; os.getpid = lambda: 7\n" + START_AT
    command = [sys.executable, "-c", code, str(root), str(cache), str(time.time() + 6)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate()[1] for run in runs] == ["", ""] and [run.returncode for run in runs] == [0, 0]
    shared, alone = (data.cache_scans(pairs, RECIPE, folder) for folder in (cache, tmp_path / "alone"))
    for a, b in zip(shared, alone, strict=True):
        for kind in ("image", "mask", "truth"):
            assert np.array_equal(np.load(getattr(a, kind)), np.load(getattr(b, kind)))
    assert not list(cache.glob(".*"))


def test_a_file_that_changes_but_keeps_its_size_and_time_is_read_again(pairs, tmp_path):
    """`cp -p`, `rsync -t` and archives set the time of a file to what it was elsewhere."""
    path, content = pairs[0].label, bytearray(gzip.decompress(pairs[0].label.read_bytes()))
    path.write_bytes(gzip.compress(content, 0))  # stored, not packed: the size stays when a voxel changes
    before, status = np.load(data.cache_scan(pairs[0], RECIPE, tmp_path / "cache").mask), path.stat()
    content[-1] ^= 1
    time.sleep(0.01)  # the clock of the file system may be coarse
    path.write_bytes(gzip.compress(content, 0))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    after = np.load(data.cache_scan(pairs[0], RECIPE, tmp_path / "cache").mask)
    assert (before != after).sum() == 1


def test_two_data_sets_of_the_same_names_share_a_cache(tmp_path, write_nifti):
    """The same name, size and time, as unpacked from an archive, are not the same file."""
    counts = []
    for name in ("one", "two"):
        voxels = np.zeros((4, 4, 4), np.uint8)
        voxels[:2] = 1
        files = [write_nifti(tmp_path / name / "imagesTr" / "la.nii", voxels),
                 write_nifti(tmp_path / name / "labelsTr" / "la.nii", voxels * (name == "two"))]
        for file in files:
            os.utime(file, ns=(10**18, 10**18))
        (scan,) = data.cache_scans(data.find_pairs(tmp_path / name), RECIPE, tmp_path / "cache")
        counts.append(int(np.load(scan.mask).sum()))
    assert counts == [0, 32]


def test_every_file_of_the_cache_may_be_cut_short_at_any_byte(pairs, tmp_path):
    """By a full disk or a lost node: the index, the arrays and the survey are made anew."""
    folder = tmp_path / "cache"
    first, spacing = data.cache_scan(pairs[0], RECIPE, folder), data.survey(pairs[:1], folder)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 4  # image, mask, index, survey
    for path, content in whole.items():
        for length in {0, 1, 9, 10, 100, 128, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            assert data.cache_scan(pairs[0], RECIPE, folder) == first
            assert data.survey(pairs[:1], folder) == spacing
            assert path.read_bytes() == content


def test_a_write_that_fails_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("former")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        data.write_atomically(path, fail)
    assert path.read_text() == "former" and os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------------- augmentation


@pytest.fixture
def scans(pairs, tmp_path):
    return data.cache_scans(pairs, RECIPE, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["seed", "full"])
def test_image_and_mask_move_together(kind):
    """A bright disc is its own mask; wherever augmentation takes it, it stays so."""
    h, w = np.mgrid[:96, :80]
    mask = ((h - 40) ** 2 + (w - 45) ** 2 < 200).astype(np.uint8)
    image, augment = mask * 4.0 - 2, data.augmenter(kind)
    for entropy in range(10):
        moved, moved_mask = augment(image.astype(np.float32), mask, entropy)
        assert moved.dtype == np.float32 and moved_mask.dtype == np.uint8 and set(np.unique(moved_mask)) <= {0, 1}
        assert not np.array_equal(moved_mask, mask)
        bright = moved > 0.5
        assert 2 * (bright & (moved_mask > 0)).sum() / (bright.sum() + moved_mask.sum()) > 0.9


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_samples_depend_on_seed_epoch_and_index_only(scans):
    """The trap of imgaug in workers: one global generator, copied by fork, gave all workers the same slices."""
    dataset = data.SliceDataset(scans, (16, 16), augment="full", seed=3)

    def epoch_of(**options):
        loader = DataLoader(dataset, 4, **options)
        return torch.cat([torch.cat(batch, 1) for batch in loader])

    dataset.set_epoch(1)
    alone = epoch_of()
    for workers, context in ((1, "fork"), (4, "fork"), (2, "spawn")):
        assert torch.equal(epoch_of(num_workers=workers, multiprocessing_context=context), alone)
    assert torch.equal(alone[5], torch.cat(dataset[5]))
    dataset.set_epoch(2)
    changed = epoch_of()
    assert all(not torch.equal(a, b) for a, b in zip(alone, changed, strict=True))
    other = data.SliceDataset(scans, (16, 16), augment="full", seed=4)
    other.set_epoch(2)
    assert not torch.equal(torch.cat(other[5]), changed[5])


def test_living_workers_see_the_epoch_change(scans):
    dataset = data.SliceDataset(scans, (16, 16), augment="seed")
    loader = DataLoader(dataset, 4, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        seen.append(torch.cat([image for image, _ in loader]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_samples_without_augmentation_are_the_cached_slices(scans):
    dataset = data.SliceDataset(scans, (20, 20))
    assert len(dataset) == 6 + 5 + 7
    image, mask = dataset[6 + 2]  # scan 1, slice 2
    assert image.shape == mask.shape == (1, 20, 20) and image.dtype == mask.dtype == torch.float32
    assert np.array_equal(mask[0], data.fit(np.load(scans[1].mask)[2], (20, 20)))
    assert np.array_equal(image[0], data.fit(np.load(scans[1].image)[2], (20, 20)).astype(np.float32))


def test_neighbours_are_channels_and_repeat_at_the_ends(scans):
    dataset, image = data.SliceDataset(scans, (10, 12), neighbours=1), np.load(scans[0].image)
    for d, around in ((0, [0, 0, 1]), (2, [1, 2, 3]), (5, [4, 5, 5])):
        sample, mask = dataset[d]
        assert np.array_equal(sample, image[around].astype(np.float32))
        assert np.array_equal(mask[0], np.load(scans[0].mask)[d])


def test_patches_are_pieces_of_scans_and_a_share_of_them_is_centred_on_the_organ(scans):
    image, mask = np.load(scans[0].image).astype(np.float32), np.load(scans[0].mask)
    pieces = {image[d:, h:, w:][:3, :4, :4].tobytes() for d in range(4) for h in range(7) for w in range(9)}
    dataset = data.PatchDataset(scans[:1], (3, 4, 4), foreground=0.0)
    assert len(dataset) == -(-mask.size // 48)  # an epoch sees about all voxels
    drawn = [dataset[i] for i in range(len(dataset))]
    assert all(x.shape == y.shape == (1, 3, 4, 4) and x[0].numpy().tobytes() in pieces for x, y in drawn)
    assert len({x.numpy().tobytes() for x, _ in drawn}) > 5
    dataset = data.PatchDataset(scans[:1], (1, 1, 1), foreground=1.0)  # nothing but the centre
    assert all(dataset[i][1] == 1 for i in range(20))
    assert data.PatchDataset(scans[:1], (9, 16, 16))[0][0].shape == (1, 9, 16, 16)  # larger than the scan: padded


def test_patches_depend_on_seed_epoch_and_index_only(scans):
    dataset = data.PatchDataset(scans, (4, 8, 8), augment="full", seed=3)
    dataset.set_epoch(1)
    first = torch.cat([image for image, _ in DataLoader(dataset, 4)])
    for options in ({"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}):
        assert torch.equal(first, torch.cat([image for image, _ in DataLoader(dataset, 4, **options)]))
    dataset.set_epoch(2)
    assert not torch.equal(first[0], dataset[0][0])


def test_all_slices_of_a_patch_are_warped_alike():
    """Equal slices stay equal, but for the noise; and a slice is warped as it would be alone."""
    h, w = np.mgrid[:48, :40]
    disc = ((h - 20) ** 2 + (w - 25) ** 2 < 90).astype(np.uint8)
    image, augment = disc * 4.0 - 2, data.augmenter("seed")
    stack, stacked_mask = augment(np.float32([image] * 40), np.stack([disc] * 40), 5)
    alone, mask = augment(image.astype(np.float32), disc, 5)
    assert all(np.array_equal(a, alone) for a in stack) and all(np.array_equal(a, mask) for a in stacked_mask)
    assert not np.array_equal(mask, disc)


def test_missing_library_of_opencv_is_explained(tmp_path):
    """A server without libGL.so.1: OpenCV does not load, imgaug neither; the message says what to install."""
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    code = "import data\ntry: data.augmenter('seed')\nexcept data.DataError as error: print(error)"
    path = os.pathsep.join([str(tmp_path), str(Path(data.__file__).parent)])
    env = os.environ | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "apt-get install libgl1" in run.stdout and "--augment none" in run.stdout


# ---------------------------------------------------------------------------------------------------- data-set check


def test_check_of_a_sound_set(pairs, capsys):
    assert data.main([str(pairs[0].image.parents[1])]) == 0
    out = capsys.readouterr().out
    assert "la_0" in out and "6 x 10 x 12" in out and "3 scans read, 0 problems" in out


def test_check_names_every_problem(pairs, tmp_path, write_nifti, capsys):
    root = pairs[0].image.parents[1]
    shape = (4, 4, 4)
    broken = {
        "empty": (np.eye(4)[..., None].repeat(4, 2), np.zeros(shape)),
        "constant": (np.ones(shape), np.ones(shape)),
        "negative": (np.eye(4)[..., None].repeat(4, 2), -np.ones(shape)),
        "shape": (np.eye(4)[..., None].repeat(4, 2), np.ones((4, 4, 5))),
    }
    for name, (image, mask) in broken.items():
        write_nifti(root / "imagesTr" / f"{name}.nii.gz", image.astype(np.float32))
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", mask.astype(np.float32))
    (root / "imagesTr" / "text.nii").write_text("x" * 999)
    write_nifti(root / "labelsTr" / "text.nii", np.ones(shape, np.uint8))
    write_nifti(root / "labelsTr" / "alone.nii", np.ones(shape, np.uint8))
    assert data.main([str(root)]) == 2
    told = capsys.readouterr().err
    for name in (*broken, "text", "alone"):
        assert name in told
    assert told.count("\n") == 6
    assert data.main([str(tmp_path / "nowhere")]) == 2 and "nowhere" in capsys.readouterr().err


def test_index_of_the_cache_is_plain_json(scans):
    for index in scans[0].image.parent.glob("la_*.json"):
        assert set(json.loads(index.read_text())) == {"image", "mask", "truth", "spacing", "foreground"}
