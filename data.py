"""Scans and masks, from NIfTI files to augmented training samples: read, preprocess, cache, split, check.

    imgaug: https://imgaug.readthedocs.io (augmentation);  NIfTI-1: https://nifti.nimh.nih.gov/nifti-1 (files)

Contract: a scan is an array (D, H, W), slices first and upright for `imshow`: with axial slices the axes run to the
patient's superior, posterior and left side (radiological view). Spacing is (D, H, W) in mm. A mask is uint8, 0 or 1.
A sample is image float32 (1, H, W) of mean 0 and deviation 1 over its scan, and mask float32 (1, H, W): one slice; or
both (1, D, H, W): a patch.

    python data.py DIR                      # check a data set: what is in it, and every problem with its file
    python data.py DIR --label 1 2          # the values of the label files that are foreground (default: all but 0)

Layouts of DIR: `imagesTr/` + `labelsTr/` (Medical Segmentation Decathlon, nnU-Net), or `images/` + `labels/`; `.nii` or
`.nii.gz`; scan and label have the same name (nnU-Net's `_0000` at the end of a scan's name is understood).
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from torch.utils.data import Dataset
from tqdm import tqdm

# Directions of the array's axes for each slice axis, so that every slice is upright: sagittal, coronal, axial.
PLANES = ("LIP", "PIL", "SPL")
CACHE_VERSION = 1  # Part of every cache key: raise it when `preprocess` changes.
# The most memory that one scan may ask for, in GB; the commands' --max-gb sets it. Half of the machine's, since a scan
# that is normalised or predicted is there about twice.
try:
    MAX_GB = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2e9
except (AttributeError, ValueError, OSError):  # Windows
    MAX_GB = 8.0


class DataError(ValueError):
    """Something is wrong with the user's files or arguments: one line that names it and says what to do."""


# -------------------------------------------------------------------------------------------------------------- files


class Pair(NamedTuple):
    """A scan and its label file, by the name they share."""

    name: str
    image: Path
    label: Path | None = None


def nifti_files(folder: Path) -> dict[str, Path]:
    """NIfTI files of a folder by scan name, hidden ones (`._la_003.nii.gz` of macOS archives) left out."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith((".nii", ".nii.gz")):
            continue
        name = path.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
        if name in files:
            raise DataError(f"{path}: {files[name].name} is a scan of the same name; keep one of the two")
        files[name] = path
    return files


def match_files(root: str | Path) -> tuple[list[Pair], list[str]]:
    """Pairs of a labelled data set, sorted by name, and a line for each kind of file that has no partner."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: not a folder; give one that holds imagesTr/ and labelsTr/")
    for images, masks in (("imagesTr", "labelsTr"), ("images", "labels")):
        if (root / images).is_dir() and (root / masks).is_dir():
            break
    else:
        found = ", ".join(sorted(d.name for d in root.iterdir() if d.is_dir())) or "no folder"
        raise DataError(f"{root}: holds {found}; expected imagesTr/ and labelsTr/, or images/ and labels/")
    scans, truths = nifti_files(root / images), nifti_files(root / masks)
    if not scans:
        raise DataError(f"{root / images}: holds no .nii or .nii.gz file")
    problems = []
    for have, lack, what in ((scans, truths, f"label in {masks}/"), (truths, scans, f"scan in {images}/")):
        alone = sorted(have.keys() - lack.keys())
        if alone:
            problems.append(f"{root}: {len(alone)} without {what}: {', '.join(alone)}; add or remove them")
    return [Pair(name, path, truths[name]) for name, path in scans.items() if name in truths], problems


def find_pairs(root: str | Path, labels: bool = True) -> list[Pair]:
    """Scans of a folder, sorted by name, with their label files; or, with `labels=False`, scans to predict.

    Scans to predict are those of `imagesTs/`, `images/`, `imagesTr/` or the folder itself, the first that exists.
    Names decide, so `dataset.json` is not needed, nor can its entries lead out of the folder. Links are followed
    wherever they lead: data sets made of links (datalad, a cluster's storage) are common, a link opens no file that its
    reader may not open anyway, and what it leads to is read as a NIfTI file or refused.

    Raises:
        DataError: no folder, no scans, a scan without label, a label without scan, two files of one name.
    """
    root = Path(root)
    if labels or not root.is_dir():
        pairs, problems = match_files(root)
        if problems:
            raise DataError("; ".join(problems))
        return pairs
    folder = next(d for d in (root / "imagesTs", root / "images", root / "imagesTr", root) if d.is_dir())
    pairs = [Pair(name, path) for name, path in nifti_files(folder).items()]
    if not pairs:
        raise DataError(f"{folder}: holds no .nii or .nii.gz file")
    return pairs


