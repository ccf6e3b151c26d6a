"""Masks for scans: a checkpoint and NIfTI files in, NIfTI masks on the scans' own grid out, scores if labels are given.

    Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
    Methods 18, 2021 (the sliding window with a Gaussian weight)

Contract: whatever orientation, spacing and size a scan is stored with, its mask is uint8 (1 = organ) of the same shape,
affine and header codes, and opens on top of it in 3D Slicer or ITK-SNAP. The checkpoint holds the network's arguments
and the preprocessing, so no flag repeats them. Needs data.py, metrics.py and unet.py beside it, but neither imgaug nor
OpenCV.

    python predict.py imagesTs --checkpoint runs/left-atrium/last.pt --out masks
    python predict.py scan.nii.gz --checkpoint last.pt --out masks --largest-component
    python predict.py DIR --checkpoint last.pt --out masks --labels DIR/labelsTr --held-out     # scores.csv, in mm
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import itertools
import math
import re
import sys
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

import data
from data import DataError, Scan, crop_or_pad, note, require
from metrics import score
from unet import UNet

# Of the checkpoint. To be raised, too, when `preprocess`, `undo_preprocess` or `UNet` come to mean something else.
VERSION = 4
# So begin the header fields that a mask copies from its scan: where the voxels lie, and nothing of what they meant.
GEOMETRY = ("pixdim", "xyzt", "q", "sform", "srow")

# ------------------------------------------------------------------------------------------------ device and precision


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises DataError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {data.first_line(error)}; use --device auto or cpu") from None


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic: weights, loss and optimiser are float32 in any case.

    `auto` is bfloat16 where the hardware has it, else float16 on CUDA (with a gradient scaler), else float32.
    Raises DataError for float16 elsewhere.
    """
    require(name != "fp16" or device.type == "cuda", f"--precision fp16: needs a CUDA GPU, this is {device}; use auto")
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # AVX512-BF16 or AMX; there is no public question for it yet. Without the instructions bfloat16 is emulated: slow.
    native = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return torch.bfloat16 if device.type == "cpu" and any(ask and ask() for ask in native) else torch.float32


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next step, instead of returning it to the kernel each time.

    Activations of 10s of MB are otherwise mapped, zeroed page by page and unmapped in every step.
    Does nothing on other systems, and nothing for a GPU, where PyTorch does the same by itself.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # absent in musl
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------- prediction


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of train.py, on the CPU: tensors and plain values only, so nothing in the file can be executed.

    Raises:
        DataError: no file, no checkpoint of this project, or one of another version.
    """
    require(Path(path).exists(), f"{path}: no such file; give the last.pt or best.pt of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"version", "model", "network", "preprocess", "split", "files", "doubt_below"} <= checkpoint.keys():
            raise KeyError
    except Exception as error:  # of a damaged pickle torch makes anything, IndexError and struct.error too
        code = re.search(r"GLOBAL (\S+)", str(error))
        found = f"holds code, {code[1]}, which was not run:" if code else "damaged, or"
        raise DataError(f"{path}: {found} no checkpoint of train.py; give the last.pt or best.pt of a run") from None
    require(checkpoint["version"] == VERSION, f"{path}: checkpoint version is {checkpoint['version']}, expected "
            f"{VERSION}; train it anew, or take the project as it was then")
    return checkpoint


def load_network(checkpoint: dict, device: torch.device | str = "cpu", path: str | Path = "the checkpoint") -> UNet:
    """The trained network of a checkpoint, in evaluation mode; `path` is what an error calls the checkpoint."""
    try:
        with torch.device("meta"):  # shapes without memory: a foreign file may claim a network of any size
            net = UNet(**checkpoint["network"])
        # Copies: else all networks of a checkpoint would share its tensors.
        net.load_state_dict({name: tensor.clone() for name, tensor in checkpoint["model"].items()}, assign=True)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DataError(f"{path}: weights do not fit the network ({data.first_line(error)}); train it anew") from None
    return net.to(device, torch.float32, memory_format=net.memory_format).eval()


@torch.inference_mode()
def predict_batch(net: UNet, images: np.ndarray, precision: torch.dtype = torch.float32) -> np.ndarray:
    """Probabilities float32 (B, *size) of images (B, *size), on the host, by a network of one channel and one mask."""
    device = next(net.parameters()).device
    x = torch.from_numpy(images.astype(np.float32))[:, None].to(device, memory_format=net.memory_format)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return net.predict(x).squeeze(1).cpu().numpy()


def predict_volume(net: UNet, volume: np.ndarray, *, size: Sequence[int] | None = None, smooth: float = 0,
                   precision: torch.dtype = torch.float32, batch_size: int = 16) -> np.ndarray:
    """Probabilities float32 (D, H, W) of a preprocessed volume (D, H, W), on the host: the GPU holds one batch of it.
    By a network of one channel and one mask.

    A window of `size`, the (H, W) or (D, H, W) of training, moves over the volume: a network sees the padding at the
    border of its input, and loses Dice where it is given other sizes than it was trained on. A smaller volume is padded
    to it as it was there, and cropped back. Without a size the volume is one window. In 2D `batch_size` slices go
    through the network at a time, which sees each alone; neighbours are then averaged by a Gaussian of `smooth` slices
    deviation. In 3D it is two windows at most, as `sliding_window` gives them.
    """
    size = tuple(volume.shape[-net.dims :] if size is None else size)
    window = size if net.dims == 3 else (len(volume), *size)  # in 2D it holds all slices, which `answer` takes apart

    def answer(windows: np.ndarray) -> np.ndarray:  # (N, D, H, W)
        images = windows.reshape(-1, *size)
        batches = np.array_split(images, math.ceil(len(images) / batch_size))
        return np.concatenate([predict_batch(net, batch, precision) for batch in batches]).reshape(windows.shape)

    probability = sliding_window(answer, crop_or_pad(volume, np.maximum(volume.shape, window)), window)
    if smooth:
        probability = ndimage.gaussian_filter1d(probability, smooth, axis=0, mode="nearest")
    return crop_or_pad(probability, volume.shape)


def sliding_window(function: Callable[[np.ndarray], np.ndarray], volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Move a window of `size` over a volume (D, H, W), and average what `function` makes of it, in the same shape.

    The windows go through `function` in pairs: alone, a small one in 3D would not get a CPU's fast convolutions.
    Neighbouring windows share at least half of their length. Each counts with a Gaussian about its centre, of
    deviation `size / 8`: a network knows least at the border of what it sees (Isensee et al. 2021).
    """
    if volume.shape == tuple(size):
        return function(volume[None])[0]
    total, weight = np.zeros((2, *volume.shape), np.float32)
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size]
    gaussian = np.einsum("d,h,w->dhw", *axes).astype(np.float32).clip(1e-6)  # no voxel of weight 0
    starts = [np.linspace(0, n - w, 1 + math.ceil((n - w) / (w / 2))).round().astype(int)
              for n, w in zip(volume.shape, size, strict=True)]
    windows = [tuple(map(slice, start, np.add(start, size))) for start in itertools.product(*starts)]
    for pair in (windows[i : i + 2] for i in range(0, len(windows), 2)):
        for window, values in zip(pair, function(np.stack([volume[window] for window in pair])), strict=True):
            total[window] += gaussian * values
            weight[window] += gaussian
    return total / weight


