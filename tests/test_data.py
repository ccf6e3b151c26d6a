"""The way of the data: orientation, masks, preprocessing, cache, augmentation, samples."""

import gzip
import multiprocessing
import os
import pickle
import signal
import threading
import time
from itertools import count, permutations, product
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import HOW
from nibabel.orientations import axcodes2ornt, ornt_transform
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch.utils.data import DataLoader

import data
from metrics import dice

CODES = ["".join(codes) for order in permutations(("LR", "PA", "IS")) for codes in product(*order)]
fork = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")  # Windows has spawn alone


def stored_as(codes, array, spacing, turn=("z", 0), form=(1, 0)):
    """A patient's array on axes R, A, S as a file on axes `codes` holds it, turned by degrees. Form: the header's codes
    of sform and qform, which say where the affine stands."""
    affine = nib.affines.from_matvec(Rotation.from_euler(*turn, degrees=True).as_matrix() @ np.diag(spacing))
    image = nib.Nifti1Image(array, affine).as_reoriented(ornt_transform(*map(axcodes2ornt, ("RAS", codes))))
    image.header["sform_code"], image.header["qform_code"] = form
    return image


def kinds(scan):
    return [scan.open(kind) for kind in ("image", "mask", "truth")]


def exit_codes(number, target, *args):
    processes = [fork.Process(target=target, args=args, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.fixture
def pairs(tmp_path, write_nifti):
    """Three sound scans of different sizes with masks, slices 2 mm apart."""
    rng, affine = np.random.default_rng(0), np.diag([1, 1, 2, 1])
    for i, shape in enumerate([(12, 12, 6), (13, 11, 5), (9, 15, 7)]):
        mask = np.zeros(shape, np.uint8)
        mask[4:8, 4:8, 1:4] = 1
        for kind, array in (("images", np.int16(rng.normal(100, 20, shape) + 80 * mask)), ("labels", mask)):
            write_nifti(tmp_path / f"set/{kind}Tr/la_{i}.nii.gz", array, affine)
    return data.find_pairs(tmp_path / "set")


@pytest.fixture
def scans(pairs, tmp_path):
    return data.cache_scans(pairs, HOW, tmp_path / "cache")


def test_split_by_patient():
    """Ten thousand scans in a moment: each name was looked for among all, for seconds."""
    names = [f"la_{i:03}" for i in range(17)]
    parts = [data.split_scans(names[::-1], 5, fold) for fold in range(5)]  # the order of the files does not matter
    assert [part["val"] for part in parts] == [names[fold::5] for fold in range(5)]  # each is validated on exactly once
    assert all(sorted(part["train"] + part["val"]) == names for part in parts)
    files, begun = [Path(f"patient_{i:05}.nii.gz") for i in range(10_000)], time.perf_counter()
    assert len(data.split_scans(list(data.by_name(files)), 5, 1)["train"]) == 8_000 and time.perf_counter() - begun < 1


@pytest.mark.filterwarnings("ignore:.*the affine differs:UserWarning")  # by 1e-8 mm
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("turn", "ways"), [(("z", 0), CODES), (("xz", (17, -12)), CODES),
                                            *(((about, by), ["LPS"]) for about in "xyz" for by in (45, 135, 225, 315))])
def test_all_48_orientations_come_upright_and_go_back_and_labels_with_them(tmp_path, axis, turn, ways):
    """No voxel is changed, oblique or not. Of a scan with an sform alone and a label with a qform, or stored otherwise,
    the label was refused; at 45 degrees a last digit decided which axis is the closest of each."""
    patient = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)  # on axes R, A, S
    spacing, organ = np.array((0.7, 0.9, 4.0)), np.random.default_rng(0).integers(0, 2, patient.shape, np.uint8)
    order = [(0, 2, 1), (1, 2, 0), (2, 1, 0)][axis]  # D, H, W
    expected = patient.transpose(order)[:: 1 if axis == 2 else -1, ::-1, ::-1]
    for codes, form in product(ways, ((1, 0), (0, 1))):
        stored = stored_as(codes, patient, spacing, turn, form)
        nib.save(stored, tmp_path / "scan.nii")
        nib.save(stored_as("LPS", organ, spacing, turn, form[::-1]), tmp_path / "label.nii")
        scan = data.read_scan(tmp_path / "scan.nii", axis)
        assert np.array_equal(scan.restore(scan.array), stored.dataobj), codes
        with pytest.raises(ValueError, match="the scan's is"):  # as many voxels: a scrambled mask was written
            scan.restore(scan.array.transpose(1, 2, 0))
        if ways is CODES:  # else two orientations are equally close
            assert np.array_equal(scan.array, expected), codes
            assert scan.spacing == pytest.approx(spacing[list(order)], abs=1e-5)
        mask = data.read_mask(tmp_path / "label.nii", scan)
        assert np.array_equal(mask, organ.flat[scan.array.astype(int)]), codes


