"""Pictures of scans, masks and training runs: looking often tells more than a score.

    Okabe and Ito, "Color Universal Design", 2008 (the colours: safe for colour-blind readers)

Contract: a scan is (D, H, W), slices first, in any unit, and upright: in an axial slice rows run to the patient's
posterior, columns to the left. Spacing is (D, H, W) in mm, and every picture keeps its proportions. A mask has the
scan's shape; non-zero is foreground. Of two masks the first is a prediction, the second the truth, and their errors are
shown. Arrays go in; a matplotlib `Figure` comes out, or frames, uint8 RGB (H, W, 3). Nothing touches pyplot's global
state: no display is needed, and no figure stays open in a long run.

    python visualize.py overlay scan.nii.gz prediction.nii.gz truth.nii.gz --out overlay.png
    python visualize.py movie   scan.nii.gz prediction.nii.gz --out movie.gif
    python visualize.py curves  runs/first runs/second --out curves.png
    python visualize.py augment scan.nii.gz mask.nii.gz --kind full --out augment.png
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import cycle, zip_longest
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

ERRORS = {"correct": (86, 180, 233), "missed": (240, 228, 66), "false": (213, 94, 0)}  # sky blue, yellow, vermilion
MASKS = ((86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115))  # sky blue, orange, purple, bluish green
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # the darker ones, for a white background
FILL = 0.45  # Opacity inside a mask's rim: the tissue under it must stay readable.
WIDTH = 900  # Pixels of a figure: what a README shows.


# ----------------------------------------------------------------------------------------------------------- one slice


def grey(scan: np.ndarray, window: Sequence[float] | None = None) -> np.ndarray:
    """Intensities as uint8 of the same shape; `window` is (black, white), by default the 0.5 and 99.5 percentiles."""
    scan = np.nan_to_num(np.asarray(scan, np.float32), posinf=0, neginf=0)
    sample = scan.ravel()[:: 1 + scan.size // 1_000_000]  # A million voxels fix a percentile well enough.
    black, white = np.percentile(sample, (0.5, 99.5)) if window is None else window
    return ((scan - black) * (255 / max(white - black, 1e-12))).clip(0, 255).astype(np.uint8)


def legend(count: int) -> dict[str, tuple[int, int, int]]:
    """What `count` masks are drawn as: names and colours."""
    return ERRORS if count == 2 else {f"mask {n + 1}": MASKS[n % len(MASKS)] for n in range(count)}


def regions(masks: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """The areas that `legend` names: the masks, or, of two, where they agree and how they differ."""
    if len(masks) != 2:
        return masks
    prediction, truth = masks[0] > 0.5, masks[1] > 0.5
    return prediction & truth, truth & ~prediction, prediction & ~truth


def paint(picture: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (H, W) and masks (H, W), bool or probabilities, to RGB: the rim at 0.5 is opaque, the inside a tint."""
    rgb = np.repeat(picture[..., None], 3, axis=-1).astype(np.float32)  # (H, W, 3)
    for area, colour in zip(regions(masks), legend(len(masks)).values(), strict=True):
        inside = np.pad(area > 0.5, 1)
        core = (
            inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        )  # All four neighbours are in.
        rgb += np.where((area > 0.5) & ~core, 1, FILL * area)[..., None] * (np.float32(colour) - rgb)
    return np.rint(rgb).astype(np.uint8)


def strip(width: int, words: Sequence[str], colours: Sequence = ()) -> np.ndarray:
    """A line of text, RGB (22, width, 3), white on black: each word in the middle of its equal share of the width."""
    image = Image.new("RGB", (width, 22))
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 13)
    for n, (word, colour) in enumerate(zip_longest(words, colours, fillvalue="white")):
        ImageDraw.Draw(image).text(((n + 0.5) * width / len(words), 11), word, colour, font, "mm")
    return np.array(image)