def confidence(probability: np.ndarray) -> float:
    """Mean probability of the voxels that are called organ, 0.5 to 1; 0 where there are none. Low where in doubt."""
    called = probability[probability > 0.5]
    return float(called.mean()) if called.size else 0.0


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest face-connected part of a bool mask, any number of axes; an empty mask stays empty."""
    parts, count = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else mask


def description(mask: np.ndarray, scan: str | Path) -> bytes:
    """What stands in the header of a mask: by it predict.py knows its mask of this scan file again, unless somebody has
    redrawn it."""
    sums = [zlib.crc32(content) for content in (np.uint8(mask).tobytes(), Path(scan).read_bytes())]
    return "mask: 1 is the organ; {:08x} of {:08x}".format(*sums).encode()


def write_on_scan_grid(path: Path, array: np.ndarray, scan: Scan) -> None:
    """Write a mask (D, H, W) as uint8, .nii.gz, on the scan's own grid: the file's shape, affine and header codes."""
    source, mask = scan.source, scan.restore(array).astype(np.uint8)
    header = type(source.header)()
    header.set_data_shape(source.shape)
    for field in header:
        if field.startswith(GEOMETRY):
            header[field] = source.header[field]
    header["cal_max"] = 1  # cal_min and cal_max: what a viewer shows
    header["descrip"] = description(mask, source.get_filename())
    image = type(source)(mask, source.affine, header, dtype=np.uint8)
    # As nibabel packs: fast, and the same bytes for the same mask.
    data.write_atomically(path, gzip.compress(image.to_bytes(), 1, mtime=0))


# --------------------------------------------------------------------------------------------------------- the command


def find_scans(paths: Sequence[str], labelled: bool = False, known: Collection[str] = ()) -> dict[str, Path]:
    """Scans of files and folders, by name, see `data.by_name`. Of a data set's root, those to predict, or those that
    have labels."""
    folders = ("imagesTr", "images") if labelled else ("imagesTs", "images", "imagesTr")
    files: list[Path] = []
    for path in map(Path, paths):
        folder = next((path / name for name in folders if (path / name).is_dir()), path)
        own = folder != path and any(file.name.lower().endswith(data.NIFTI) for file in path.iterdir())
        note(own, f"{path}: its own scans are left out, those of {folder.name}/ are taken")
        files += data.nifti_files(folder) if folder.is_dir() else [path]
    return data.by_name(files, known)


def predict_scan(path: str | Path, net: UNet, how: dict, precision: torch.dtype = torch.float32,
                 batch_size: int = 16) -> tuple[Scan, np.ndarray]:
    """A scan file, and the probabilities float32 (D, H, W) on its own grid; `how`: the checkpoint's preprocessing."""
    scan = data.read_scan(path, how["axis"])
    volume = data.preprocess(scan.array, scan.spacing, how, path)
    try:
        probability = predict_volume(net, volume, size=how["size"], smooth=how["smooth"] / scan.spacing[0],
                                     precision=precision, batch_size=batch_size)
    except torch.cuda.OutOfMemoryError:
        raise DataError(f"{path}: out of GPU memory; lower --batch-size {batch_size}, or --device cpu") from None
    return scan, data.undo_preprocess(probability, scan.array.shape, how)


