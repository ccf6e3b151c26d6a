"""Scans and masks, from NIfTI files to augmented training samples: read, preprocess, cache, split, check.

    imgaug: https://imgaug.readthedocs.io (augmentation);  NIfTI-1: https://nifti.nimh.nih.gov/nifti-1 (files)

A NIfTI file holds an array (I, J, K) and an *affine*, the 4 x 4 matrix that takes (i, j, k) to mm in the patient: to
the right, to the front, upwards. A scan is *oblique* where its axes are not quite the patient's.

The way of a scan: `find_pairs`; `cache_scans`, which means `read_scan`, `read_label` and `preprocess`, once; then, for
each sample, `SliceDataset` with `crop_or_pad` and `augmenter`. The way back: `undo_preprocess`, `Scan.restore`.

Contract: a scan is an array (D, H, W), slices first and upright for `imshow`: with axial slices the axes run to the
patient's superior, posterior and left side (radiological view). Spacing is (D, H, W) in mm. A mask is uint8, 0 or 1.
A sample is an image, float32 (1, H, W), and its mask, float32 (1, H, W): one slice; in 3D both are (1, D, H, W).

    python data.py DIR                      # check a data set: what is in it, and every problem with its file
    python data.py DIR --label 1 2          # the values of the label files that are foreground (default: all but 0)

Layouts of DIR: `imagesTr/` + `labelsTr/` (Medical Segmentation Decathlon, nnU-Net), or `images/` + `labels/`; `.nii` or
`.nii.gz`; a scan and its label have the same name. Where every scan ends in nnU-Net's `_0000`, that is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from torch.utils.data import Dataset
from tqdm import tqdm

# For each slice axis (0 sagittal, 1 coronal, 2 axial): where D, H, W run to, so that every slice is upright (to the
# Left, Posterior, Superior, or Inferior side), ...
PLANES = ("LIP", "PIL", "SPL")
# ... and which of the patient's axes that is: 0 left-right, 1 posterior-anterior, 2 inferior-superior.
PATIENT_AXES = ((0, 2, 1), (1, 2, 0), (2, 1, 0))
# A part of every key of the cache: who changes this file gets what it makes now. (What it made before stays there.)
CODE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
NIFTI = (".nii", ".nii.gz")
# What a scan that is no NIfTI is, what makes one of it, and the endings by which it is known.
FOREIGN = {
    "NRRD or MetaImage; convert it with 3D Slicer or SimpleITK": (".nrrd", ".nhdr", ".mha", ".mhd"),
    "Analyze or FreeSurfer's; convert it with mri_convert or 3D Slicer": (".hdr", ".img", ".mgz", ".mgh"),
    "DICOM; convert its folder with dcm2niix": (".dcm", ".ima"),
    "compressed otherwise; unpack it with bunzip2, unxz, unzip or unzstd": (".bz2", ".xz", ".zip", ".zst"),
    "a folder, where a scan is one file; docs/challenge.md makes that of a folder a patient": ("/",),
}


class DataError(ValueError):
    """Something is wrong with the user's files or arguments: one line that names it and says what to do."""


def require(condition: bool, message: str) -> None:
    """Raise a DataError with this message unless the condition holds."""
    if not condition:
        raise DataError(message)


def note(condition: bool, message: str) -> None:
    """Warn of what is allowed, but may not be meant, if the condition holds."""
    if condition:
        warnings.warn(message, stacklevel=3)


# -------------------------------------------------------------------------------------------------------------- files


class Pair(NamedTuple):
    """A scan and its label file, by the name they share."""

    name: str
    image: Path
    label: Path


@contextlib.contextmanager
def one_line(path: str | Path) -> Iterator[None]:
    """Turn what the file system says about a file (disk full, no permission) into a DataError; `path` is where it does
    not say which."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or path}: {error.strerror or error}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file beside `path`, then rename it: a reader sees the old file or the new one, whole."""
    with one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name[:50]}-{os.urandom(8).hex()}.tmp")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows as a table, whole or not at all. What a row lacks is empty: a run may go on with one column more."""
    columns = dict.fromkeys(name for row in rows for name in row)
    table = csv.DictWriter(text := io.StringIO(), columns)
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))  # a file's name may be no UTF-8


def foreign(path: Path) -> str | None:
    """What a scan or folder is that is no NIfTI file, and what to do with it; None for any other file."""
    name = path.name.lower()
    if name.endswith(NIFTI):
        return None
    if path.is_dir():
        name += "/"
    elif path.is_file():
        with path.open("rb") as file:  # many files of scanners have no ending
            name += ".dcm" * file.read(132).endswith(b"DICM")
    return next((told for told, endings in FOREIGN.items() if name.endswith(endings)), None)


def nifti_files(folder: Path) -> list[Path]:
    """NIfTI files of a folder, sorted; hidden ones (`._la_003.nii.gz` of macOS archives) are left out.

    Scans in other formats, and folders, are left out with a warning: how many, the first, and what converts it.

    Raises:
        DataError: a folder that holds no such file.
    """
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    scans = [path for path in paths if path.name.lower().endswith(NIFTI)]
    others = [f"{path.name}: {kind}" for path in paths if (kind := foreign(path))]
    first = [*others, *(path.name for path in paths), "nothing"][0]
    require(scans, f"{folder}: holds no .nii or .nii.gz file, but {first}")
    note(others, f"{folder}: {len(others)} left out, for they are no NIfTI files: {first}")
    return scans