def test_the_coarsest_axis_is_the_slice_axis(pairs):
    for pair, spacing in zip(pairs, [(4, 1, 1), (5, 1, 1), (1, 1, 9)], strict=True):
        nib.save(stored_as("PSL", np.zeros((3, 3, 3), np.uint8), spacing), pair.image)
    assert data.survey(pairs) == ([4, 1, 1], 3)
    assert data.slice_axis([4, 1, 1]) == 0 and data.slice_axis([1, 1, 1]) == 2  # a tie: inferior-superior


def test_nan_and_infinity_of_a_scan_become_the_lowest_voxel(tmp_path, write_nifti):
    path = write_nifti(tmp_path / "a.nii", np.resize(np.float32([np.nan, np.inf, -np.inf, -7, 1]), (5, 5, 5)))
    with pytest.warns(UserWarning, match="a.nii: 75 voxels are NaN or infinite; set to the lowest"):
        values, counts = np.unique(data.read_scan(path).array, return_counts=True)
    assert values.tolist() == [-7, 1] and counts.tolist() == [100, 25]


@pytest.mark.parametrize(("values", "dtype", "label", "expected"), [
    ([0, 1, 2, 255], "u1", None, [1, 2, 255]), ([0, 1, 2, 3], "f4", [2, 3], [2, 3]), ([0, 255], "u1", [1], []),
    *(([0, 2**24, 2**24 + 1], dtype, [2**24 + 1], [2**24 + 1]) for dtype in ("i4", "f8")),
    # Other programs write 1.00002 for 1: told, and rounded.
    ([0, 1.00002, 1.995, 0.004, -0.004], "f4", None, np.float32([1.00002, 1.995])),
    ([0, 1.00002, 1.995, 0.004, -0.004], "f4", [2], np.float32([1.995])),
])
def test_which_values_are_foreground(tmp_path, write_nifti, recwarn, values, dtype, label, expected):
    """int32 labels beyond 2^24 went through float32: `--label 16777217` found nothing."""
    stored = np.resize(values, (4, 4, 4)).astype(dtype)
    scan = data.read_scan(write_nifti(tmp_path / "scan.nii", np.zeros((4, 4, 4), np.uint8)))
    mask = data.read_mask(write_nifti(tmp_path / "label.nii", stored), scan, label)
    assert any("rounded" in str(warning.message) for warning in recwarn) == (1.995 in values)
    assert mask.dtype == np.uint8 and np.array_equal(scan.restore(mask), np.isin(stored, expected))