def summarise(rows: Sequence[dict]) -> str:
    """Scores as text: a line for each scan, the worst first, then mean, standard deviation and worst over the scans.

    A row has `name`, `dice`, and what else of `metrics.score` there is. Of a distance the mean is over the scans where
    it is finite; the others are counted.
    """
    shown = [name for name in ("dice", "jaccard", "hd95", "assd") if name in rows[0]]
    wide = max(len("scan"), *(len(row["name"]) for row in rows))
    lines = [f"{'scan':{wide}}" + "".join(f"{name:>10}" for name in shown)]
    for row in sorted(rows, key=lambda row: row["dice"]):
        lines.append(f"{data.printable(row['name']):{wide}}" + "".join(f"{row[name]:10.4f}" for name in shown))
    for name in shown:
        values = np.array([row[name] for row in rows])
        finite = values[np.isfinite(values)]
        if len(finite):
            spread = f"SD {finite.std():.4f}, {finite.min():.4f} to {finite.max():.4f}"
            lines.append(f"{name:8} {finite.mean():.4f} ({spread})")
    if "hd95" in shown and len(finite) < len(rows):
        lines.append(f"{len(rows) - len(finite)} scans with one mask empty are left out of the distances")
    return "\n".join(lines)


def choose_files(args: argparse.Namespace, checkpoint: dict) -> tuple[dict, dict, dict]:
    """Scans, their labels where some are given, and the masks to be written: paths by name. Nothing is written yet.

    Raises:
        DataError: a file that is missing or damaged, or a mask that would overwrite what predict.py did not write.
    """
    trained, kept, known = checkpoint["split"]["train"], checkpoint["split"]["val"], checkpoint["files"]
    scans = find_scans(args.scans, bool(args.labels or args.held_out), known)
    if args.held_out:  # by name
        scans = {name: path for name, path in scans.items() if name in kept}
        require(scans, f"--held-out: the scans that the run kept are {', '.join(kept) or 'none'}; none is here")
        note(len(scans) < len(kept), f"{len(scans)} of the {len(kept)} scans that the run kept are here")
    labels = data.by_name(data.nifti_files(Path(args.labels)), known) if args.labels else {}
    unlabelled = sorted(scans.keys() - labels.keys()) if labels else []
    require(not unlabelled, f"{args.labels}: no label for {data.listed(unlabelled)}; they are matched by name")
    sums = {name: zlib.crc32(path.read_bytes()) for name, path in scans.items()}
    others = [name for name, crc in sums.items() if name in known and known[name][0] != crc]
    note(args.held_out and others, f"another file than the run's, but for the name: {data.listed(others)}")
    if labels:  # of these scans alone; trained on, by name, and by content: scans may have been numbered anew
        labels = {name: labels[name] for name in scans}
        learnt = {known[name][0] for name in trained if name in known}
        seen = [name for name, crc in sums.items() if name in trained or crc in learnt]
        note(seen, f"by name or content, the network was trained on {len(seen)} of these {len(scans)} scans: "
             f"{data.listed(seen)}; scores on them say nothing about new scans")
    channels = [name for name in scans if name.endswith("_0001") and f"{name[:-4]}0000" in scans]
    note(channels and not labels, f"{data.listed(channels)}: if these are second channels of a patient, as nnU-Net "
         "numbers them, leave them out")
    masks = {name: Path(args.out, f"{name}.nii.gz") for name in scans}
    files = [*scans.values(), *labels.values()]
    both = {str(path.resolve()) for path in files} & {str(path.resolve()) for path in masks.values()}
    require(not both, f"{data.listed(sorted(both))}: a mask would overwrite a scan or a label; choose another --out")
    for path in files:
        data.open_nifti(path)
    for name, path in masks.items():
        if path.exists():  # drawn or corrected by hand, for instance, or of another patient's scan of that name
            image = data.open_nifti(path)
            ours = image.header["descrip"] == description(data.read_voxels(image, path), scans[name])
            require(ours, f"{path}: was there before, and predict.py did not write it so of {scans[name]}; choose "
                    "another --out")
    there = sorted({path.name for path in Path(args.out).glob("*.nii*")} - {path.name for path in masks.values()})
    note(there, f"{args.out} holds masks that were there before: {data.listed(there)}")
    table = Path(args.out, "scores.csv")
    note(table.exists() and not labels, f"{table} was there before: it is not of these masks")
    ours = not labels or not table.exists() or table.read_bytes().startswith(b"name,mask,confidence,")
    require(ours, f"{table}: was there before, and predict.py did not write it; choose another --out")
    return scans, labels, masks