def by_name(paths: Sequence[Path], known: Collection[str] = ()) -> dict[str, Path]:
    """Files by scan name: without `.nii.gz`, and without `_0000`, nnU-Net's number of the channel, if all end so and
    none is `known` by its whole name.

    Raises:
        DataError: two files of one name, or of names that Windows and macOS take for one (A and a).
    """
    names = [re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE) for path in paths]
    if all(name.endswith("_0000") for name in names) and not set(names).intersection(known):
        names = [name.removesuffix("_0000") for name in names]
    seen: dict[str, Path] = {}
    for name, path in zip(names, paths, strict=True):
        first = seen.setdefault(name.casefold(), path)
        require(first is path, f"{first}, {path}: scans of the same name; rename or remove one")
    return dict(zip(names, paths, strict=True))


def match_files(root: str | Path) -> tuple[list[Pair], list[str]]:
    """Pairs of a labelled data set, sorted by name, and a line for each kind of file that has no partner.

    Raises:
        DataError: see `find_pairs`.
    """
    root = Path(root)
    require(root.is_dir(), f"{root}: not a folder; give one with imagesTr/ and labelsTr/ (phantom.py writes one)")
    found = listed(sorted(path.name for path in root.iterdir() if path.is_dir())) or "no folder"
    tail = "Tr" if (root / "labelsTr").is_dir() else ""
    images, labels = root / f"images{tail}", root / f"labels{tail}"
    require(images.is_dir() and labels.is_dir(), f"{root}: holds {found}; expected imagesTr/ and labelsTr/, or images/ "
            "and labels/ (docs/challenge.md: of a folder a patient)")
    scans, masks = by_name(nifti_files(images)), by_name(nifti_files(labels))
    channels = [name for name in scans if re.search(r"_\d{4}$", name) and name[:-5] in masks]
    require(not channels, f"{images}: {listed(channels)}: several channels of a patient, as nnU-Net numbers them; one "
            "is read here: keep the files of one number only, and name them _0000")
    problems = []
    for folder, have, lack, other in ((images, scans, masks, labels), (labels, masks, scans, images)):
        if alone := ", ".join(sorted(have.keys() - lack.keys())):
            problems.append(f"{folder}: {alone}: no file of that name in {other.name}/; add it, or remove this one")
    return [Pair(name, path, masks[name]) for name, path in scans.items() if name in masks], problems


def find_pairs(root: str | Path) -> list[Pair]:
    """Scans of a data set with their label files, sorted by name; names decide, `dataset.json` is not read.

    Raises:
        DataError: no folder, no scans, a scan without label, a label without scan, two files of one name, several
            channels of a patient.
    """
    pairs, problems = match_files(root)
    require(not problems, "; ".join(problems))
    return pairs