def split_scans(names: Sequence[str], folds: int, fold: int | str) -> dict[str, list[str]]:
    """Training and validation scans of one fold: every `folds`-th of the sorted names, from number `fold` on.

    Whole scans, one per patient, go to one side; slices of a patient on both sides would be scored from memory.
    `fold="all"` trains on everything and validates on nothing.

    Raises:
        DataError: a fold outside 0 to folds - 1, more folds than scans, or a name that occurs twice.
    """
    names = sorted(names)
    if len(set(names)) != len(names):
        raise DataError(f"two scans have the same name: {next(n for n in names if names.count(n) > 1)}")
    if fold == "all":
        return {"train": names, "val": []}
    if len(names) < 2:
        raise DataError(f"{len(names)} scan: it cannot be split; add scans, or train without validation by --fold all")
    if not 2 <= folds <= len(names):
        raise DataError(f"--folds {folds}: expected 2 to {len(names)}, the number of scans (or --fold all)")
    if not 0 <= int(fold) < folds:
        raise DataError(f"--fold {fold}: expected 0 to {folds - 1}, or all")
    val = names[int(fold) :: folds]
    return {"train": [name for name in names if name not in set(val)], "val": val}


# ---------------------------------------------------------------------------------------------------- scans and masks


@dataclass(frozen=True)
class Scan:
    """A volume on upright axes, and the way back to its file's own."""

    array: np.ndarray  # float32 (D, H, W)
    spacing: tuple[float, float, float]  # mm, (D, H, W)
    source: nib.Nifti1Image  # the file: header, affine, shape; its data is not kept
    to_file: np.ndarray  # nibabel orientation transform from the array's axes to the file's

    def restore(self, array: np.ndarray) -> np.ndarray:
        """An array (D, H, W) on this scan's grid, back on the axes and of the shape of the file."""
        return apply_orientation(array, self.to_file).reshape(self.source.shape)


def check_memory(shape: Sequence[int], what: str) -> None:
    """Refuse an array that this machine could not hold before anything is allocated: a header may claim any size."""
    gigabytes = 16 * math.prod(shape) / 1e9  # a voxel: as stored, as float64 where nibabel scales it, as float32
    if gigabytes > MAX_GB:
        raise DataError(f"{what}: {' x '.join(map(str, shape))} voxels take {gigabytes:.3g} GB, more than --max-gb "
                        f"{MAX_GB:.3g}; correct the header, or raise --max-gb if it is right")


def check_offset(path: str | Path) -> None:
    """Refuse a header whose voxels begin past 16 MB: nibabel would unpack all that lies before them into memory."""
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        head = file.read(540)
    for kind, length in ((nib.Nifti1Header, 348), (nib.Nifti2Header, 540)):
        if kind.may_contain_header(head):
            offset = float(kind(head[:length], check=False)["vox_offset"])
            if not offset <= 2**24:
                raise ValueError(f"its voxels begin at byte {offset:g}")


