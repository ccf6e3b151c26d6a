"""Masks for scans: a checkpoint and NIfTI files in, NIfTI masks on the scans' own grid out, scores if labels are given.

Contract: whatever orientation, spacing and size a scan is stored with, its mask is uint8 (1 = organ) of the same shape,
affine and header codes, and opens on top of it in 3D Slicer or ITK-SNAP. The checkpoint holds the network's arguments
and the preprocessing, so no flag repeats them. Needs neither imgaug nor OpenCV.

    python predict.py imagesTs --checkpoint runs/left-atrium/last.pt --out masks
    python predict.py scan.nii.gz --checkpoint last.pt --out masks --largest-component --movie
    python predict.py DIR --checkpoint last.pt --out masks --labels DIR/labelsTr --held-out     # scores.csv, in mm
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

import data
import visualize
from data import (
    DataError,
    Pair,
    Scan,
    find_pairs,
    fit,
    nifti_files,
    open_nifti,
    preprocess,
    read_mask,
    read_scan,
    undo_preprocess,
    with_neighbours,
    write_atomically,
)
from metrics import score
from unet import UNet

VERSION = 1  # of the checkpoint; train.py writes it, load_checkpoint understands it

# ------------------------------------------------------------------------------------------------ device and precision


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises DataError for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}; use --device auto or cpu") from None
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the network's arithmetic: weights, loss and optimiser are float32 in any case.

    `auto` is bfloat16 where the hardware has it, else float16 on CUDA (with a gradient scaler), else float32.
    """
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
    if sys.platform == "linux":
        import ctypes

        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in musl
        if mallopt:
            M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ---------------------------------------------------------------------------------------------------------- prediction


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint of train.py: tensors and plain values only, so nothing in the file can be executed.

    Raises:
        DataError: no file, no checkpoint of this project, or one of another version.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; train.py writes last.pt and best.pt into its run folder") from None
    except Exception as error:  # of a damaged pickle torch makes anything, IndexError and struct.error too
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path}: not a checkpoint that can be loaded safely ({reason})") from None
    missing = {"model", "network", "preprocess", "version"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise DataError(f"{path}: not a checkpoint of train.py, it lacks {', '.join(sorted(missing))}")
    if checkpoint["version"] != VERSION:
        raise DataError(f"{path}: checkpoint version is {checkpoint['version']}, expected {VERSION}; train it anew")
    missing = {"axis", "label", "spacing", "crop", "normalise", "size"} - set(checkpoint["preprocess"])
    if missing:
        raise DataError(f"{path}: its preprocessing lacks {', '.join(sorted(missing))}; train it anew")
    return checkpoint


def load_network(checkpoint: dict, device: torch.device | str = "cpu", path: str | Path = "the checkpoint") -> UNet:
    """The trained network of a checkpoint, in evaluation mode; `path` is what an error calls the checkpoint."""
    try:
        with torch.device("meta"):  # shapes without memory: a foreign file may claim a network of any size
            net = UNet(**checkpoint["network"])
        net.load_state_dict(checkpoint["model"], assign=True)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: its weights do not fit its network ({reason}); train it anew") from None
    return net.to(device, torch.float32, memory_format=net.memory_format).eval()


@torch.inference_mode()
def probabilities(net: UNet, x: np.ndarray, precision: torch.dtype) -> np.ndarray:
    """Float32 (B, *size) of float32 images (B, C, *size)."""
    device = next(net.parameters()).device
    images = torch.from_numpy(np.ascontiguousarray(x)).to(device, memory_format=net.memory_format)
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return net.predict(images)[:, 0].cpu().numpy()


def predict_volume(
    net: UNet,
    volume: np.ndarray,
    *,
    size: Sequence[int] = (1, 1),
    precision: torch.dtype = torch.float32,
    batch_size: int = 16,
) -> np.ndarray:
    """Probabilities float32 (D, H, W) of a preprocessed volume (D, H, W), on the host: the GPU holds one batch of it.

    In 2D `batch_size` slices go through the network at a time. Slices smaller than `size`, the (H, W) of training, are
    padded to it as they were there, and cropped back: a network with batch norm is used to the padding, and loses Dice
    without it. Larger ones stay whole. In 3D see `slide`; a volume smaller than the window is padded likewise.
    """
    if net.dims == 3:
        padded = fit(np.asarray(volume, np.float32), np.maximum(volume.shape, size))
        return fit(slide(lambda x: probabilities(net, x, precision), padded, size), volume.shape)
    shape, probability = volume.shape[1:], np.empty(volume.shape, np.float32)
    for start in range(0, len(volume), batch_size):
        slices = range(start, min(start + batch_size, len(volume)))
        x = fit(with_neighbours(volume, slices, net.in_channels // 2), np.maximum(shape, size))
        probability[slices.start : slices.stop] = fit(probabilities(net, x, precision), shape)
    return probability


def slide(function: Callable, volume: np.ndarray, size: Sequence[int], overlap: float = 0.5) -> np.ndarray:
    """Move a window over a volume (D, H, W), and average what `function`, (1, 1, *size) -> (1, *size), says of it.

    Neighbouring windows share at least `overlap` of their length. Each counts with a Gaussian about its centre, of
    deviation `size / 8`: a network knows least at the border of what it sees (Isensee et al., nnU-Net, 2021).
    """
    total, weight = np.zeros((2, *volume.shape), np.float32)
    axes = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in size]
    gaussian = np.einsum("d,h,w->dhw", *axes).astype(np.float32).clip(1e-6)  # no voxel of weight 0
    steps = [math.ceil((n - w) / (w * (1 - overlap))) for n, w in zip(volume.shape, size, strict=True)]
    starts = [np.linspace(0, n - w, k + 1).round() for n, w, k in zip(volume.shape, size, steps, strict=True)]
    for start in itertools.product(*(places.astype(int) for places in starts)):
        window = tuple(slice(place, place + w) for place, w in zip(start, size, strict=True))
        total[window] += gaussian * function(volume[window][None, None])[0]
        weight[window] += gaussian
    return total / weight


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest face-connected part of a bool mask, any number of axes; an empty mask stays empty."""
    parts, count = ndimage.label(mask)
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count else mask


def write_like(path: Path, array: np.ndarray, scan: Scan) -> None:
    """Write an array (D, H, W) on the scan's own grid: the file's shape, affine and header codes, the array's dtype."""
    source = scan.source
    image = type(source)(scan.restore(array), source.affine, source.header)
    image.set_data_dtype(array.dtype)
    image.header.set_slope_inter(1, 0)
    image.header["cal_min"] = image.header["cal_max"] = 0  # the scan's display window would hide a mask of 0 and 1
    content = image.to_bytes()
    if path.suffix == ".gz":
        content = gzip.compress(content, 1, mtime=0)  # as nibabel does: fast, and the same bytes for the same mask
    write_atomically(path, lambda file: file.write(content))


# --------------------------------------------------------------------------------------------------------- the command


def find_scans(paths: Sequence[str]) -> list[Pair]:
    """The scans of files and folders, in the order given."""
    pairs = []
    for path in map(Path, paths):
        if path.is_dir():
            pairs += find_pairs(path, labels=False)
        else:
            name = path.name.removesuffix(".gz").removesuffix(".nii").removesuffix("_0000")
            pairs.append(Pair(name, path))
    names = [pair.name for pair in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{twice[0]}: given twice; their masks would have one name, predict them into two folders")
    return pairs


def table(rows: Sequence[dict]) -> str:
    """A line for each scan, the worst first, under a line of headings."""
    wide = max(len("scan"), *(len(row["name"]) for row in rows))
    lines = [f"{'scan':{wide}}    Dice  HD95 mm  ASSD mm"]
    for row in sorted(rows, key=lambda row: row["dice"]):
        lines.append(f"{row['name']:{wide}}  {row['dice']:.4f}  {row['hd95']:7.2f}  {row['assd']:7.2f}")
    return "\n".join(lines)


def summarise(rows: Sequence[dict]) -> str:
    """One line: Dice over the scans (mean, standard deviation, worst), distances where both masks have voxels."""
    dice = np.array([row["dice"] for row in rows])
    worst = rows[int(dice.argmin())]
    line = (
        f"Dice {dice.mean():.4f} ± {dice.std():.4f} over {len(rows)} scans, worst {worst['dice']:.4f} ({worst['name']})"
    )
    line += f", Jaccard {np.mean([row['jaccard'] for row in rows]):.4f}"
    for name in ("hd95", "assd"):
        finite = [row[name] for row in rows if np.isfinite(row[name])]
        if finite:
            line += f", {name.upper()} {np.mean(finite):.2f} ± {np.std(finite):.2f} mm"
    failed = sum(not np.isfinite(row["hd95"]) for row in rows)
    return line + (f"; {failed} scans with one mask empty are left out of the distances" if failed else "")


def predict(args: argparse.Namespace) -> list[dict]:
    """Predict every scan of `args.scans`; returns a row for each: name, mask, and its scores where there is a label."""
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint)
    net, recipe = load_network(checkpoint, device, args.checkpoint), checkpoint["preprocess"]
    precision = pick_precision(args.precision, device)
    keep_freed_memory()
    out = Path(args.out)
    pairs, split = find_scans(args.scans), checkpoint.get("split", {"train": [], "val": []})
    if args.held_out:
        pairs = [pair for pair in pairs if pair.name in split["val"]]
        if not pairs:
            raise DataError(
                f"--held-out: none of the scans is among the {len(split['val'])} validation scans of the run"
            )
    labels = nifti_files(Path(args.labels)) if args.labels else {}
    unlabelled = [pair.name for pair in pairs if args.labels and pair.name not in labels]
    if unlabelled:
        raise DataError(f"{args.labels}: no label for {', '.join(unlabelled)}; scans and labels are matched by name")
    seen = [pair.name for pair in pairs if pair.name in split["train"]]
    if args.labels and seen:
        print(f"note: {len(seen)} of {len(pairs)} scans have names that the network was trained on; "
              "scores on them say nothing about new scans (--held-out leaves them out)", file=sys.stderr)

    for pair in pairs:
        open_nifti(pair.image)  # before the first mask is written: a header costs nothing
    rows: list[dict] = []
    for pair in tqdm(pairs, desc="predicting", unit=" scans", disable=None):
        target = out / (f"{pair.name}.nii" if pair.image.suffix == ".nii" else f"{pair.name}.nii.gz")
        if target.resolve() == pair.image.resolve():
            raise DataError(f"{pair.image}: the mask would overwrite the scan; choose another --out")
        scan = read_scan(pair.image, recipe["axis"])
        truth = read_mask(labels[pair.name], scan, recipe["axis"], recipe["label"]) if labels else None
        try:
            volume = preprocess(scan.array, scan.spacing, recipe)
            probability = predict_volume(
                net, volume, size=recipe["size"], precision=precision, batch_size=args.batch_size
            )
        except DataError as error:
            raise DataError(f"{pair.image}: {error}") from None
        except torch.OutOfMemoryError:
            raise DataError(f"{pair.image}: out of GPU memory; lower --batch-size {args.batch_size}") from None
        probability = undo_preprocess(probability, scan.array.shape, recipe)
        mask = probability > 0.5
        if args.largest_component:
            mask = largest_component(mask)
        write_like(target, mask.astype(np.uint8), scan)
        if args.probability:
            write_like(target.with_name(f"{pair.name}_probability{target.name[len(pair.name) :]}"), probability, scan)
        if args.movie:
            masks = [mask] if truth is None else [mask, truth.astype(bool)]
            visualize.save_gif(visualize.movie(scan.array, masks, scan.spacing), out / f"{pair.name}.gif")
        rows.append({"name": pair.name, "mask": str(target)})
        if truth is not None:
            rows[-1] |= score(mask, truth.astype(bool), scan.spacing)
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write masks for scans, and score them if labels are given.")
    parser.add_argument("scans", nargs="+", metavar="SCAN_OR_FOLDER", help=".nii, .nii.gz, or a folder of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="last.pt or best.pt of a run")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the masks")
    parser.add_argument("--labels", metavar="DIR", help="label files of the same names: scores.csv and a summary")
    parser.add_argument("--held-out", action="store_true", help="only the scans that the run kept for validation")
    parser.add_argument("--probability", action="store_true", help="also write the probabilities, as float32")
    parser.add_argument("--largest-component", action="store_true", help="keep the largest connected part only")
    parser.add_argument("--movie", action="store_true", help="also a GIF of mask over scan, slice by slice")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="slices at a time (default %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default %(default)s)")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--max-gb", type=float, default=data.MAX_GB, help="memory for one scan (default: half of all)")
    parser.print_usage = lambda _: None  # an error is one line
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    data.MAX_GB = args.max_gb
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    try:
        if args.batch_size < 1:
            raise DataError(f"--batch-size {args.batch_size}: expected at least 1")
        rows = predict(args)
        if args.labels:
            path, text = Path(args.out) / "scores.csv", io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    except (DataError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(rows)} masks in {args.out}")
    if args.labels:
        print(f"{path}\n\n{table(rows)}\n{summarise(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