def checksums(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """CRC-32 of each scan and its label. Warns of a patient who seems to be there twice, on both sides of a split: of
    copies, and of names that are alike up to the end of their first number (patient001_frame01, patient001_frame12)."""
    sums = {name: [zlib.crc32(path.read_bytes()) for path in paths] for name, *paths in pairs}
    counts = Counter(crc for both in sums.values() for crc in both)
    copies = [name for name, both in sums.items() if max(counts[crc] for crc in both) > 1]
    note(copies, f"scans or labels that are copies of one another: {listed(copies)}; of a patient who is there twice "
         "keep one scan, or no score is sound")
    patients = {name: re.match(r"\D*\d*", name)[0] for name in sums}
    scans = Counter(patients.values())
    several = [name for name, patient in patients.items() if scans[patient] > 1]
    few = len(sums) <= 10 * len(scans)  # else that number is of a scanner, say, or a hospital
    note(several and few, f"by their names, patients with several scans: {listed(several)}; if so, keep one scan of "
         "each, or no score is sound")
    return sums


def split_scans(names: Sequence[str], folds: int, fold: int | str) -> dict[str, list[str]]:
    """Training and validation scans of one fold: every `folds`-th of the sorted names, from number `fold` on.

    Whole scans, one per patient, go to one side: a network that has seen one slice of a patient knows the next.
    `fold="all"` trains on everything and validates on nothing.

    Raises:
        DataError: a fold outside 0 to folds - 1, or more folds than scans.
    """
    names = sorted(names)
    if fold == "all":
        return {"train": names, "val": []}
    require(2 <= folds <= len(names), f"--folds {folds}: expected 2 to {len(names)}, the number of scans")
    require(str(fold) in map(str, range(folds)), f"--fold {fold}: expected 0 to {folds - 1}, or all")
    train = [name for i, name in enumerate(names) if i % folds != int(fold)]
    return {"train": train, "val": names[int(fold) :: folds]}


# ---------------------------------------------------------------------------------------------------- scans and masks


class Scan(NamedTuple):
    """A volume on upright axes, and the way back to its file's own."""

    array: np.ndarray  # float32 (D, H, W)
    spacing: tuple[float, float, float]  # mm, (D, H, W)
    source: nib.Nifti1Image  # the file: header, affine, shape; its voxels are not kept
    axis: int  # slice axis, see PLANES

    def restore(self, array: np.ndarray) -> np.ndarray:
        """An array (D, H, W) on this scan's grid, back on the axes and of the shape of the file.

        Raises:
            ValueError: an array of another shape than the scan's.
        """
        if array.shape != self.array.shape:
            raise ValueError(f"shape is {array.shape}; the scan's is {self.array.shape}")
        way_back = ornt_transform(axcodes2ornt(PLANES[self.axis]), io_orientation(self.source.affine))
        return apply_orientation(array, way_back).reshape(self.source.shape)


def open_nifti(path: str | Path) -> nib.Nifti1Image:
    """Header of a NIfTI file that holds one volume; the voxels stay on disk. Raises DataError for any other file."""
    kind = foreign(Path(path))
    require(not kind, f"{path}: {kind}")
    try:
        image, on_disk = nib.load(path), os.stat(path).st_size
    except Exception as error:  # a damaged header makes nibabel raise anything, from its own errors to OverflowError
        raise DataError(f"{path}: not a readable NIfTI file ({first_line(error)}); export it again") from None
    # Nifti2Image is one, too.
    require(isinstance(image, nib.Nifti1Image), f"{path}: it is a {type(image).__name__}; export it as NIfTI")
    shape, dtype = image.shape, image.get_data_dtype()
    require(len(shape) >= 3 and set(shape[3:]) <= {1}, f"{path}: shape is {shape}; expected one volume of three axes")
    require(dtype.kind in "iuf", f"{path}: voxels are {dtype}; expected integers or floats")
    claimed = image.dataobj.offset + math.prod(shape) * dtype.itemsize
    # A byte of a .gz file unpacks to 1,032 bytes at most: a header that claims more is wrong, and nothing is allocated.
    fits = 0 < claimed <= 1032 * on_disk if Path(path).suffix.lower() == ".gz" else claimed == on_disk
    require(fits, f"{path}: its header claims {claimed:,} bytes, it has {on_disk:,}; copy it again")
    # The singular values of axes at right angles are their spacings; one is 0 where the axes lie in a plane.
    spacing = np.linalg.svd(np.nan_to_num(image.affine[:3, :3], nan=1e6).clip(-1e6, 1e6), compute_uv=False)
    require(spacing.min() >= 0.05 and spacing.max() <= 20, f"{path}: a voxel is {listed(spacing, ' x ')} mm, expected "
            "0.05 to 20; correct the affine (metres? microns? two axes alike?)")
    return image


def first_line(error: Exception) -> str:
    """What a library's error says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def listed(values: Sequence, between: str = ", ") -> str:
    """The first of some numbers or names, for a message."""
    words = between.join(str(value) if isinstance(value, str | int) else f"{value:g}" for value in values[:6])
    return words + ", ..." if len(values) > 6 else words


def read_voxels(image: nib.Nifti1Image, path: str | Path) -> np.ndarray:
    """The voxels as stored (I, J, K), in the file's dtype unless its header scales them.

    A .gz file is read to its very end, since only there its check sum and its length are compared.
    """
    try:
        if Path(path).suffix.lower() != ".gz":
            return np.asanyarray(image.dataobj).reshape(image.shape[:3])
        with gzip.open(path) as stream:
            array = np.asanyarray(type(image).from_stream(stream).dataobj).reshape(image.shape[:3])
            if stream.read(1):
                raise ValueError("bytes follow its last voxel")
            return array
    except Exception as error:  # as in open_nifti
        reason = first_line(error).partition(" 0x")[0]  # without the two check sums
        raise DataError(f"{path}: damaged ({reason}); copy it again") from None


def upright(array: np.ndarray, affine: np.ndarray, axis: int) -> np.ndarray:
    """An array (I, J, K) as stored, on the upright axes (D, H, W) of PLANES[axis]; nothing is interpolated."""
    return apply_orientation(array, ornt_transform(io_orientation(affine), axcodes2ornt(PLANES[axis])))


def read_scan(path: str | Path, axis: int = 2) -> Scan:
    """Read a scan of any orientation onto the upright axes of `PLANES[axis]`.

    An oblique scan keeps its voxels and goes to the closest of the 48 orientations: nothing is interpolated.
    NaN and infinite voxels become the lowest finite one, with a warning. A scan of one value is read, too.

    Args:
        path: `.nii` or `.nii.gz`.
        axis: slice axis: 0 left-right (sagittal), 1 posterior-anterior (coronal), 2 inferior-superior (axial).

    Raises:
        DataError: a file that is no NIfTI, damaged, not one volume of real numbers, without a finite voxel, or with
            numbers that float32 does not handle.
    """
    image = open_nifti(path)
    voxels = upright(read_voxels(image, path), image.affine, axis)
    finite = np.isfinite(voxels)
    require(finite.any(), f"{path}: no voxel is finite; export it again")
    broken = np.count_nonzero(~finite)
    note(broken, f"{path}: {broken} voxels are NaN or infinite; set to the lowest other")
    if broken:
        voxels = np.where(finite, voxels, voxels[finite].min())
    check_range(float(voxels.min()), float(voxels.max()), path)  # before float32, which holds less
    placed = image.header["sform_code"] or image.header["qform_code"]
    note(not placed, f"{path}: its header gives no orientation; left and right are a guess")
    told, taken = image.header.get_zooms()[:3], nib.affines.voxel_sizes(image.affine)
    other = not np.allclose(told, taken, rtol=0.01)  # after a registration, for instance
    note(other, f"{path}: its header says voxels of {listed(told, ' x ')} mm, its affine {listed(taken, ' x ')}; the "
         "affine is taken")
    skew = np.linalg.cond(image.affine[:3, :3] / taken)  # 1 at right angles
    note(skew > 1.05, f"{path}: its axes are not at right angles; mm and ml are not exact")
    spacing = np.array(patient_spacing(image))[list(PATIENT_AXES[axis])]
    return Scan(np.array(voxels, np.float32, order="C"), tuple(spacing.tolist()), image, axis)


def check_range(low: float, high: float, name: str | Path) -> None:
    """Refuse a scan of such numbers that the squares of float32 vanish, or are infinite."""
    fits = max(-low, high) < 1e10 and (low == high or high - low > 1e-10)
    require(fits, f"{name}: voxels are {low:g} to {high:g}; scale them to about 0 to 1000")


def patient_spacing(image: nib.Nifti1Image) -> list[float]:
    """Spacing in mm along the patient's axes: left-right, posterior-anterior, inferior-superior; of an oblique scan
    along those that are closest."""
    order = np.argsort(io_orientation(image.affine)[:, 0])  # for each axis of the patient, the file's
    return nib.affines.voxel_sizes(image.affine)[order].round(6).tolist()  # 6 digits: what float32 headers hold


def read_mask(path: str | Path, scan: Scan, label: Sequence[int] | None = None) -> np.ndarray:
    """The foreground of a label file, uint8 (D, H, W) on the grid of its scan: see `read_label`."""
    mask, values = read_label(path, scan, label)
    note_labels({Path(path).name: values}, label)
    note(label and not mask.any(), f"{path}: holds no voxel of label {listed(label or [], ' or ')}")
    return mask


def read_label(path: str | Path, scan: Scan, label: Sequence[int] | None = None) -> tuple[np.ndarray, list[float]]:
    """The foreground of a label file, uint8 (D, H, W) on the grid of its scan, and the file's values above 0.

    A label on the same grid in space whose axes are stored in another order or direction is turned.

    Args:
        label: values that are foreground; None means every value but 0.

    Raises:
        DataError: values that are not whole (within 0.01) and non-negative; more than 32 different ones, unless they
            are those of an atlas and `label` chooses; or a grid that is not the scan's: another shape, or an affine
            that differs by more than 1e-3 mm in an entry (a smaller difference is a warning).
    """
    require(not label or min(label) > 0, f"--label {listed(label or [], ' ')}: expected values from 1; 0 is background")
    image, goal = open_nifti(path), scan.source.affine
    array, affine = read_voxels(image, path), image.affine
    if np.abs(affine - goal).max() > 1e-3:
        turn = ornt_transform(io_orientation(affine), io_orientation(goal))
        affine = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
        array = apply_orientation(array, turn)
    shape, off = scan.source.shape[:3], float(np.abs(affine - goal).max())
    require(array.shape == shape, f"{path}: shape is {array.shape}, its scan's is {shape}; they must be equal")
    require(off <= 1e-3, f"{path}: the affine differs from its scan's by {off:.3g} mm; resample the label to the scan")
    note(off > 0, f"{path}: the affine differs from its scan's by {off:.1e} mm; the scan's is used")
    values = np.unique(array)
    with np.errstate(invalid="ignore"):  # inf - inf is nan, which passes no comparison
        rounding = float(np.abs(values - np.rint(values)).max())
    found, whole = f"{path}: values are {listed(values)}", np.unique(np.rint(values))
    if len(whole) > 32:  # an atlas, where most voxels of organs are as their neighbour; or a scan, where they are not
        alike = (array[1:] == array[:-1])[array[1:] > 0]
        atlas = label and 2 * alike.sum() > alike.size
        require(atlas, f"{path}: {len(whole)} different values: this is no mask (of an atlas: give --label)")
    require(rounding <= 0.01 and whole[0] >= 0, f"{found}; expected whole numbers from 0 (0 is background); if "
            "all lie between 0 and 1: a probability map; threshold it")
    note(rounding > 0, f"{found}; rounded to whole numbers")
    array = np.rint(array) if rounding else array
    foreground = np.isin(array, list(label)) if label else array > 0
    # The scan's affine, not the label's own: at 45 degrees a last digit decides which axis is the closest.
    mask = np.ascontiguousarray(upright(foreground, goal, scan.axis), dtype=np.uint8)
    return mask, whole[whole > 0].tolist()


def read_pair(pair: Pair, axis: int, label: Sequence[int] | None) -> tuple[Scan, np.ndarray, list[float]]:
    """A scan, its mask and the label's values, to learn from. Raises DataError where there is nothing to see, or
    nothing but organ."""
    scan = read_scan(pair.image, axis)
    mask, values = read_label(pair.label, scan, label)
    low, high = scan.array.min(), scan.array.max()
    require(low < high, f"{pair.image}: every voxel is {low:g}; there is nothing to see in this scan")
    require(not mask.all(), f"{pair.label}: every voxel is organ; expected 0 around it, or choose values by --label")
    return scan, mask, values


def note_labels(values: dict[str, Sequence[float]], label: Sequence[int] | None) -> None:
    """Warn of what is allowed, but may be a wrong `label`; `values`: what the label file of each scan holds, but 0."""
    label, found = label or [], set().union(*values.values())
    note(not label and len(found) > 1, f"labels hold the values {listed(sorted(found))}: taken for one organ; --label "
         "chooses")
    nowhere = [value for value in label if value not in found]
    note(nowhere and found.intersection(label), f"--label {listed(label, ' ')}: {listed(nowhere)} is in no label file")
    absent = [name for name, held in values.items() if not set(held).intersection(label or held)]
    organ = f"label {listed(label, ' or ')}" if label else "any label"
    note(0 < len(absent) < len(values), f"{len(absent)} of {len(values)} scans hold no voxel of {organ}: "
         f"{listed(absent)}")


# --------------------------------------------------------------------------------------------------------- preprocess


def resize(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(D, H, W) array stretched to another shape, linearly; of a uint8 mask, the voxels that are more than half in."""
    if array.shape == tuple(shape):
        return array
    voxels = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None, None]
    voxels = torch.nn.functional.interpolate(voxels, tuple(shape), mode="trilinear", align_corners=False).numpy()[0, 0]
    # Nearest neighbour would shift a mask that is halved by half a fine voxel.
    return np.uint8(voxels > 0.5) if array.dtype == np.uint8 else voxels