@pytest.mark.parametrize(("spacing", "crop"), [*product([(3, 1, 1), (3, 1.6, 1.6), (3, 0.5, 0.9)], (0, 3))])
def test_undo_preprocess_puts_a_mask_back_without_a_shift(spacing, crop):
    """A ball, there and back at any spacing, is itself up to its rim; nearest neighbour moved it by half a voxel."""
    d, h, w = np.mgrid[:9, :32, :42]
    ball = ((d - 4) ** 2 * 4 + (h - 15) ** 2 + (w - 20) ** 2 < 64).astype(np.uint8)
    how = HOW | {"crop": crop}
    seen = data.preprocess(ball[::-1], spacing, how)  # the same ball, with a negative stride
    assert seen.dtype == np.uint8 and set(np.unique(seen)) == {0, 1}
    whole = np.pad(seen, ((0, 0), (crop, crop), (crop, crop)))
    centre, expected = ((np.array(ndimage.center_of_mass(mask)) + 0.5) / mask.shape for mask in (whole, ball))
    assert centre == pytest.approx(expected, abs=0.002)
    back = data.undo_preprocess(seen.astype(np.float32), ball.shape, how) > 0.5
    assert dice(back, ball > 0) > (0.92 if spacing[1] != 1 else 0.9999)


def test_normalisation():
    def made(array, kind):
        return data.preprocess(array, (1, 1, 1), HOW | {"normalise": kind}, "a.nii")

    rng, shape, kinds = np.random.default_rng(0), (6, 20, 20), ("zscore", "percentile", "minmax")
    dark, scan, noise = map(np.float32, (np.zeros(shape), rng.gamma(2, 50, shape), rng.uniform(-1, 1, shape)))
    scan[0, 0, 0] = 1e5  # one bright voxel, as in many scans
    dark[0, 0, :4] = 9
    z, p, m = (made(scan, kind) for kind in kinds)
    assert z.dtype == p.dtype == m.dtype == np.float16
    assert abs(z.mean(dtype=float)) < 1e-2 and abs(z.std(dtype=float) - 1) < 1e-2
    assert p.max() < 6 < z.max() and abs(p.std(dtype=float) - 1) < 1e-2
    assert m.min() == 0 and m.max() == 1 and made(dark, "zscore").max() > 1
    for scale, kind in product((1e-9, 1e9), kinds):
        assert made(noise * scale, kind).std(dtype=float) == pytest.approx(0.29 if kind == "minmax" else 1, abs=0.02)
    for array, kind, told in [
        (dark, "none", r"float32 \(6, 20, 20\), none; expected"), (dark * 0, "zscore", "every voxel is 0; remove"),
        (dark[0], "minmax", r"float32 \(20, 20\), minmax; expected \(D"),
        (dark, "percentile", "more than 99 % of the voxels are 0.*--normalise zscore"),  # "every voxel is 0" was untrue
        # Two labels, resampled, became one; a bool mask was z-scored.
        (np.uint8(dark), "zscore", "uint8 .*values to 9; a mask is 0 or 1"), (dark > 0, "zscore", "bool .* expected"),
        # Their squares vanish in float32, or are infinite: the scan became infinities, or zeros, without a word.
        *((noise * scale, kind, "voxels are.*scale") for scale in (1e-40, 1e-25, 1e25, 3e38) for kind in kinds),
    ]:
        with pytest.raises(ValueError, match=f"^a.nii: {told}"):
            made(array, kind)


def test_crop_or_pad_about_the_centre():
    assert data.crop_or_pad(np.arange(5)[None] + 1, (3, 3)).tolist() == [[0, 0, 0], [2, 3, 4], [0, 0, 0]]
    for shape, size in product(product((3, 4, 7, 8), repeat=2), product((3, 6, 9), repeat=2)):  # there and back
        array = np.arange(1, 1 + np.prod(shape)).reshape(shape)
        back = data.crop_or_pad(data.crop_or_pad(array, size), shape)
        assert ((back == array) | (back == 0)).all() and (back > 0).sum() == np.prod(np.minimum(shape, size))