def open_nifti(path: str | Path) -> nib.Nifti1Image:
    """Header of a NIfTI file that holds one real volume; the voxels stay on disk."""
    if not Path(path).is_file():  # a folder, a pipe that nobody fills, a link to nothing
        raise DataError(f"{path}: no such file; if it is a link, fetch what it leads to (`datalad get`), or remove it")
    try:
        check_offset(path)
        image = nib.load(path)
    except Exception as error:  # a damaged header makes nibabel raise anything, from its own errors to OverflowError
        raise DataError(f"{path}: not a readable NIfTI file ({first_line(error)}); export it again") from None
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is one too
        raise DataError(f"{path}: is {type(image).__name__}; expected NIfTI (.nii or .nii.gz)")
    if len(image.shape) < 3 or any(n != 1 for n in image.shape[3:]) or min(image.shape) < 1:
        raise DataError(f"{path}: shape is {image.shape}; expected one volume of three axes")
    if image.get_data_dtype().kind not in "iuf":
        raise DataError(f"{path}: voxels are {image.get_data_dtype()}; expected integers or floats")
    with np.errstate(all="ignore"):  # of nonsense the answer is nan, which passes no comparison
        steps = nib.affines.voxel_sizes(image.affine)  # along the file's axes, which may not lie in one plane
        placed = np.isfinite(image.affine).all() and ((steps > 1e-6) & (steps < 1e6)).all()
        if not placed or not abs(np.linalg.det(image.affine[:3, :3] / steps)) > 1e-3:
            raise DataError(f"{path}: the affine is singular (spacing {listed(steps)} mm); set the sform or qform")
    check_memory(image.shape[:3], str(path))
    return image


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def read_scan(path: str | Path, axis: int = 2) -> Scan:
    """Read a scan of any orientation, oblique included, onto the upright axes of `PLANES[axis]`.

    An oblique scan keeps its voxels and goes to the closest of the 48 orientations: nothing is interpolated.
    NaN and infinite voxels become the lowest finite one, with a warning.

    Args:
        path: `.nii` or `.nii.gz`.
        axis: slice axis: 0 left-right (sagittal), 1 posterior-anterior (coronal), 2 inferior-superior (axial).

    Raises:
        DataError: a file that is no NIfTI, damaged, not one volume of real numbers, or without a finite voxel.
    """
    image = open_nifti(path)
    try:
        array = np.asanyarray(image.dataobj).reshape(image.shape[:3])
    except Exception as error:  # as above
        reason = first_line(error)
        raise DataError(f"{path}: the voxels cannot be read ({reason}); the file is damaged, copy it again") from None
    stored, upright = io_orientation(image.affine), axcodes2ornt(PLANES[axis])
    array = np.ascontiguousarray(apply_orientation(array, ornt_transform(stored, upright)), dtype=np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        if not finite.any():
            raise DataError(f"{path}: no voxel is finite; export it again")
        count = np.count_nonzero(~finite)
        warnings.warn(f"{path}: {count} voxels are NaN or infinite; set to the lowest finite one", stacklevel=2)
        array[~finite] = array[finite].min()
    return Scan(array, oriented_spacing(image, axis), image, ornt_transform(upright, stored))


def oriented_spacing(image: nib.Nifti1Image, axis: int = 2) -> tuple[float, float, float]:
    """Spacing in mm along the upright axes of `PLANES[axis]`, from the header alone."""
    transform = ornt_transform(io_orientation(image.affine), axcodes2ornt(PLANES[axis]))
    by_file_axis = nib.affines.voxel_sizes(image.affine)
    spacing = np.zeros(3)
    spacing[transform[:, 0].astype(int)] = by_file_axis
    return tuple(round(float(step), 6) for step in spacing)  # 6 digits: what float32 headers hold


def read_mask(path: str | Path, scan: Scan, axis: int = 2, label: Sequence[int] | None = None) -> np.ndarray:
    """The foreground of a label file, uint8 (D, H, W) on the grid of its scan.

    Args:
        label: values that are foreground; None means every value but 0.

    Raises:
        DataError: values that are not whole and non-negative, or a grid that is not the scan's: another shape, or an
            affine that differs by more than 1e-3 mm in an entry (a smaller difference is a warning).
    """
    mask = read_scan(path, axis)
    if mask.source.shape[:3] != scan.source.shape[:3]:
        raise DataError(f"{path}: shape is {mask.source.shape}, its scan's is {scan.source.shape}; they must be equal")
    off = float(np.abs(mask.source.affine - scan.source.affine).max())
    if off > 1e-3:
        raise DataError(f"{path}: the affine differs from its scan's by {off:.3g} mm; resample the label to the scan")
    if off:
        warnings.warn(f"{path}: the affine differs from its scan's by {off:.1e} mm; the scan's is used", stacklevel=2)
    values = np.unique(mask.array)
    if (values != np.rint(values)).any() or values[0] < 0:
        raise DataError(f"{path}: values are {listed(values)}; expected whole numbers from 0 (0 is background)")
    foreground = mask.array > 0 if label is None else np.isin(mask.array, list(label))
    return foreground.astype(np.uint8)


def listed(values: np.ndarray) -> str:
    """The first values of a sorted array, for a message."""
    return ", ".join(f"{value:g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")


# --------------------------------------------------------------------------------------------------------- preprocess


def resize(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(D, H, W) array stretched to another shape: trilinear for float arrays, nearest neighbour for masks."""
    if tuple(array.shape) == tuple(shape):
        return array
    voxels = torch.from_numpy(array)[None, None]
    if array.dtype == np.uint8:
        return F.interpolate(voxels, size=tuple(shape), mode="nearest-exact")[0, 0].numpy()
    return F.interpolate(voxels.float(), size=tuple(shape), mode="trilinear", align_corners=False)[0, 0].numpy()


def preprocess(array: np.ndarray, spacing: Sequence[float], recipe: dict) -> np.ndarray:
    """A scan, or its mask, as the network sees it: the one function that training and prediction share.

    Args:
        array: float scan or uint8 mask (D, H, W).
        spacing: (D, H, W) in mm.
        recipe:
            spacing: (D, H, W) in mm to resample to where a scan's own is more than 15 % off; None for an axis that
                stays as it is (the slice axis, in 2D).
            crop: voxels to cut off each border of a slice.
            normalise: "zscore", mean 0 and deviation 1 over the scan; "percentile", the same after clipping to the 0.5
                and 99.5 percentiles; "minmax", 0 to 1.

    Returns:
        float16 scan (half the memory; its steps are 1/1000 of a deviation, far below MRI noise) or uint8 mask.

    Raises:
        DataError: a constant scan, one not larger than the crop, or one whose spacing would blow it up.
    """
    factors = [have / (want or have) for have, want in zip(spacing, recipe["spacing"], strict=True)]
    # Up to 15 % off the target nothing is interpolated: augmentation shows the network these scales anyway.
    if any(abs(factor - 1) > 0.15 for factor in factors):
        shape = [max(round(n * factor), 1) for n, factor in zip(array.shape, factors, strict=True)]
        check_memory(shape, f"spacing {' x '.join(f'{step:g}' for step in spacing)} mm, resampled")
        array = resize(array, shape)
    crop = recipe["crop"]
    if crop:
        if min(array.shape[1:]) <= 2 * crop:
            raise DataError(f"a slice is {array.shape[1]} x {array.shape[2]}; --crop {crop} leaves nothing of it")
        array = array[:, crop:-crop, crop:-crop]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if recipe["normalise"] == "percentile":
        array = array.clip(*np.percentile(array, (0.5, 99.5)))
    low, high = float(array.min()), float(array.max())
    if low == high:
        raise DataError(f"every voxel is {low:g}; there is nothing to see in this scan")
    if recipe["normalise"] == "minmax":
        return ((array - low) / (high - low)).astype(np.float16)
    return ((array - array.mean(dtype=float)) / array.std(dtype=float)).astype(np.float16)


def undo_preprocess(probability: np.ndarray, shape: Sequence[int], recipe: dict) -> np.ndarray:
    """Probabilities float32 of a preprocessed scan back on the grid that it had: (D, H, W) = `shape`.

    What the crop cut off comes back as 0. Probabilities, not masks, are stretched, so that borders stay smooth.
    """
    if recipe["crop"]:
        probability = np.pad(probability, ((0, 0), *[(recipe["crop"], recipe["crop"])] * 2))
    return resize(probability, shape)


# -------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class CachedScan:
    """A preprocessed scan on disk. `slices` are those in use, all unless `--overfit` picks one."""

    name: str
    image: Path  # float16 (D, H, W)
    mask: Path  # uint8, same shape
    truth: Path  # uint8, the mask on the scan's own grid; the same file as `mask` where nothing was resampled
    spacing: tuple[float, float, float]  # mm, of the scan's own grid
    slices: tuple[int, ...]
    foreground: tuple[int, ...]  # voxels of the mask in each of `slices`


def identity(path: Path) -> list:
    """What tells a file from any other and from a later one of its name: path, bytes, times of the last change in ns.

    Programs that copy or unpack set the first time to what they like; the second is the system's own.
    """
    if not path.exists():  # a link to nothing: whoever reads it says so
        return [str(path)]
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def write_atomically(path: Path, write: Callable) -> None:
    """Let `write(file)` fill a temporary file beside `path`, then rename it: readers see all of it or nothing.

    Raises:
        DataError: the file system says no; with the bytes to write and those that are free.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, since two containers that share a cache may both be process 7; short, since names end at 255 bytes.
    temporary = path.with_name(f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what the file raises
        if not isinstance(cause, OSError):
            raise
        free = shutil.disk_usage(path.parent).free
        write(whole := io.BytesIO())  # to count
        raise DataError(
            f"{path}: {cause.strerror or cause}; {len(whole.getbuffer()):,} bytes to write, {free:,} bytes free"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, seconds: float = 3600) -> None:
    """Remove temporary files that killed processes left: no write takes an hour, a younger one may be at work."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # two runs may clean up at once
            if time.time() - path.stat().st_mtime >= seconds:
                path.unlink()


def survey(pairs: Sequence[Pair], folder: str | Path | None = None) -> tuple[float, float, float]:
    """Median spacing in mm along the patient's axes, (left-right, posterior-anterior, inferior-superior).

    Read from the headers, and kept in a file of the cache `folder` for as long as no scan changes.
    """
    key = hashlib.sha256(json.dumps([identity(pair.image) for pair in pairs]).encode()).hexdigest()[:16]
    index = Path(folder) / f"survey-{key}.json" if folder else None
    if index:
        with contextlib.suppress(OSError, ValueError):
            return tuple(json.loads(index.read_text()))
    spacings = [oriented_spacing(open_nifti(pair.image))[::-1] for pair in pairs]  # axial arrays run S, P, L
    median = tuple(np.median(spacings, axis=0).tolist())
    if index:
        write_atomically(index, lambda file: file.write(json.dumps(median).encode()))
    return median


def slice_axis(spacing: Sequence[float]) -> int:
    """The axis with the coarsest spacing; where several are equal the last, inferior-superior."""
    return max(range(3), key=lambda axis: (spacing[axis], axis))


def cached(name: str, paths: dict[str, Path], entry: dict) -> CachedScan:
    """The cached scan that an entry of the index describes."""
    truth = paths["mask" if entry["truth"] == entry["mask"] else "truth"]
    slices, foreground = tuple(range(entry["mask"][0])), tuple(entry["foreground"])
    return CachedScan(name, paths["image"], paths["mask"], truth, tuple(entry["spacing"]), slices, foreground)


def cache_scan(pair: Pair, recipe: dict, folder: Path) -> CachedScan:
    """Read, preprocess and store one scan and its mask, unless they lie in the cache already.

    The key is made of the files' identities and the recipe. The index (.json) is written last: where it is there and
    the arrays open, the entry is sound; anything else is made anew.
    """
    key = hashlib.sha256(json.dumps([CACHE_VERSION, identity(pair.image), identity(pair.label), recipe]).encode())
    stem = folder / f"{pair.name[:50]}-{key.hexdigest()[:16]}"  # of up to 4 bytes a letter: names end at 255
    paths = {kind: stem.with_name(f"{stem.name}.{kind}.npy") for kind in ("image", "mask", "truth")}
    index = stem.with_name(f"{stem.name}.json")
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError):
        entry = json.loads(index.read_text())
        found = cached(pair.name, paths, entry)
        if all(list(np.load(getattr(found, kind), mmap_mode="r").shape) == entry[kind] for kind in paths):
            return found

    scan = read_scan(pair.image, recipe["axis"])
    truth = read_mask(pair.label, scan, recipe["axis"], recipe["label"])
    try:
        image, mask = (preprocess(array, scan.spacing, recipe) for array in (scan.array, truth))
    except DataError as error:
        raise DataError(f"{pair.image}: {error}") from None
    arrays = {"image": image, "mask": mask, "truth": truth}
    entry = {kind: array.shape for kind, array in arrays.items()}
    entry |= {"spacing": scan.spacing, "foreground": mask.sum((1, 2), dtype=int).tolist()}
    made = cached(pair.name, paths, entry)
    for kind, array in arrays.items():  # Where mask and truth are one file, they are equal.
        write_atomically(getattr(made, kind), partial(np.save, arr=array))
    write_atomically(index, lambda file: file.write(json.dumps(entry).encode()))
    return made


def cache_scans(pairs: Sequence[Pair], recipe: dict, folder: str | Path) -> list[CachedScan]:
    """`cache_scan` for a whole data set, on all cores: reading and unzipping release Python's lock."""
    remove_leftovers(Path(folder))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(partial(cache_scan, recipe=recipe, folder=Path(folder)), pairs)
        return list(tqdm(jobs, total=len(pairs), desc="reading", unit="scan", leave=False, disable=None))


# ------------------------------------------------------------------------------------------------------- augmentation


def import_imgaug():
    """imgaug 0.4.0, its last release, on the NumPy of today; imported here only, and only to augment."""
    if not hasattr(np, "sctypes"):  # Removed in NumPy 2; imgaug reads it once, at import.
        np.sctypes = {kind: [np.dtype(f"{kind}{bits}").type for bits in sizes] for kind, sizes in
                      (("int", (8, 16, 32, 64)), ("uint", (8, 16, 32, 64)), ("float", (16, 32, 64)))}
    try:
        import cv2
        import imgaug.augmenters
    except ImportError as error:
        if "libGL" in str(error) or "libgthread" in str(error):
            raise DataError(
                f"OpenCV, which imgaug uses, does not load ({error}); `apt-get install libgl1 libglib2.0-0`, or "
                "`pip uninstall opencv-python` and `pip install opencv-python-headless`, or train with --augment none"
            ) from None
        raise DataError(f"{error}; `pip install imgaug`, or train with --augment none") from None
    cv2.setNumThreads(0)  # The workers are the parallelism; OpenCV's own threads would fight them for the cores.
    return imgaug.augmenters


def augmenter(kind: str) -> Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """A function `augment(image, mask, entropy) -> (image, mask)` on float32 (..., H, W) and uint8 (..., H, W).

    The same entropy gives the same result, in whatever process. Masks are warped with nearest neighbour. All slices of
    a patch (D, H, W) are warped and scaled alike; only the noise is each slice's own.

    Args:
        kind: "none"; "seed": rotation by -45 to 45 degrees, scale 0.85 to 1.15, elastic deformation; "full": that,
            then contrast, brightness, noise and blur (intensities in deviations of the scan).
    """
    if kind != "none":
        pipeline(kind)  # now, so that a missing library is told before the workers start
    return partial(augment, kind)


@cache
def pipeline(kind: str):
    """The imgaug augmenters, built once in each process: imgaug's objects cannot be unpickled in a spawned worker."""
    iaa = import_imgaug()
    from imgaug.random import RNG

    steps = [
        iaa.Affine(scale=(0.85, 1.15), rotate=(-45, 45)),
        iaa.ElasticTransformation(alpha=(0.0, 40.0), sigma=(4.0, 8.0)),  # displacement and smoothness in pixels
    ]
    if kind == "full":
        steps += [
            iaa.Multiply((0.75, 1.25)),  # contrast: the mean of a scan is 0
            iaa.Add((-0.25, 0.25)),  # brightness
            iaa.Sometimes(0.25, iaa.AdditiveGaussianNoise(scale=(0, 0.2), per_channel=True)),
            iaa.Sometimes(0.25, iaa.GaussianBlur(sigma=(0.0, 1.0))),
        ]
    augmenters, generator = iaa.Sequential(steps), RNG(0)
    for augmenter in (augmenters, *augmenters.get_all_children(flat=True)):
        augmenter.random_state = generator  # one for all, so that one state seeds them all
    return augmenters


def augment(kind: str, image: np.ndarray, mask: np.ndarray, entropy: int) -> tuple[np.ndarray, np.ndarray]:
    if kind == "none":
        return image, mask
    augmenters = pipeline(kind)
    from imgaug.augmentables import Batch, SegmentationMapsOnImage

    # What `augmenters.seed_(entropy)` is for, which is slow: it makes a generator for each.
    augmenters.random_state.generator.bit_generator.state = np.random.SFC64(entropy).state
    # To imgaug the slices of a patch are the channels of one picture (H, W, C), and so share a warp.
    stack, labels = (np.moveaxis(a.reshape(-1, *a.shape[-2:]), 0, 2) for a in (image, mask))
    # What `augmenters(...)` calls after checks and copies that are not needed here.
    done = augmenters.augment_batch_(Batch([stack], segmentation_maps=[SegmentationMapsOnImage(labels, labels.shape)]))
    stack, labels = done.images_aug[0], done.segmentation_maps_aug[0].get_arr()
    return tuple(np.moveaxis(a, 2, 0).reshape(b.shape) for a, b in ((stack, image), (labels, mask)))


# ----------------------------------------------------------------------------------------------------------- data set


def fit(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Crop or pad the last axes, about the centre, to `size`, (H, W) or (D, H, W). Padding is 0, a z-scored mean."""
    last = len(size)
    surplus = [max(n - want, 0) for n, want in zip(array.shape[-last:], size, strict=True)]
    array = array[(..., *(slice(n // 2, n // 2 + want) for n, want in zip(surplus, size, strict=True)))]
    missing = [want - n for n, want in zip(array.shape[-last:], size, strict=True)]
    if not any(missing):
        return array  # np.pad copies, and takes longer than to read a slice
    return np.pad(array, [(0, 0)] * (array.ndim - last) + [(n // 2, n - n // 2) for n in missing])


def with_neighbours(volume: np.ndarray, slices: Sequence[int], count: int) -> np.ndarray:
    """Slices of a volume (D, H, W) with `count` neighbours on either side as channels: float32 (B, 1 + 2 count, H, W).

    Beyond the first and the last slice, these are repeated.
    """
    around = np.asarray(slices)[:, None] + np.arange(-count, count + 1)
    return volume[around.clip(0, len(volume) - 1)].astype(np.float32)


@cache
def layout(path: Path) -> tuple[np.dtype, tuple[int, ...], int]:
    """dtype, shape and first byte of the array in a .npy file: each process parses a header once, which is slow."""
    array = np.load(path, mmap_mode="r")
    return array.dtype, array.shape, array.offset


def read_slices(path: Path, first: int, stop: int) -> np.ndarray:
    """Slices `first` to `stop - 1`, as far as there are, of the array (D, H, W) in a .npy file.

    Read, not mapped: to map and unmap a file for each sample takes longer than to read a slice.
    """
    dtype, (depth, *size), offset = layout(path)
    first, nbytes = max(first, 0), math.prod(size) * dtype.itemsize  # of a slice
    with open(path, "rb") as file:
        file.seek(offset + first * nbytes)
        return np.frombuffer(file.read((min(stop, depth) - first) * nbytes), dtype).reshape(-1, *size)


class SliceDataset(Dataset):
    """Augmented slices of cached scans; `dataset[i]` is image float32 (C, H, W), mask float32 (1, H, W).

    A sample depends on (seed, epoch, index) and on nothing else: not the worker, not their number, not how they were
    started. It holds no open file, so it can be pickled and its memory does not grow with the data.

    Args:
        scans: from `cache_scans`.
        size: (H, W) of every sample.
        augment: see `augmenter`.
        seed: of the augmentation.
        neighbours: slices on either side that are seen beside each one, as channels: C = 1 + 2 neighbours ("2.5D").
    """

    def __init__(
        self, scans: Sequence[CachedScan], size: Sequence[int], *, augment: str = "none", seed: int = 0,
        neighbours: int = 0,
    ):
        self.scans, self.size, self.seed, self.neighbours = list(scans), tuple(size), seed, neighbours
        self.table = [(i, d) for i, scan in enumerate(self.scans) for d in scan.slices]
        self.augment = augmenter(augment)
        # In shared memory, so that workers that live through all epochs (persistent_workers) see it change.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next samples get."""
        self.epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([self.seed, int(self.epoch[0]), index])
        image, mask = (fit(array, self.size) for array in self.cut(index, rng))
        image, mask = self.augment(image, mask, int(rng.integers(2**31)))
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(mask.astype(np.float32))

    def cut(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image float32 and mask uint8 of a sample as they are in the cache."""
        i, d = self.table[index]
        scan, n = self.scans[i], self.neighbours
        image = read_slices(scan.image, d - n, d + n + 1)
        return with_neighbours(image, [min(d, n)], n)[0], read_slices(scan.mask, d, d + 1)


class PatchDataset(SliceDataset):
    """Augmented random patches of cached scans; `dataset[i]` is image and mask float32 (1, D, H, W).

    An epoch draws as many patches from a scan as it takes to see about all of its voxels. Where a patch lies depends on
    (seed, epoch, index), like its augmentation.

    Args:
        size: (D, H, W) of a patch; a smaller scan is padded.
        foreground: share of the patches that are centred on a voxel of the organ.
        others: see `SliceDataset`.
    """

    def __init__(self, scans: Sequence[CachedScan], size: Sequence[int], *, foreground: float = 1 / 3, **others):
        super().__init__(scans, size, **others)
        self.foreground = foreground
        voxels = [np.load(scan.image, mmap_mode="r").size for scan in self.scans]
        self.table = [i for i, count in enumerate(voxels) for _ in range(-(-count // int(np.prod(size))))]

    def cut(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        scan = self.scans[self.table[index]]
        image, mask = (np.load(path, mmap_mode="r") for path in (scan.image, scan.mask))
        room = np.maximum(np.subtract(mask.shape, self.size), 0)  # the last place where a patch can begin
        start = rng.integers(room + 1)
        if rng.random() < self.foreground and any(scan.foreground):
            d = rng.choice(len(mask), p=np.divide(scan.foreground, sum(scan.foreground)))
            centre = d, *rng.choice(np.argwhere(mask[d]))
            start = np.clip(centre - np.array(self.size) // 2, 0, room)
        patch = (None, *map(slice, start, start + self.size))
        return image[patch].astype(np.float32), mask[patch]


# ---------------------------------------------------------------------------------------------------- data-set check


def check(root: str | Path, label: Sequence[int] | None = None) -> tuple[list[dict], list[str]]:
    """Read every scan and label of a data set once.

    Returns:
        rows: one per readable scan, as text: name, shape and spacing (D, H, W), orientation in the file, low, high,
            foreground (share of the voxels), slices (that hold foreground).
        problems: one line each, with the file.
    """
    pairs, problems = match_files(root)
    try:
        axis = slice_axis(survey(pairs))
    except DataError:
        axis = 2  # The file at fault is named below, when it is read.

    def inspect(pair: Pair) -> tuple[dict | None, list[str]]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                scan = read_scan(pair.image, axis)
                mask = read_mask(pair.label, scan, axis, label)
                low, high = float(scan.array.min()), float(scan.array.max())
            except DataError as error:
                return None, [str(error)]
        found = [str(warning.message) for warning in told]
        if low == high:
            found.append(f"{pair.image}: every voxel is {low:g}; there is nothing to see in this scan")
        if not mask.any():
            found.append(f"{pair.label}: no voxel is foreground; check --label, or remove the scan")
        return {
            "name": pair.name,
            "shape": " x ".join(map(str, mask.shape)),
            "spacing": " x ".join(f"{step:.3g}" for step in scan.spacing),
            "orientation": "".join(nib.aff2axcodes(scan.source.affine)),
            "low": f"{low:.4g}",
            "high": f"{high:.4g}",
            "foreground": f"{mask.mean():.2%}",
            "slices": int(mask.any(axis=(1, 2)).sum()),
        }, found

    rows = []
    for pair in tqdm(pairs, desc="checking", unit="scan", disable=None):  # one by one: warnings belong to their scan
        row, found = inspect(pair)
        rows += [row] if row else []
        problems += found
    return rows, problems


def main(argv: Sequence[str] | None = None) -> int:
    global MAX_GB
    parser = argparse.ArgumentParser(description="Check a data set: what is in it, and every problem with its file.")
    parser.add_argument("data", help="folder with imagesTr/ and labelsTr/, or images/ and labels/")
    parser.add_argument("--label", type=int, nargs="+", help="label values that are foreground (default: all but 0)")
    parser.add_argument("--max-gb", type=float, default=MAX_GB, help="memory for one scan (default: half of all)")
    parser.print_usage = lambda _: None  # an error is one line
    args = parser.parse_args(argv)
    MAX_GB = args.max_gb
    try:
        rows, problems = check(args.data, args.label)
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    row = "{name:20} {shape:>16} {spacing:>20} {orientation:>5} {low:>8} {high:>8} {foreground:>10} {slices:>6}"
    print(row.format(name="scan", shape="voxels (D H W)", spacing="spacing (D H W) mm", orientation="axes",
                     low="lowest", high="highest", foreground="foreground", slices="slices"))
    for r in rows:
        print(row.format(**r))
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(rows)} scans read, {len(problems)} problems")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