def preprocess(array: np.ndarray, spacing: Sequence[float], how: dict, name: str | Path = "scan") -> np.ndarray:
    """A scan, or its mask, as the network sees it: the one function that training and prediction share.

    Args:
        array: float32 scan, or uint8 mask of 0 and 1, (D, H, W).
        spacing: (D, H, W) in mm.
        how:
            spacing: (D, H, W) in mm to resample to if a scan is more than 15 % off along any axis; None for one that
                stays as it is (the slice axis, in 2D).
            crop: voxels to cut off each border of a slice.
            normalise: "zscore", mean 0 and deviation 1 over the scan; "percentile", the same after clipping to the 0.5
                and 99.5 percentiles; "minmax", 0 to 1.
            and, not used here: axis, label, see `read_pair`; size, of a sample; smooth, mm of the Gaussian across the
                slices of a prediction.
        name: of the scan, for an error.

    Returns:
        float16 scan (half the memory; its steps are 1/1000 of a deviation, far below MRI noise) or uint8 mask.

    Raises:
        ValueError: an array of other axes or another dtype, a mask of several labels, or an unknown way to normalise.
        DataError: a scan of one value, of NaN, or one that is not larger than the crop.
    """
    high = array.max(initial=0)
    sound = array.ndim == 3 and (array.dtype == np.float32 or array.dtype == np.uint8 and high <= 1)
    if not sound or how["normalise"] not in ("zscore", "percentile", "minmax"):
        raise ValueError(f"{name}: {array.dtype} {array.shape}, {how['normalise']}; expected (D, H, W) of float32, or "
                         f"of uint8 (values to {high}; a mask is 0 or 1); zscore, percentile or minmax")
    factors = [have / (want or have) for have, want in zip(spacing, how["spacing"], strict=True)]
    # Up to 15 % off the target nothing is interpolated: augmentation shows the network these scales of H and W.
    if any(abs(factor - 1) > 0.15 for factor in factors):
        array = resize(array, [max(round(n * factor), 1) for n, factor in zip(array.shape, factors, strict=True)])
    crop = how["crop"]
    require(min(array.shape[1:]) > 2 * crop, f"{name}: slices are {array.shape[1:]}; --crop {crop} leaves nothing")
    array = array[:, crop : array.shape[1] - crop, crop : array.shape[2] - crop]
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    usual = 0.5 <= min(factors) <= max(factors) <= 2
    note(not usual, f"{name}: a voxel is {listed(spacing, ' x ')} mm (D H W), {listed(factors, ' x ')} times the usual "
         "one; is that so, or is its header wrong?")
    if how["normalise"] == "percentile":
        array = array.clip(*np.percentile(array, (0.5, 99.5)).astype(np.float32))
    low, high = float(array.min()), float(array.max())
    check_range(low, high, name)
    share = "more than 99 % of the voxels are" if how["normalise"] == "percentile" else "every voxel is"
    require(low < high, f"{name}: {share} {low:g}; remove this scan, or try --normalise zscore")
    if how["normalise"] == "minmax":
        return ((array - low) / (high - low)).astype(np.float16)
    array = array - float(array.mean(dtype=float))  # a Python float: numpy's own would make the array float64
    return (array / math.sqrt(np.square(array).mean(dtype=float))).astype(np.float16)