def test_a_warm_cache_holds_what_it_says_and_is_only_read(pairs, tmp_path, monkeypatch, write_nifti):
    """Another user's, read-only, ended the run. A mask that, resampled and cropped, had its file's shape was taken for
    the truth. And to parse a .npy file in a thread fails at random on some versions of Python."""
    def in_the_main_thread(*args, load=np.load, **options):
        assert threading.current_thread() is threading.main_thread()
        return load(*args, **options)

    def scans():
        with pytest.warns(UserWarning, match="^1 of 3 scans hold no voxel of label 1: la_1$"):  # each time
            return data.cache_scans(pairs, how, cache)

    def changed():
        return {path: path.stat().st_ctime_ns for path in (cache, *cache.rglob("*"))}

    how = HOW | {"label": [1], "spacing": [None, 2 / 3, 2 / 3], "crop": 3}  # 12 voxels are 18, and then 12
    cache = tmp_path / "cache"
    write_nifti(pairs[1].label, 2 * np.asarray(nib.load(pairs[1].label).dataobj), np.diag([1, 1, 2, 1]))
    monkeypatch.setattr(np, "load", in_the_main_thread)
    first = scans()
    (cache / ".stale.tmp").touch()
    before = changed()
    time.sleep(0.01)  # the clock of the file system may be coarse
    monkeypatch.setattr(nib, "load", Mock(side_effect=AssertionError))
    assert scans() == first and [scan.name for scan in first] == [pair.name for pair in pairs] and changed() == before
    for scan, voxels in zip(first, (16, 0, 16), strict=True):  # in each of 3 slices
        image, mask, truth = kinds(scan)
        assert image.dtype == np.float16 and mask.dtype == truth.dtype == np.uint8 and image.shape == mask.shape
        assert scan.open("spacing").tolist() == [2, 1, 1] and truth.sum() == 3 * voxels
    image, mask, truth = kinds(first[0])
    assert mask.shape == truth.shape and mask.sum() == 3 * 36 and image[mask > 0].mean() > image.mean() + 1


def test_other_preprocessing_code_or_another_file_is_another_entry(pairs, tmp_path, monkeypatch):
    """Also a file that keeps its size and time: `cp -p`, `rsync -t` and archives set that to what it was elsewhere."""
    def entry(**change):
        return data.cache_scan(pairs[0], HOW | change, tmp_path / "cache")

    path, content = pairs[0].label, gzip.decompress(pairs[0].label.read_bytes())
    path.write_bytes(gzip.compress(content, 0))  # stored, not packed: the size stays when a voxel changes
    first, status = entry(), path.stat()
    for change in ({"normalise": "minmax"}, {"crop": 1}, {"axis": 0}, {"label": [2]}, {"spacing": [None, 0.5, 0.5]}):
        assert not all(map(np.array_equal, kinds(first), kinds(entry(**change)))), change
    time.sleep(0.01)  # the clock of the file system may be coarse
    path.write_bytes(gzip.compress(content[:-1] + b"\1", 0))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    assert (first.open("mask") != (second := entry()).open("mask")).sum() == 1
    monkeypatch.setattr(data, "CODE", "changed by hand")  # after which old arrays were trained on
    assert entry() != second


def test_three_runs_at_once_and_one_that_is_killed_fill_one_cold_cache(pairs, scans, tmp_path, monkeypatch):
    """Killed after each of five arrays, the last time before the renaming, it leaves no half entry; the others get
    whole arrays, and leave nothing else. The user's own `.mine.tmp` was swept."""
    def run(cache, pairs, fatal=None):
        def save(*args, save=np.save):
            save(*args)
            if next(events) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        events, np.save = count(), save  # in this process, which ends here
        if fatal is None:
            together.wait(30)
        for scan, right in zip(data.cache_scans(pairs, HOW, cache), scans, strict=True):
            assert all(map(np.array_equal, kinds(scan), kinds(right)))

    together = fork.Barrier(3)
    for moment in range(5):
        (cache := tmp_path / str(moment)).mkdir()
        (cache / ".mine.tmp").touch()
        assert exit_codes(1, run, cache, pairs[:1], moment) == [-signal.SIGKILL] and not list(cache.glob("la_0*"))
        assert exit_codes(3, run, cache, pairs) == [0, 0, 0] and len(list(cache.glob("la_*"))) == 3
        assert (cache / ".mine.tmp").exists() and len(list(cache.glob(".*"))) == 2  # and what the kill left
    monkeypatch.setattr(Path, "rename", Mock(side_effect=PermissionError))
    with pytest.raises(data.DataError, match="could not be written; choose another --cache"):
        data.cache_scan(pairs[1], HOW, tmp_path / "other")