def predict(args: argparse.Namespace) -> list[dict]:
    """Predict every scan of `args.scans`; returns a row for each: name, mask, confidence, and its scores where there is
    a label."""
    require(args.batch_size > 0, f"--batch-size {args.batch_size}: expected at least 1")
    device = pick_device(args.device)
    checkpoint, precision = load_checkpoint(args.checkpoint), pick_precision(args.precision, device)
    net, how = load_network(checkpoint, device, args.checkpoint), checkpoint["preprocess"]
    scans, labels, masks = choose_files(args, checkpoint)
    keep_freed_memory()
    if labels:  # else those of earlier masks would stay beside the new ones, if this breaks off
        Path(args.out, "scores.csv").unlink(missing_ok=True)

    rows, values = [], {}
    bar = "{desc} {n_fmt} of {total_fmt} scans, {remaining} left |{bar}|"
    for name, path in tqdm(scans.items(), "predicting", bar_format=bar, disable=None):
        scan, probability = predict_scan(path, net, how, precision, args.batch_size)
        mask = largest_component(probability > 0.5) if args.largest_component else probability > 0.5
        rows.append({"name": name, "mask": str(masks[name]), "confidence": confidence(probability)})
        if labels:  # first: of a broken label, no mask
            truth, values[name] = data.read_label(labels[name], scan, how["label"])
            rows[-1] |= score(mask, truth > 0, scan.spacing)
        write_on_scan_grid(masks[name], mask, scan)
    print(f"{len(rows)} masks in {args.out}")
    for row in rows:
        name = data.printable(row["name"])
        if row["confidence"] == 0:
            print(f"{name}: empty, no voxel is called organ")
        elif row["confidence"] < checkpoint["doubt_below"]:
            print(f"{name}: doubtful, confidence {row['confidence']:.3f}, below {checkpoint['doubt_below']:.3f}")
        if row.get("truth_ml") == 0:
            print(f"{name}: its label holds no voxel of the organ")
    if labels:
        data.note_labels(values, how["label"])
        data.write_csv(Path(args.out, "scores.csv"), rows)
        print(f"{summarise(rows)}\n{args.out}/scores.csv")
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write masks for scans, and score them if labels are given.")
    add = parser.add_argument
    add("scans", nargs="+", metavar="SCAN_OR_FOLDER", help=".nii, .nii.gz, or a folder of them")
    add("--checkpoint", required=True, metavar="FILE", help="last.pt or best.pt of a run")
    add("--out", required=True, metavar="DIR", help="folder for the masks")
    add("--labels", metavar="DIR", help="label files of the same names: scores.csv and a summary")
    add("--held-out", action="store_true", help="only the scans that the run kept for validation")
    add("--largest-component", action="store_true", help="keep the largest connected part only")
    add("--batch-size", type=int, default=16, metavar="N",
        help="slices at a time, in 3D at most 2 patches (default: 16)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps (default: a GPU where there is one)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="of the network's arithmetic (default: bf16 where the hardware has it)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    return data.run_command(predict, parse_args(argv), stopped="stopped; the masks written so far are whole")


if __name__ == "__main__":
    sys.exit(main())