def undo_preprocess(probability: np.ndarray, shape: Sequence[int], how: dict) -> np.ndarray:
    """Probabilities float32 of a preprocessed scan back on the grid that it had: (D, H, W) = `shape`.

    What the crop cut off comes back as 0. Probabilities, not masks, are stretched, so that borders stay smooth.
    """
    return resize(np.pad(probability, ((0, 0), *[(how["crop"], how["crop"])] * 2)), shape)


def crop_or_pad(array: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Crop or pad the last axes, about the centre, to `size`, (H, W) or (D, H, W). Padding is 0, the mean of a
    scan (of "minmax", its lowest)."""
    surplus = np.array(array.shape[-len(size) :]) - size
    cut, fill = surplus.clip(min=0), (-surplus).clip(min=0)
    array = array[(..., *(slice(n // 2, n // 2 + want) for n, want in zip(cut, size, strict=True)))]
    if not fill.any():
        return array  # np.pad copies, and takes longer than to read a slice
    return np.pad(array, [(0, 0)] * (array.ndim - len(size)) + [(n // 2, n - n // 2) for n in fill])


# -------------------------------------------------------------------------------------------------------------- cache


class CachedScan(NamedTuple):
    """A preprocessed scan on disk, slices first. `scan.open("image")` is float16 (D, H, W), as the network sees it;
    "mask" is uint8 on the same grid; "truth" is uint8 on the scan's own grid, and what is scored against; "spacing" is
    the scan's own, (3,) in mm; "values" are those of the label file, above 0."""

    name: str
    folder: Path

    def open(self, kind: str) -> np.ndarray:
        return open_array(self.folder / f"{kind}.npy")


@lru_cache(128)  # each holds a file descriptor, of which a process has 256 on some systems
def open_array(path: Path) -> np.ndarray:
    """A .npy file mapped into memory: pages are read when touched, and shared by all processes."""
    return np.load(path, mmap_mode="r")


def fingerprint(path: Path) -> list:
    """What tells a file from any other and from a later one of its name: path, bytes, times of the last change in ns.

    Programs that copy or unpack set the first time to what they like; the second is the system's own.
    """
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def cache_scan(pair: Pair, how: dict, cache_folder: Path) -> CachedScan:
    """Read, preprocess and store one scan and its mask, unless they lie in the cache already; `how`: see `preprocess`,
    and the keys `axis` and `label`.

    The folder's name tells files and preprocessing apart, and it is renamed into place when whole.
    """
    key = json.dumps([CODE, *map(fingerprint, pair[1:]), how])  # of both files
    folder = cache_folder / f"{pair.name[:50]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return CachedScan(pair.name, folder)
    scan, truth, values = read_pair(pair, how["axis"], how["label"])
    arrays = {"image": preprocess(scan.array, scan.spacing, how, pair.image), "truth": truth, "values": values,
              "mask": preprocess(truth, scan.spacing, how, pair.image), "spacing": scan.spacing}
    with one_line(folder):
        cache_folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache_folder, prefix=".") as temporary:
            whole = Path(temporary, "scan")
            whole.mkdir()
            for kind, array in arrays.items():
                np.save(whole / f"{kind}.npy", array)
            with contextlib.suppress(OSError):  # another run was faster
                whole.rename(folder)
            require(folder.is_dir(), f"{folder}: could not be written; choose another --cache")
    return CachedScan(pair.name, folder)