def centred(picture: np.ndarray, width: int) -> np.ndarray:
    """A picture with black left and right of it, at least `width` wide."""
    room = max(0, width - picture.shape[1])
    return np.pad(picture, ((0, 0), (room // 2, room - room // 2), (0, 0)))


def key(width: int, count: int) -> np.ndarray:
    """The legend of `count` masks as a line of text."""
    names = legend(count)
    return centred(strip(min(width, 100 * count), list(names), names.values()), width)


def frame(picture: np.ndarray, masks: Sequence, spacing: Sequence[float], size: int, caption: str = "") -> np.ndarray:
    """One slice as RGB in its true proportions, `size` pixels on the longer side.

    Args:
        picture: uint8 (H, W).
        masks: arrays (H, W), bool or probabilities.
        spacing: (H, W) in mm.
        caption: adds a line below, with it and a scale bar.
    """
    zoom = size / max(np.multiply(picture.shape, spacing))  # pixels per mm
    shape = [max(1, round(n * mm * zoom)) for n, mm in zip(picture.shape, spacing, strict=True)][::-1]
    # The scan is interpolated, a mask is not: one wants to see which voxels it holds.
    masks = [np.array(Image.fromarray(np.float32(mask)).resize(shape, Image.Resampling.NEAREST)) for mask in masks]
    rgb = paint(np.array(Image.fromarray(picture).resize(shape, Image.Resampling.BILINEAR)), masks)
    if not caption:
        return rgb
    rgb = centred(rgb, 200)  # what the caption needs
    bar = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm * zoom < rgb.shape[1] / 3), default=1)
    below = strip(rgb.shape[1], (caption, f"{bar} mm"))
    left = round(0.75 * rgb.shape[1] - bar * zoom / 2)
    below[-2:, left : left + round(bar * zoom)] = 255
    return np.concatenate((rgb, below))


# ------------------------------------------------------------------------------------------------- figures and frames


def panels(pictures: Sequence[np.ndarray], columns: int, headings=(), titles=(), masks: int = 0) -> Figure:
    """RGB pictures of one size, row by row; headings above the columns, titles above the rows, the legend below."""
    cells = [np.pad(picture, ((2, 2), (2, 2), (0, 0))) for picture in pictures]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    rows = [np.concatenate(cells[n : n + columns], axis=1) for n in range(0, len(cells), columns)]
    lines = [strip(rows[0].shape[1], headings)] if headings else []
    for row, title in zip_longest(rows, titles):
        lines += [strip(row.shape[1], [title]), row] if title else [row]
    lines += [key(rows[0].shape[1], masks)] if masks > 1 else []
    sheet = np.concatenate(lines)
    # One image, pixel for pixel, instead of axes for each picture: ten times as fast, and training waits for it.
    figure = Figure((sheet.shape[1] / 100, sheet.shape[0] / 100), dpi=100)
    figure.add_axes((0, 0, 1, 1)).set_axis_off()
    figure.axes[0].imshow(sheet, aspect="auto", interpolation="nearest")
    return figure


def compare(images: np.ndarray, truths: np.ndarray, predictions: np.ndarray, titles: Sequence[str] = ()) -> Figure:
    """Scan, truth, prediction and error of N slices, one row each.

    Args:
        images: (N, H, W) in any range.
        truths: (N, H, W), non-zero is foreground.
        predictions: (N, H, W), bool or probabilities: the tint is as strong as they are, rim and error those at 0.5.
        titles: N lines, each above its row.
    """
    shapes = [np.shape(array) for array in (images, truths, predictions)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(f"images, truths, predictions: shapes are {shapes}; expected one shape (N, H, W)")
    low, high = np.min(predictions), np.max(predictions)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"predictions: values are {low:g} to {high:g}; expected 0 to 1: give a mask or the sigmoid")
    pictures = []
    for image, truth, prediction in zip(images, np.not_equal(truths, 0), predictions, strict=True):
        for masks in ((), (truth,), (prediction,), (prediction, truth)):
            pictures.append(frame(grey(image), masks, (1, 1), WIDTH // 4 - 4))
    return panels(pictures, 4, ("scan", "truth", "prediction", "error"), titles or (), masks=2)


def check(scan: np.ndarray, masks: Sequence[np.ndarray]) -> None:
    if np.ndim(scan) != 3 or any(np.shape(mask) != np.shape(scan) for mask in masks):
        found = [np.shape(mask) for mask in masks]
        raise ValueError(f"scan {np.shape(scan)}, masks {found}; expected (D, H, W) and a list of masks of that shape")


def views(scan: np.ndarray, masks: Sequence, spacing: Sequence[float], slices: Sequence[int], size: int) -> list:
    """A captioned frame for each of `slices`; the caption counts from 1."""
    pictures, masks = grey(scan), [np.not_equal(mask, 0) for mask in masks]
    frames = []
    for n in slices:
        caption = f"slice {n + 1} / {len(scan)}"
        frames.append(frame(pictures[n], [mask[n] for mask in masks], spacing[1:], size, caption))
    return frames


def movie(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], size: int = 320) -> list[np.ndarray]:
    """A frame for each slice, with the masks over it; `size` is the longer side of the slice, in pixels."""
    check(scan, masks)
    frames = views(scan, masks, spacing, range(len(scan)), size)
    if len(masks) < 2:
        return frames
    return [np.concatenate((picture, key(picture.shape[1], len(masks)))) for picture in frames]


def overlay(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], count: int = 8) -> Figure:
    """`count` slices with the masks over them, spread evenly over those with foreground (over all if there is none)."""
    check(scan, masks)
    held = np.flatnonzero(np.any([np.any(mask, axis=(1, 2)) for mask in masks], axis=0))
    held = held if len(held) else np.arange(len(scan))
    slices = held[np.unique(np.linspace(0, len(held) - 1, count).round().astype(int))]
    pictures = views(scan, masks, spacing, slices, WIDTH // 4 - 4)
    return panels(pictures, min(4, len(pictures)), masks=len(masks))


def augmented(image: np.ndarray, mask: np.ndarray, augment: Callable, spacing: Sequence[float] = (1, 1)) -> Figure:
    """5 x 5 views of one slice: as it is, then `augment(image, mask, entropy)` for entropy 1 to 24.

    Args:
        image: float32 (H, W). All views share its window of intensities, so that a change of brightness shows.
        mask: uint8 (H, W), 0 or 1.
        spacing: (H, W) in mm.
    """
    samples = [(image, mask), *(augment(image, mask, entropy) for entropy in range(1, 25))]
    window = np.percentile(image, (0.5, 99.5))
    pictures = [frame(grey(image, window), [mask], spacing, WIDTH // 5 - 4) for image, mask in samples]
    return panels(pictures, 5, titles=["the slice as it is, then 24 augmentations of it"])


# ----------------------------------------------------------------------------------------------------- training curves

CURVES = {
    "loss": ("train_loss", "val_loss"),
    "Dice per scan": ("dice_mean", "dice_worst"),
    "foreground share": ("foreground_truth", "foreground_prediction"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "seconds per epoch": ("seconds",),
}


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The rows of a run's log.csv, every value a float: NaN where there is none. Raises ValueError without an epoch."""

    def number(text: str | None) -> float:
        try:
            return float(text)
        except (TypeError, ValueError):
            return math.nan

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected the log of a run: give the folder that train.py wrote it to")
    with open(path, newline="") as file:
        rows = [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]
    if not rows or "epoch" not in rows[0]:
        raise ValueError(f"{path}: {len(rows)} rows, no `epoch`; expected the log of a run with a finished epoch")
    return rows


def curves(*runs: Sequence[dict[str, float]], names: Sequence[str] = ()) -> Figure:
    """Loss, Dice (band: one standard deviation), foreground, learning rate, gradient and time, of one or several runs.

    A run is the rows of its log.csv. A panel of which no run has the columns is left out. `names` label several runs.
    """
    have = {name for run in runs for row in run for name in row}
    shown = [title for title, columns in CURVES.items() if have.intersection(columns)]
    down = max(1, math.ceil(len(shown) / 3))
    figure = Figure((WIDTH / 100, 2.5 * down + 0.3), dpi=100, layout="constrained")
    for n, title in enumerate(shown, start=1):
        axes = figure.add_subplot(down, 3, n)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        for run, colour in zip(runs, cycle(RUNS), strict=False):
            needed = have.intersection(("epoch", "dice_std", *CURVES[title]))
            data = {name: np.array([row.get(name, math.nan) for row in run], float) for name in needed}
            for name, style in zip(CURVES[title], ("-", "--"), strict=False):
                if name in data:
                    axes.plot(data["epoch"], data[name], style, marker=".", color=colour, label=name)
            if {"dice_mean", "dice_std"} <= needed:
                low, high = data["dice_mean"] - data["dice_std"], data["dice_mean"] + data["dice_std"]
                axes.fill_between(data["epoch"], low, high, color=colour, alpha=0.15, linewidth=0)
        if len(CURVES[title]) > 1:
            axes.legend(handles=axes.lines[: len(have.intersection(CURVES[title]))], fontsize=8)
    if names:
        lines = [Line2D([], [], color=colour, label=name) for name, colour in zip(names, cycle(RUNS), strict=False)]
        figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------------------- files


def rgb(figure: Figure) -> np.ndarray:
    """The figure as uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def write(path: str | Path, image: Image.Image, kind: str, **options) -> None:
    """Encode, make the folder, write under a temporary name, rename: the file is there whole or not at all."""
    path, content = Path(path), io.BytesIO()
    image.save(content, kind, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    write(path, Image.fromarray(rgb(figure)), "PNG", optimize=True)


def save_gif(frames: Sequence[np.ndarray], path: str | Path, seconds_per_frame: float = 0.1) -> None:
    """Write the frames of `movie` as a GIF that repeats for ever.

    One palette serves all frames: greys, and the same greys under each colour. They are few, because a GIF shrinks what
    repeats itself, and the noise of a scan in many greys never does.
    """
    greys, pure = np.linspace(0, 255, 24)[:, None], np.array([*ERRORS.values(), *MASKS[1:]])
    tints = [greys + FILL * (colour - greys) for colour in pure]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate((greys.repeat(3, axis=1), pure, *tints)).astype(np.uint8).tobytes())
    first, *rest = (Image.fromarray(rgb).quantize(palette=palette, dither=Image.Dither.NONE) for rgb in frames)
    write(path, first, "GIF", save_all=True, append_images=rest, duration=round(1000 * seconds_per_frame), loop=0)


# -------------------------------------------------------------------------------------------------------- command line


def read(path: str | Path, axis: int = 2) -> tuple[np.ndarray, list[float], np.ndarray]:
    """An upright volume (D, H, W), its spacing, and the affine of its NIfTI file. Raises ValueError for other files."""
    import nibabel as nib  # Here, so that the functions above work without it.
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    try:
        nifti = nib.load(path)
        array = np.asanyarray(nifti.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(
            f"{path}: {error}; expected a readable NIfTI file: check the path, or export it again"
        ) from None
    if array.ndim < 3 or array.shape[3:].count(1) < array.ndim - 3 or not array.size or array.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: is {array.dtype} of shape {array.shape}; expected one volume of numbers on three axes"
        )
    if not np.isfinite(nifti.affine).all() or np.linalg.matrix_rank(nifti.affine) < 4:
        raise ValueError(f"{path}: the affine is singular; expected one that places the voxels: set the sform or qform")
    # As data.py does: sagittal, coronal or axial slices, each with the patient's head or face up.
    way = ornt_transform(io_orientation(nifti.affine), axcodes2ornt(("LIP", "PIL", "SPL")[axis]))
    spacing = nib.affines.voxel_sizes(nifti.affine)[np.argsort(way[:, 0])]
    return apply_orientation(array.reshape(array.shape[:3]), way), spacing.tolist(), nifti.affine


def read_all(scan: str, masks: Sequence[str], axis: int) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    """A scan, its masks and their spacing. Raises ValueError for a mask on another grid: it would lie wrong."""
    volume, spacing, affine = read(scan, axis)
    found = [read(path, axis) for path in masks]
    for path, (mask, _, other) in zip(masks, found, strict=True):
        if mask.shape != volume.shape:
            raise ValueError(
                f"{path}: (D, H, W) is {mask.shape}; expected {volume.shape}, as in {scan}: give its own mask"
            )
        if not np.allclose(other, affine, rtol=0, atol=1e-3):
            raise ValueError(
                f"{path}: the affine is {np.abs(other - affine).max():.3g} mm off that of {scan}; resample it"
            )
    return volume, [mask != 0 for mask, *_ in found], spacing


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {
        "overlay": "slices of a scan with masks over them, as PNG",
        "movie": "all slices of a scan with masks over them, as GIF",
        "curves": "training curves of runs, as PNG",
        "augment": "one slice, augmented in 24 ways, as PNG",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "curves":
            command.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, with its log.csv")
        else:
            command.add_argument("scan", metavar="SCAN", help="NIfTI file")
            masks = "on the scan's grid; of two, a prediction and the truth, the errors are shown"
            command.add_argument("masks", metavar="MASK", nargs=1 if name == "augment" else "*", help=masks)
            planes = "slice axis: 0 sagittal, 1 coronal, 2 axial (default: %(default)s)"
            command.add_argument("--axis", type=int, choices=(0, 1, 2), default=2, help=planes)
        if name == "augment":
            kinds = "the augmentation, as in train.py (default: %(default)s)"
            command.add_argument("--kind", choices=("seed", "full"), default="seed", help=kinds)
        command.add_argument("--out", required=True, help="file to write")
    return parser.parse_args(argv)


def draw(args: argparse.Namespace) -> None:
    ending = ".gif" if args.command == "movie" else ".png"
    if Path(args.out).suffix.lower() != ending:
        raise ValueError(f"--out {args.out}: {args.command} writes {ending}; name the file so")
    if args.command == "curves":
        runs = [read_log(Path(run, "log.csv")) for run in args.runs]
        return save(curves(*runs, names=args.runs), args.out)
    scan, masks, spacing = read_all(args.scan, args.masks, args.axis)
    if args.command == "movie":
        return save_gif(movie(scan, masks, spacing), args.out)
    if args.command == "overlay":
        return save(overlay(scan, masks, spacing), args.out)
    try:
        from data import augmenter  # The only sibling, and only here: these are the very augmentations of the training.
    except ImportError as error:
        raise ValueError(f"augment draws what data.py does, which cannot be used here: {error}") from None
    largest = masks[0].sum(axis=(1, 2)).argmax()
    scan = scan.clip(*np.percentile(scan, (0.5, 99.5)))
    image = np.float32((scan[largest] - scan.mean()) / scan.std())  # They expect mean 0 and deviation 1 over the scan.
    save(augmented(image, np.uint8(masks[0][largest]), augmenter(args.kind), spacing[1:]), args.out)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        draw(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"visualize.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