def test_a_cold_cache_holds_few_scans_and_few_bytes_a_voxel(pairs, tmp_path, write_nifti, monkeypatch, traced):
    """It held a scan a core, at 27 bytes a voxel: 2.9 GB on 16 cores."""
    def slowly(*args):
        readers.add(threading.get_ident())
        time.sleep(0.02)
        return read(*args)

    rng, read, readers = np.random.default_rng(0), data.read_scan, set()
    for path, high in ((pairs[0].image, 200), (pairs[0].label, 2)):
        write_nifti(path, rng.integers(0, high, (96, 96, 48), np.uint8))
    data.cache_scan(pairs[0], HOW | {"normalise": "percentile"}, tmp_path / "cache")
    assert traced() < 18 * 96 * 96 * 48
    monkeypatch.setattr(data, "read_scan", slowly)
    monkeypatch.setattr(data, "cpu_count", lambda: 16)
    data.cache_scans([pairs[1]._replace(name=str(i)) for i in range(16)], HOW, tmp_path / "other")
    assert 1 < len(readers) <= 4


def test_augmentation_is_as_strong_as_it_says_and_takes_image_and_mask_together():
    """It could be made ten times weaker unnoticed. Of each number that is drawn: its middle and spread, uniform."""
    with pytest.raises(ValueError, match="Full.*choose"):  # was taken for "geometry"
        data.augmenter("Full")
    warp, augment, seen = data.augmenter("geometry"), data.augmenter("full"), []
    h, w = np.indices((128, 128))
    disc = np.uint8((h - 63.5) ** 2 + (w - 93.5) ** 2 < 20**2)  # 30 pixels to the right of the centre
    masks, places = np.stack([disc] * 2), np.float32([h, h * 0 + 1])  # which tell where they come from, and that
    for seed in range(200):
        came_from, warped = warp(places, masks, seed)
        moved, moved_masks = augment(np.float32(4 * masks), masks, seed)
        assert moved.dtype == np.float32 and moved_masks.dtype == np.uint8 and set(np.unique(warped)) == {0, 1}
        assert np.array_equal(moved_masks, warped)  # "full" is that, and more
        inside = warped[0] > 0
        dark, light = np.median(moved[0, ~inside]), np.median(moved[0, inside])
        assert dice(moved[0] > (dark + light) / 2, inside) > 0.9
        where = np.argwhere(inside)
        y, x = where.mean(axis=0) - 63.5
        drawn = [np.degrees(np.arctan2(y, x)), np.sqrt(inside.sum() / disc.sum()), (light - dark) / 4, dark]
        # What rotation and scale leave unexplained is the bending, in pixels. What comes in from outside is 0.
        known = np.c_[where, np.ones(len(where))]
        unexplained = came_from[0, inside] - known @ np.linalg.lstsq(known, came_from[0, inside], rcond=None)[0]
        seen.append([*drawn, unexplained.std(), (came_from[1] < 0.5).mean(), np.ptp(moved, axis=0).any()])
    *drawn, bent, outside, noisy = np.transpose(seen)
    ranges = {"rotation": (-45, 45), "scale": (0.85, 1.15), "contrast": (0.6, 1.4), "brightness": (-0.7, 0.7)}
    for (name, (low, high)), values in zip(ranges.items(), drawn, strict=True):
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.1 * (high - low)), name
        assert values.std() == pytest.approx((high - low) / np.sqrt(12), rel=0.2), name
    assert 0.4 < bent.mean() < 1.4, "bending, in pixels"
    assert outside.mean() > 0.05
    assert 8 < noisy.sum() < 40  # a tenth gets noise, of two equal slices each its own
    # All slices of a patch are warped alike, as one alone is: 40, more than OpenCV takes channels at once.
    patch, alone = warp(np.stack([places[0]] * 40), np.stack([disc] * 40), seed), warp(places[0], disc, seed)
    assert all(np.array_equal(many, [one] * 40) for many, one in zip(patch, alone, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("kind", "size"), [(data.SliceDataset, (16, 16)), (data.PatchDataset, (4, 8, 8))])
def test_samples_depend_on_seed_epoch_and_index_only(scans, kind, size):
    """imgaug's one global generator, copied by fork, gave all workers the same slices, and in each epoch."""
    dataset, epochs = kind(scans, size, augment="full", seed=3), {}
    for context, workers in ((None, 0), ("fork", 3), ("spawn", 1)):
        loader = DataLoader(dataset, 4, num_workers=workers, multiprocessing_context=context,
                            persistent_workers=workers > 0)
        for epoch in (0, 1):
            dataset.set_epoch(epoch)
            samples = torch.cat([torch.cat(batch, 1) for batch in loader])
            assert torch.equal(epochs.setdefault(epoch, samples), samples), (context, epoch)
    assert all(not torch.equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert len({sample[0].numpy().tobytes() for sample in epochs[0]}) == len(dataset)
    other = kind(scans, size, augment="full", seed=4)
    other.set_epoch(1)
    assert not torch.equal(torch.cat(other[5]), epochs[1][5])


def test_samples_are_pieces_of_the_cached_scans_and_a_share_of_patches_is_centred_on_the_organ(scans):
    dataset = data.SliceDataset(scans, (20, 20))
    assert len(dataset) == 6 + 5 + 7
    for tensor, kind in zip(dataset[6 + 2], ("image", "mask"), strict=True):  # scan 1, slice 2
        assert tensor.shape == (1, 20, 20) and tensor.dtype == torch.float32
        assert np.array_equal(tensor[0], data.crop_or_pad(np.float32(scans[1].open(kind)[2]), (20, 20)))
    image, mask, _ = kinds(scans[0])
    pieces = np.lib.stride_tricks.sliding_window_view(np.float32(image), (3, 4, 4)).reshape(-1, 48)
    dataset = data.PatchDataset(scans[:1], (3, 4, 4), foreground=0.0)
    assert len(dataset) == -(-mask.size // 48)  # an epoch sees about all voxels
    drawn = [dataset[i] for i in range(len(dataset))]
    assert all(x.shape == y.shape == (1, 3, 4, 4) and (pieces == x.numpy().ravel()).all(1).any() for x, y in drawn)
    assert len({x.numpy().tobytes() for x, _ in drawn}) > 5
    dataset = data.PatchDataset(scans[:1], (1, 1, 1), foreground=1.0)  # nothing but the centre
    assert all(dataset[i][1] == 1 for i in range(20))
    assert data.PatchDataset(scans[:1], (9, 16, 16))[0][0].shape == (1, 9, 16, 16)  # larger than the scan: padded


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="this system does not list open files")
@pytest.mark.parametrize(("kind", "size"), [(data.SliceDataset, (64, 64)), (data.PatchDataset, (16, 32, 32))])
def test_memory_and_open_files_do_not_grow_with_the_data(tmp_path, traced, kind, size):
    """100 MB on disk, slice after slice, in 400 files; under spawn (Windows, macOS) the data set is pickled."""
    zeros = np.zeros((10, 128, 128), np.uint8)
    for i, (name, array) in product(range(200), (("image", np.float16(zeros)), ("mask", zeros))):
        (tmp_path / str(i)).mkdir(exist_ok=True)
        np.save(tmp_path / str(i) / f"{name}.npy", array)
    data.open_array.cache_clear()
    before = len(os.listdir("/dev/fd"))
    dataset = kind([data.CachedScan(str(i), tmp_path / str(i)) for i in range(200)], size)
    for i in range(0, len(dataset), 8):
        dataset[i]
    assert traced() < 4e6 and len(pickle.dumps(dataset)) < 1e5
    assert len(os.listdir("/dev/fd")) < before + 150