def cpu_count() -> int:
    """Cores that this process may use: fewer than there are under taskset, in a container, in a job of a cluster."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_scans(pairs: Sequence[Pair], how: dict, folder: str | Path) -> list[CachedScan]:
    """`cache_scan` for a whole data set, on up to four cores: reading and unzipping release Python's lock.

    No thread parses the header of a .npy file: before Python 3.11.8 and 3.12.2 that fails at random (gh-106905).
    """
    with ThreadPoolExecutor(min(4, cpu_count())) as pool:
        jobs = pool.map(partial(cache_scan, how=how, cache_folder=Path(folder)), pairs)
        scans = list(tqdm(jobs, "reading", len(pairs), unit=" scans", leave=False, disable=None))
    note_labels({scan.name: scan.open("values").tolist() for scan in scans}, how["label"])
    cut = [scan.name for scan in scans if how["crop"] and reaches_border(scan)]
    note(cut, f"--crop {how['crop']}: the organ reaches the border of what is left of {listed(cut)}; what was cut off "
         "is never called organ")
    return scans


def reaches_border(scan: CachedScan) -> bool:
    """Whether the organ reaches the border of its slices, or does not appear in them at all."""
    mask = scan.open("mask")
    gone = scan.open("truth").any() and not mask.any()
    return bool(gone or mask[:, [0, -1]].any() or mask[:, :, [0, -1]].any())


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
        raise DataError(f"{error}; `pip install imgaug`, or train with --augment none; if the name ends in .so, OpenCV "
                        "lacks a library: `apt-get install libgl1 libglib2.0-0`") from None
    cv2.setNumThreads(0)  # The workers are the parallelism; OpenCV's own threads would fight them for the cores.
    return imgaug.augmenters


CELL = 4  # pixels between the points of the grid that is warped in place of a picture


def augmenter(kind: str) -> Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    """A function `augment(image, mask, seed) -> (image, mask)` on float32 (..., H, W) and uint8 (..., H, W): slices
    of a patch, or channels.

    The same seed gives the same result, in whatever process. Masks are warped with nearest neighbour, and what comes in
    from outside the picture is 0: the mean, of a scan that was z-scored (of CT in HU it would be water). All slices of
    a patch (D, H, W) are warped and scaled alike; only the noise is each slice's own.

    Args:
        kind: "none"; "geometry": rotation by -45 to 45 degrees, scale 0.85 to 1.15, elastic deformation; "full": that,
            then contrast, brightness, noise and blur (intensities in deviations of the scan).

    Raises:
        ValueError: another kind.
    """
    if kind not in ("none", "geometry", "full"):
        raise ValueError(f"augment is {kind!r}; choose from none, geometry, full")
    if kind != "none":
        pipeline(kind)  # now, so that a missing library is told before the workers start
    return partial(augment_sample, kind)


@cache
def pipeline(kind: str):
    """imgaug's augmenters of geometry and of intensity, built once in each process: they cannot be unpickled in a
    spawned worker."""
    iaa = import_imgaug()
    from imgaug.random import RNG

    geometry = iaa.Sequential([  # of a grid with a point every CELL pixels
        # "edge": its outermost points lie outside the picture, where 0 is read.
        iaa.Affine(scale=(0.85, 1.15), rotate=(-45, 45), mode="edge"),
        # A random number for each point of the grid, up to `alpha` points (13 pixels), smoothed over `sigma`, which
        # leaves about one pixel.
        iaa.ElasticTransformation(alpha=(0.0, 3.3), sigma=(1.0, 2.0), order=1, mode="nearest"),
    ])
    intensity = iaa.Sequential([
        iaa.Multiply((0.6, 1.4)),  # contrast: the mean of a scan is 0
        iaa.Add((-0.7, 0.7)),  # brightness: wide, since in some scans the blood is as dark as muscle
        iaa.Sometimes(0.1, iaa.AdditiveGaussianNoise(scale=(0, 0.2), per_channel=True)),
        iaa.Sometimes(0.25, iaa.GaussianBlur(sigma=(0.0, 1.0))),
    ] if kind == "full" else [])
    generator = RNG(0)
    for augmenters in (geometry, intensity):
        for part in (augmenters, *augmenters.get_all_children(flat=True)):
            part.random_state = generator  # one for all, so that one state seeds them all
    return geometry, intensity


def augment_sample(kind: str, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """See `augmenter`."""
    if kind == "none":
        return image, mask
    geometry, intensity = pipeline(kind)
    import cv2
    from imgaug.augmentables import Batch

    # What `augmenters.seed_(seed)` is for, which is slow: it makes a generator for each.
    geometry.random_state.generator.bit_generator.state = np.random.SFC64(seed).state
    # To warp the picture twice would blur it twice, and take longer. What is warped is a coarse grid of places in it, x
    # and y, that reaches one point beyond each border; between its points they are interpolated, and every slice is
    # read once, there.
    height, width = image.shape[-2:]
    x, y = ((np.arange(-1, math.ceil(n / CELL) + 1, dtype=np.float32) + 0.5) * CELL - 0.5 for n in (width, height))
    # What `geometry(...)` calls after checks and copies that are not needed here.
    grid = geometry.augment_batch_(Batch([np.stack(np.meshgrid(x, y), axis=-1)])).images_aug[0]
    # Linearly: OpenCV's cubic gives back no straight line, and what is only turned would ripple.
    grid = cv2.resize(grid, None, fx=CELL, fy=CELL, interpolation=cv2.INTER_LINEAR)
    grid = grid[CELL : CELL + height, CELL : CELL + width]

    def warped(array: np.ndarray, interpolation: int) -> np.ndarray:
        slices = array.reshape(-1, height, width)
        return np.stack([cv2.remap(one, grid, None, interpolation) for one in slices]).reshape(array.shape)

    image, mask = warped(image, cv2.INTER_LINEAR), warped(mask, cv2.INTER_NEAREST)
    # To imgaug the slices of a patch are the channels of one picture (H, W, C), and so share contrast and blur.
    stack = intensity.augment_batch_(Batch([np.moveaxis(image.reshape(-1, height, width), 0, 2)])).images_aug[0]
    return np.moveaxis(stack, 2, 0).reshape(image.shape), mask


# ----------------------------------------------------------------------------------------------------------- data set


class SliceDataset(Dataset):
    """Augmented slices of cached scans; `dataset[i]` is image and mask, float32 (1, H, W).

    A sample depends on (seed, epoch, index) and on nothing else: not the worker, not their number, not how they were
    started. It holds no open file, so it can be pickled and its memory does not grow with the data.

    Args:
        scans: from `cache_scans`.
        size: (H, W) of every sample; a slice is cropped or padded to it.
        augment: see `augmenter`.
        seed: of the augmentation.
        samples: how many an epoch takes. The data set is as many whole rounds of the slices as hold them, each round
            augmented otherwise. A loop that takes `samples` of them, in random order, leaves the rest: so it may meet
            one slice twice, and another not at all.
    """

    def __init__(self, scans: Sequence[CachedScan], size: Sequence[int], *, augment: str = "none", seed: int = 0,
                 samples: int = 1):
        self.scans, self.size, self.seed, self.samples = list(scans), tuple(size), seed, samples
        # Scan and slice of each sample of a round.
        self.table = [(i, d) for i, scan in enumerate(self.scans) for d in range(len(scan.open("mask")))]
        self.augment = augmenter(augment)
        # In shared memory, so that workers that live through all epochs (persistent_workers) see it change.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation the next samples get."""
        self.epoch[0] = epoch

    def __len__(self) -> int:
        return math.ceil(self.samples / len(self.table)) * len(self.table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng([self.seed, int(self.epoch[0]), index])
        image, mask = (crop_or_pad(array[None], self.size) for array in self.cut(index, rng))
        image, mask = self.augment(image.astype(np.float32), mask, int(rng.integers(2**31)))
        return torch.from_numpy(np.ascontiguousarray(image)), torch.from_numpy(mask.astype(np.float32))

    def cut(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image and mask of a sample as they lie in the cache: here (H, W)."""
        i, d = self.table[index % len(self.table)]
        return self.scans[i].open("image")[d], self.scans[i].open("mask")[d]


class PatchDataset(SliceDataset):
    """Augmented random patches of cached scans; `dataset[i]` is image and mask, float32 (1, D, H, W).

    A round has as many patches of a scan as have its volume; they lie at random, so some overlap. Where a patch lies
    depends on (seed, epoch, index), like its augmentation.

    Args:
        size: (D, H, W) of a patch; a smaller scan is padded.
        foreground: share of the patches that are centred on a voxel of the organ, unless the scan ends there.
        others: see `SliceDataset`.
    """

    def __init__(self, scans: Sequence[CachedScan], size: Sequence[int], *, foreground: float = 1 / 3, **others):
        super().__init__(scans, size, **others)
        self.foreground = foreground
        patch = math.prod(size)
        # Instead of the slices: the scan of each patch of a round.
        self.table = [i for i, scan in enumerate(self.scans) for _ in range(math.ceil(scan.open("mask").size / patch))]

    def cut(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        scan = self.scans[self.table[index % len(self.table)]]
        image, mask = scan.open("image"), scan.open("mask")
        room = np.maximum(np.subtract(mask.shape, self.size), 0)  # the last place where a patch can begin
        start = rng.integers(room + 1)
        # As bool, of which numpy finds what is not 0 much faster than of uint8.
        if rng.random() < self.foreground and len(organ := np.flatnonzero(mask.view(bool))):
            centre = np.unravel_index(rng.choice(organ), mask.shape)
            start = np.clip(np.array(centre) - np.array(self.size) // 2, 0, room)
        patch = tuple(map(slice, start, start + self.size))
        return image[patch], mask[patch]


# ---------------------------------------------------------------------------------------------------- data-set check


def survey(pairs: Sequence[Pair]) -> tuple[list[float], float]:
    """From the headers alone, medians of: the spacing in mm along the patient's axes (see `patient_spacing`); the
    voxels along the shortest side."""
    images = [open_nifti(pair.image) for pair in pairs]
    spacing = np.median([patient_spacing(image) for image in images], axis=0).tolist()
    return spacing, float(np.median([min(image.shape[:3]) for image in images]))


def slice_axis(spacing: Sequence[float]) -> int:
    """The axis with the coarsest spacing; where several are equal the last, inferior-superior."""
    return max(range(3), key=lambda axis: (spacing[axis], axis))


def check(root: str | Path, label: Sequence[int] | None = None) -> None:
    """Print what is in a data set, a line for each scan. Raises DataError with a line for each problem."""
    pairs, problems = match_files(root)
    found = {}
    for pair in pairs:
        try:
            scan, mask, found[pair] = read_pair(pair, 2, label)
        except DataError as error:
            problems.append(str(error))
            continue
        low, high, axes = scan.array.min(), scan.array.max(), "".join(nib.aff2axcodes(scan.source.affine))
        print(f"{printable(pair.name):20} {listed(mask.shape, ' x '):>15} voxels of {listed(scan.spacing, ' x '):>21} "
              f"mm (D H W), stored {axes}, {low:.4g} to {high:.4g}, foreground {mask.mean():.2%}", flush=True)
    checksums(list(found))
    absent = [pair for pair, values in found.items() if not set(values).intersection(label or values)]
    if not label or len(absent) == len(found):
        problems += [f"{pair.label}: no voxel is foreground; check --label, or remove the scan" for pair in absent]
    # Where no value was chosen, a label without any is a problem already.
    note_labels({pair.name: values for pair, values in found.items() if values or label}, label)
    print(f"{len(pairs)} pairs, {len(problems)} problems", flush=True)
    if problems:
        raise DataError(*problems)


def printable(text: str) -> str:
    """A text in one line, whatever characters the name of a file holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def run_command(function: Callable, *args, stopped: str = "stopped") -> int:
    """Call `function(*args)` for a command line, and return the exit code: 0, 2 for a DataError, 130 for Ctrl-C.

    Warnings and errors are one line each, and a name that the terminal cannot print ends nothing.
    """
    script = Path(function.__code__.co_filename).name
    warnings.showwarning = lambda message, *_: print(f"note: {printable(str(message))}", file=sys.stderr)
    # Of a thread, TensorBoard's when the disk is full, one line, too: what used it raises the error once more.
    threading.excepthook = lambda failure: warnings.warn(first_line(failure.exc_value), stacklevel=2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")
    try:
        with one_line("the operating system"):
            function(*args)
    except DataError as error:
        for line in error.args:
            print(f"{script}: {printable(line)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a data set: what is in it, and every problem with its file.")
    parser.add_argument("data", metavar="DIR", help="folder with imagesTr/ and labelsTr/, or images/ and labels/")
    parser.add_argument("--label", type=int, nargs="+", metavar="N", help="values of the organ (default: all but 0)")
    args = parser.parse_args(argv)
    return run_command(check, args.data, args.label)


if __name__ == "__main__":
    sys.exit(main())
