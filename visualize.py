"""Pictures of scans, masks, networks and training runs: looking often tells more than a score.

    Okabe and Ito, "Color Universal Design", 2008 (the colours: safe for colour-blind readers)

Contract: a scan is (D, H, W), slices first, in any unit, and upright: in an axial slice rows run to the patient's
posterior, columns to the left. Spacing is (D, H, W) in mm, and every picture keeps its proportions. A mask has the
scan's shape; non-zero is foreground. Of two masks the first is a prediction, the second the truth, and their errors are
shown. Letters say where the patient's right, left, front (anterior), back (posterior), head (superior) and feet
(inferior) lie: the right is on the picture's left, as radiologists look at it. `axis` is the slices' own: 0 sagittal,
1 coronal, 2 axial. Arrays go in; a matplotlib `Figure` comes out, which a notebook shows as it is, or frames, uint8 RGB
(H, W, 3). Nothing touches pyplot's global state: no display is needed, and no figure stays open in a long run. The
functions stand alone; the commands below read scans as the training does, with data.py (layers with predict.py, too)
beside this file.

    python visualize.py overlay scan.nii.gz prediction.nii.gz truth.nii.gz --out overlay.png    # --count 0: all slices
    python visualize.py planes  scan.nii.gz prediction.nii.gz truth.nii.gz --out planes.png
    python visualize.py movie   scan.nii.gz prediction.nii.gz truth.nii.gz --out movie.gif      # or .html: a player
    python visualize.py layers  runs/first/last.pt scan.nii.gz --out layers.png
    python visualize.py curves  runs/first runs/second --out curves.png
    python visualize.py augment scan.nii.gz mask.nii.gz --out augment.png
"""

import argparse
import base64
import copy
import csv
import io
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy import ndimage

ERRORS = {"correct": (86, 180, 233), "missed": (240, 228, 66), "false": (213, 94, 0)}  # sky blue, yellow, vermilion
MASKS = ((86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115),  # sky blue, orange, purple, bluish green,
         (0, 114, 178), (240, 228, 66), (213, 94, 0), (136, 34, 85))  # blue, yellow, vermilion, and Paul Tol's wine
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # the darker ones, for a white background
WORDS = {"correct": "blue: correct", "missed": "yellow: missed, truth only", "false": "red: false, prediction only"}
LETTERS = ("SIAP", "SIRL", "APRL")  # top, bottom, left, right of a slice across axis 0, 1, 2 (data.py: PLANES)
FILL = 0.45  # Opacity inside a mask's rim: the tissue under it must stay readable.
WIDTH = 900  # Pixels of a figure: what a README shows.


# ----------------------------------------------------------------------------------------------------------- one slice


def grey(scan: np.ndarray) -> np.ndarray:
    """Intensities as uint8 of the same shape: the 0.5 percentile is black, the 99.5 percentile white."""
    scan = np.nan_to_num(np.asarray(scan, np.float32), posinf=0, neginf=0)
    # A million voxels fix a percentile well enough.
    black, white = np.percentile(scan.ravel()[:: 1 + scan.size // 1_000_000], (0.5, 99.5))
    return ((scan - black) * (255 / max(white - black, 1e-12))).clip(0, 255).astype(np.uint8)


def as_bool_masks(scan: np.ndarray, masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks as bool. Raises ValueError unless they have the scan's shape (D, H, W)."""
    if np.ndim(scan) != 3 or any(np.shape(mask) != np.shape(scan) for mask in masks):
        raise ValueError(f"scan {np.shape(scan)}, masks {set(map(np.shape, masks))}; expected a list of (D, H, W) each")
    return [np.not_equal(mask, 0) for mask in masks]


def legend(count: int) -> dict[str, tuple[int, int, int]]:
    """Names and colours that `count` masks are drawn with. Two masks are a prediction and the truth."""
    return ERRORS if count == 2 else {f"mask {n + 1}": MASKS[n % len(MASKS)] for n in range(count)}


def headline(name: str, masks: Sequence[np.ndarray]) -> str:
    """The scan's name and, of a prediction and the truth, bool, their Dice: 1 where both are empty."""
    if len(masks) != 2:
        return name
    both, total = np.count_nonzero(masks[0] & masks[1]), np.count_nonzero(masks)
    return f"{name}, Dice {2 * both / total if total else 1:.3f}"


def overlay_masks(picture: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (H, W) and bool masks (H, W) to RGB: a mask's rim is opaque, its inside a tint. Of two: their errors."""
    colours = legend(len(masks)).values()
    if len(masks) == 2:
        masks = masks[0] & masks[1], masks[1] & ~masks[0], masks[0] & ~masks[1]  # prediction and truth
    rgb = np.repeat(picture[..., None], 3, axis=-1)  # (H, W, 3)
    for area, colour in zip(masks, colours, strict=True):
        core = ndimage.binary_erosion(area)  # All four neighbours are in, too.
        rgb[core] = np.rint(rgb[core] + FILL * (np.float32(colour) - rgb[core]))
        rgb[area & ~core] = colour
    return rgb


def mark(picture: np.ndarray, letters: str, title: str = "") -> np.ndarray:
    """RGB with `letters` at its top, bottom, left and right, and a title in a corner: white on a dark rim."""
    image, (height, width) = Image.fromarray(picture), picture.shape[:2]
    pen, size = ImageDraw.Draw(image), 13 if height > 80 else 9
    places = {"ma": (width / 2, 2), "md": (width / 2, height - 2), "lm": (4, height / 2), "rm": (width - 4, height / 2),
              "la": (4, 2)}
    for word, (anchor, place) in zip((*letters, title), places.items(), strict=True):
        pen.text(place, word, "white", anchor=anchor, font_size=size, stroke_width=2, stroke_fill="black")
    return np.array(image)


def draw_cross(rgb: np.ndarray, y: int, x: int) -> None:
    """Short dashes, white and black, along row `y` and column `x`: they hide little, and are seen on any tissue."""
    for part, shade in ((0, 255), (1, 0)):  # of the four parts of 3 pixels that repeat
        rgb[y, np.arange(rgb.shape[1]) // 3 % 4 == part] = shade
        rgb[np.arange(len(rgb)) // 3 % 4 == part, x] = shade


def render_slice(volumes: Sequence, n: int, zoom: Sequence[float], axis: int = 0) -> np.ndarray:
    """Slice `n` across an axis, as RGB.

    Args:
        volumes: the greys, uint8 (D, H, W), and the masks, bool (D, H, W).
        zoom: pixels per voxel along (D, H, W).
        axis: 0 is the slices' own.
    """
    picture, *masks = (volume.take(n, axis) for volume in volumes)
    size = np.multiply(picture.shape, np.delete(zoom, axis)).round().astype(int).clip(1)[::-1]
    # The scan is interpolated, a mask is not: one wants to see which voxels it holds.
    grey = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    masks = [np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    return overlay_masks(grey, masks)


def colour(values: np.ndarray, colours: str = "viridis") -> np.ndarray:
    """Values from 0 to 1, or uint8, as RGB: from purple to yellow."""
    return colormaps[colours](values, bytes=True)[..., :3]


def text_row(width: int, words: Sequence[str], colours: Sequence = ()) -> np.ndarray:
    """Words side by side, spread over the width, as RGB (22, width, 3) on black."""
    image = Image.new("RGB", (width, 22))
    for n, (word, colour) in enumerate(zip_longest(words, colours, fillvalue="white")):
        ImageDraw.Draw(image).text(((n + 0.5) * width / len(words), 11), word, colour, anchor="mm", font_size=13)
    return np.array(image)


def colour_row(width: int, count: int) -> list[np.ndarray]:
    """What the colours of `count` masks mean, as one row or none; in full words where they fit."""
    words = {WORDS.get(name, name) if width >= 550 else name: colour for name, colour in legend(count).items()}
    return [text_row(width, [*words], words.values())] if words else []


def framed(picture: np.ndarray, masks: Sequence, zoom: float, caption: str, name: str = "") -> np.ndarray:
    """A picture of `zoom` pixels per mm, the scan's name above it; below a caption, a scale bar, what colours mean."""
    width = picture.shape[1]
    bar = max((mm for mm in (1, 10, 50) if mm * zoom < width / 3), default=1)  # 1 is for toys
    below, left = text_row(width, [caption, f"{bar} mm"]), round(0.75 * width - bar * zoom / 2)
    below[-3:-1, left : left + round(bar * zoom)] = 255
    above = [text_row(width, [headline(name, masks)])] if name else []
    return np.concatenate([*above, picture, below, *colour_row(width, len(masks))])


# ------------------------------------------------------------------------------------------------- figures and frames


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    figure.savefig(file := io.BytesIO(), format="png")
    return file.getvalue()


def rgb(figure: Figure) -> np.ndarray:
    """The figure as uint8 (H, W, 3)."""
    return np.array(Image.open(io.BytesIO(png(figure))).convert("RGB"))


class NotebookFigure(Figure):
    """A Figure that a notebook shows when it is the last value of a cell; without pyplot matplotlib's own is not."""

    def _repr_png_(self) -> bytes:
        """In 256 colours: a notebook keeps its pictures, these look the same, and take half the bytes."""
        file, picture = io.BytesIO(), Image.fromarray(rgb(self))
        picture.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        return file.getvalue()


def centred(picture: np.ndarray, width: int, height: int = 0) -> np.ndarray:
    """A picture with black around it, at least `width` wide and `height` high."""
    room = [max(0, want - have) for want, have in zip((height, width), picture.shape, strict=False)]
    return np.pad(picture, (*((n // 2, n - n // 2) for n in room), (0, 0)))


def tile(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """RGB pictures row by row, on black."""
    high, wide = np.max([picture.shape[:2] for picture in pictures], axis=0)
    cells = [centred(picture, wide + 4, high + 4) for picture in pictures]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    return np.concatenate([np.hstack(cells[n : n + columns]) for n in range(0, len(cells), columns)])


def to_figure(*pictures: np.ndarray) -> Figure:
    """RGB pictures of one width one below the other, pixel for pixel: ten times as fast as axes for each of them."""
    picture = np.concatenate(pictures)
    figure = NotebookFigure((picture.shape[1] / 100, len(picture) / 100), dpi=100)
    figure.add_axes((0, 0, 1, 1), xticks=(), yticks=(), frame_on=False).imshow(picture, aspect="auto")
    return figure


def compare(images: np.ndarray, truths: np.ndarray, predictions: np.ndarray, titles: Sequence[str] = (),
            axis: int = 2) -> Figure:
    """Scan, truth, probability, prediction and error of N slices, one row each.

    Args:
        images: (N, H, W) in any range.
        truths: (N, H, W), non-zero is foreground.
        predictions: (N, H, W), probabilities: above 0.5 is foreground. NaN counts as 0, so that a run that diverged
            still has its picture.
        titles: N lines, each above its row.
        axis: the slices' own, for the letters.

    Raises:
        ValueError: shapes that differ, or predictions that are not from 0 to 1, logits for instance.
    """
    predictions = np.nan_to_num(np.float32(predictions))
    if predictions.min() < 0 or predictions.max() > 1:
        raise ValueError(f"predictions {predictions.min():g} to {predictions.max():g}; expected 0 to 1: the sigmoid")
    truths, masks = as_bool_masks(images, [truths, predictions > 0.5])
    greys, levels, width = np.array([grey(image) for image in images]), np.uint8(255 * predictions), WIDTH // 5
    zoom = [(width - 4) / greys.shape[2]] * 3
    rows = [text_row(5 * width, ["scan", "truth", "probability", "prediction", "error"])]
    for n, title in zip_longest(range(len(greys)), titles, fillvalue=""):
        cells = [render_slice([greys, *shown], n, zoom) for shown in ([], [truths], [masks], [masks, truths])]
        cells.insert(2, colour(render_slice([levels], n, zoom)[..., 0], "cividis"))
        rows += [text_row(5 * width, [title]), tile([mark(cell, LETTERS[axis]) for cell in cells], 5)]
    return to_figure(*rows, *colour_row(5 * width, 2))


def overlay(scan: np.ndarray, masks: Sequence, spacing: Sequence[float], count: int = 8, name: str = "scan",
            axis: int = 2) -> Figure:
    """`count` slices with the masks over them, spread evenly over those with foreground; 0: all slices of the scan.

    Below a slice stands its number, from 1. Without foreground the slices are spread over the whole scan.
    """
    masks, slices = as_bool_masks(scan, masks), np.arange(len(scan))
    if 0 < count < len(scan):
        with_foreground = np.flatnonzero(np.any([mask.any(axis=(1, 2)) for mask in masks], axis=0))
        slices = with_foreground if len(with_foreground) else slices
        slices = slices[np.unique(np.linspace(0, len(slices) - 1, count).round().astype(int))]
    columns = min(4 if len(slices) <= 8 else 8, len(slices))
    zoom = (WIDTH // columns - 4) / (scan.shape[2] * spacing[2])  # pixels per mm
    volumes, scale, cells = [grey(scan), *masks], np.multiply(spacing, zoom), []
    for n in slices:
        cell = mark(render_slice(volumes, n, scale), LETTERS[axis])
        cells.append(np.concatenate([cell, text_row(cell.shape[1], [f"{n + 1} / {len(scan)}"])]))
    return to_figure(framed(tile(cells, columns), masks, zoom, f"{len(slices)} of {len(scan)} slices", name))


def planes(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], name: str = "scan") -> Figure:
    """An axial, a coronal and a sagittal slice of an axial scan, in one scale, through the middle of the masks."""
    # Head first, so that it is up where slices are rows.
    volumes = [volume[::-1] for volume in (grey(scan), *as_bool_masks(scan, masks))]
    # The little that is added makes it the middle of the scan where there is no foreground.
    centre = np.round(ndimage.center_of_mass(sum(volumes[1:], np.full(scan.shape, 1e-9)))).astype(int)
    zoom = (WIDTH // 2 - 6) / max(np.multiply(scan.shape, spacing)[1:])  # pixels per mm
    numbers, scale, cells = [len(scan) - centre[0], *centre[1:] + 1], np.multiply(spacing, zoom), []
    for axis, plane in enumerate(("axial", "coronal", "sagittal")):
        cell = render_slice(volumes, centre[axis], scale, axis)
        draw_cross(cell, *np.delete((centre + 0.5) * scale, axis).astype(int))
        cells.append(mark(cell, LETTERS[2 - axis], f"{plane} {numbers[axis]} / {scan.shape[axis]}"))
    picture = tile([cells[0], tile(cells[1:], 1)], 2)
    return to_figure(framed(picture, volumes[1:], zoom, "through the middle of the masks", name))


def augmented(image: np.ndarray, mask: np.ndarray, augment: Callable, spacing: Sequence[float] = (1, 1),
              axis: int = 2) -> Figure:
    """5 x 5 views of one slice: the original, then `augment(image, mask, seed)` for the seeds 1 to 24.

    Args:
        image: float32 (H, W). All views share one window of intensities, so that a change of brightness shows.
        mask: uint8 (H, W), 0 or 1.
        augment: takes and returns such a pair; `data.augmenter` makes one.
        spacing: (H, W) in mm.
    """
    images, masks = zip((image, mask), *(augment(image, mask, seed) for seed in range(1, 25)), strict=True)
    zoom = np.multiply((1, *spacing), (WIDTH // 5 - 4) / (image.shape[1] * spacing[1]))
    volumes = [grey(images), np.not_equal(masks, 0)]
    views = [render_slice(volumes, n, zoom) for n in range(25)]
    views[0] = mark(views[0], LETTERS[axis], "original")  # The others are turned: no letter would be right.
    return to_figure(text_row(WIDTH // 5 * 5, ["the original, then 24 augmentations of it"]), tile(views, 5))


# ------------------------------------------------------------------------------------------------------------- movies


def movie(scan: np.ndarray, masks: Sequence, spacing: Sequence[float], size: int = 320, axis: int = 2) -> list:
    """A frame for each slice, with the masks over it; `size` is the longer side of the slice, in pixels."""
    volumes = [grey(scan), *as_bool_masks(scan, masks)]
    zoom = size / max(np.multiply(scan.shape, spacing)[1:])  # pixels per mm
    slices = [render_slice(volumes, n, np.multiply(spacing, zoom)) for n in range(len(scan))]
    # A caption needs 200 pixels.
    slices = [centred(mark(picture, LETTERS[axis]), 200) for picture in slices]
    return [framed(slices[n], masks, zoom, f"slice {n + 1} / {len(scan)}") for n in range(len(scan))]


def player(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], name: str = "scan") -> str:
    """An axial scan and at most eight masks as one HTML page that needs no network: player.html, with the volume in it.

    Slices of more than 320 pixels are thinned out; areas and Dice are those of the whole scan.
    """
    masks, two = as_bool_masks(scan, masks), len(masks) == 2
    (labels,) = np.packbits(masks or [np.zeros(scan.shape, bool)], axis=0, bitorder="little")
    step = -(-max(scan.shape[1:]) // 320)
    # Greys in steps of 4 look the same, and compress. A label has a bit for each mask.
    volumes = np.array([grey(scan) & 252, labels])[:, :, ::step, ::step]
    counted = [*masks, masks[0] & masks[1]] if two else masks
    content = {
        "title": headline(name, masks),
        "shape": volumes.shape[1:], "whole": scan.shape, "step": [1, step, step],
        "spacing": list(map(float, spacing)), "letters": LETTERS[::-1],
        "masks": {"prediction": MASKS[0], "truth": MASKS[2]} if two else legend(len(masks)),
        "errors": ERRORS if two else {}, "fill": FILL,
        # Voxels of each mask, and of both of two, in each slice across each axis.
        "counts": [[mask.sum(axis=others).tolist() for mask in counted] for others in ((1, 2), (0, 2), (0, 1))],
        "voxels": base64.b64encode(zlib.compress(volumes.tobytes(), 9)).decode(),
    }
    page = Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    # The name of a file is text, never a tag that ends the script.
    return page.replace("/* visualize.py writes the scan here */ null", json.dumps(content).replace("<", "\\u003c"))


# ------------------------------------------------------------------------------------------------ what the network sees


def features(net, image: np.ndarray) -> dict[str, np.ndarray]:
    """What a U-Net of unet.py makes of an image: by name, maps float32 (C, H, W), finest level 1.

    Args:
        net: the network. It is not changed.
        image: (H, W), preprocessed as for training; for a 3D network a patch (D, H, W), whose middle slice is shown.

    Returns:
        `slice`, `down 1` and so on, `bottom`, `up 1` and so on, `probability`; `gate 1` and so on are the weights
        (1, H, W), 0 to 1, that attention gates give to the skips.
    """
    import torch  # Here, so that the other pictures work without it.

    net = copy.deepcopy(net).cpu()  # a copy, so that the hooks go with it
    parts = {"bottom": net.bottom}
    for kind, blocks in (("down", net.down), ("up", net.up[::-1]), ("gate", [gate.weight for gate in net.gates[::-1]])):
        parts |= {f"{kind} {n}": block for n, block in enumerate(blocks, start=1)}
    seen = {"slice": torch.from_numpy(np.float32(image)).reshape(1, 1, *image.shape[-net.dims :])}
    for name, part in parts.items():
        function = torch.sigmoid if name.startswith("gate") else torch.clone  # A gate ends in a sigmoid.
        part.register_forward_hook(lambda _, inputs, output, n=name, f=function: seen.update({n: f(output)}))
    seen["probability"] = net.predict(seen["slice"])
    return {name: (maps[0] if net.dims == 2 else maps[0, :, maps.shape[2] // 2]).numpy() for name, maps in seen.items()}


def layers(net, image: np.ndarray, axis: int = 2) -> Figure:
    """The `features` of a network laid out as the U: eight channels a level, attention gates on the skips.

    The eight are those that vary most, each in its own range. It takes the memory that one forward pass of `image`
    takes: of a large scan give a slice, or a patch.
    """
    size = np.array([64, round(64 * image.shape[-2] / image.shape[-1])])  # of a channel, x and y
    levels = range(1, len(net.down) + 1)
    parts = {f"gate {n}": text_row(272, ["------------  skip  ----------->"]) for n in levels}
    for name, maps in features(net, image).items():
        if name.startswith(("down", "bottom", "up")):
            title = "{}: {} of {} channels, {} x {}".format(name, min(8, len(maps)), *maps.shape)
            shown = [colour((m - m.min()) / max(np.ptp(m), 1e-9)) for m in sorted(maps, key=np.std)[:-9:-1]]
            picture = tile([np.array(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in shown], 4)
        else:
            title = "slice" if name == "slice" else f"{name}, 0 (purple) to 1 (yellow)"
            title = title.replace("gate", "skip, times gate")
            picture = overlay_masks(grey(maps[0]), []) if name == "slice" else colour(maps[0])
            picture = mark(np.array(Image.fromarray(picture).resize(2 * size)), LETTERS[axis])
        parts[name] = np.concatenate([text_row(272, [title]), centred(picture, 272)])
    rows = [["slice", "", "probability"], *([f"down {n}", f"gate {n}", f"up {n}"] for n in levels), ["", "bottom", ""]]
    return to_figure(tile([parts.get(name, text_row(272, [])) for row in rows for name in row], 3))


# ----------------------------------------------------------------------------------------------------- training curves

CURVES = {"training loss": "train/loss", "Dice on the validation scans": "val/dice",
          "Dice of its worst scan": "val/dice_worst", "learning rate": "train/lr"}  # title and column of log.csv


def fit_to_dice(axes) -> None:
    """Limits that show 0.90 from 0.91: poor epochs, half at most, may lie below the picture, but no run's best."""
    runs = [np.array(line.get_ydata()) for line in axes.lines if np.isfinite(line.get_ydata()).any()]
    if runs:
        bests = [np.nanmax(values) for values in runs]
        low, high = min(np.nanmedian(np.concatenate(runs)), *bests), max(bests)
        room = max(high - low, 0.02)
        axes.set_ylim(max(low - room, 0), high + room / 2)


def curves(*logs: Sequence[dict[str, float]], names: Sequence[str] = ()) -> Figure:
    """What tells whether a run goes well, epoch by epoch (from 1), for one or more runs.

    A log is the rows of a log.csv; a value that it lacks is left out of the picture. The star is the best epoch.
    `names` tell several runs apart.
    """
    figure = NotebookFigure((WIDTH / 100, 5.3), dpi=100, layout="constrained")
    for axes, (title, column) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        # The first run is the widest line: it is seen where the others lie on it.
        for log, colour, width in zip(logs, cycle(RUNS), np.linspace(1.5, 4, len(logs))[::-1], strict=False):
            epochs = np.arange(1, len(log) + 1)  # There is no epoch 0.
            values = np.array([row.get(column, np.nan) for row in log], float)
            axes.plot(epochs, values, marker=".", color=colour, linewidth=width)
            if column == "val/dice" and np.isfinite(values).any():
                best = np.nanargmax(values)
                axes.plot(epochs[best], values[best], "*", color=colour, markersize=12)
                axes.text(epochs[best], values[best], f"{values[best]:.3f}\n", color=colour, ha="right", va="baseline")
        axes.grid(alpha=0.3)
        axes.set(title=title, xlabel="epoch", xlim=(0.5, None), ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(nbins=7, integer=True, min_n_ticks=1)
        if "Dice" in title:
            fit_to_dice(axes)
    if names:
        labels = [f"run {name}".replace("$", r"\$") for name in names]  # no formula
        figure.legend(figure.axes[0].lines, labels, loc="outside lower center", ncols=2)
    return figure


# --------------------------------------------------------------------------------------------------------------- files


def write(path: str | Path, content: bytes) -> None:
    """Write under a temporary name, then rename: the file is there whole or not at all. Its folder is made."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # not the temporary name
    finally:
        temporary.unlink(missing_ok=True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    write(path, png(figure))


def save_gif(frames: Sequence[np.ndarray], path: str | Path, seconds_per_frame: float = 0.1) -> None:
    """Write the frames of `movie` as a GIF that repeats for ever; a notebook shows it by `IPython.display.Image(path)`.

    One palette serves all frames: greys, and the same greys under each colour. They are few, because a GIF shrinks what
    repeats itself, and the noise of a scan in many greys never does.
    """
    greys, pure = np.linspace(0, 255, 24)[:, None], np.unique([*ERRORS.values(), *MASKS], axis=0)
    tints = [greys + FILL * (colour - greys) for colour in pure]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate((greys.repeat(3, axis=1), pure, *tints)).astype(np.uint8).tobytes())
    first, *rest = (Image.fromarray(rgb).quantize(palette=palette, dither=Image.Dither.NONE) for rgb in frames)
    file, milliseconds = io.BytesIO(), round(1000 * seconds_per_frame)
    first.save(file, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    write(path, file.getvalue())


# -------------------------------------------------------------------------------------------------------- command line


def read_log(run: str | Path) -> list[dict[str, float]]:
    """The rows of log.csv in a run's folder, NaN where there is no value."""
    import data  # The command line reads files as the training does; the functions above need no other file.

    path = Path(run, "log.csv")
    try:
        with open(path, newline="") as file:
            return [{name: float(text or "nan") for name, text in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError):  # A spreadsheet puts semicolons between the columns.
        raise data.DataError(f"{path}: no table of numbers as train.py writes it") from None


def fullest_slice(checkpoint: str, path: str) -> tuple:
    """The network of a checkpoint, and the slice (1, H, W), or patch (D, H, W), of a scan about where it sees most.

    Slice and patch have the size of the training, so that the memory that `layers` takes does not grow with the scan.
    """
    import data
    import predict

    saved = predict.load_checkpoint(checkpoint)
    net, how = predict.load_network(saved, path=checkpoint), saved["preprocess"]
    scan = data.read_scan(path, how["axis"])
    volume = data.preprocess(scan.array, scan.spacing, how)
    probability = predict.predict_volume(net, volume, size=how["size"])
    size = np.array((1, *how["size"])[-3:])  # (D, H, W), one slice in 2D
    centre = [probability.sum(axis=axes).argmax() for axes in ((1, 2), (0, 2), (0, 1))]
    starts = np.clip(centre - size // 2, 0, np.maximum(volume.shape - size, 0))
    return net, data.crop_or_pad(volume[tuple(map(slice, starts, starts + size))], size), how["axis"]


def draw(args: argparse.Namespace) -> None:
    """Read, draw, write, say where. Raises data.DataError for what a user can mend."""
    import data

    kind, out, files, page = args.picture, args.out, args.files, args.out.endswith(".html")
    endings = (".gif", ".html") if kind == "movie" else (".png",)
    data.require(out.endswith(endings), f"--out {out}: {kind} writes {' or '.join(endings)}; name the file so")
    data.require(len(files) == 2 or kind not in ("layers", "augment"), f"{kind} takes two files, found {len(files)}")
    data.require(len(files) <= 9 or not page, f"found {len(files) - 1} masks; a player shows 0 to 8")
    data.require(0 <= args.count <= 1000, f"--count {args.count}: give 1 to 1000 slices, or 0 for all")
    if kind == "curves":
        splits = {path.read_bytes() for path in (Path(run, "split.json") for run in files) if path.exists()}
        data.note(len(splits) > 1, "these runs were not validated on the same scans: see their split.json")
        save(curves(*map(read_log, files), names=files), out)
    elif kind == "layers":
        save(layers(*fullest_slice(*files)), out)
    else:
        # The three planes, of the picture and of the player, are cut out of the axial volume.
        axis = 2 if page or kind == "planes" else args.axis
        scan, name = data.read_scan(files[0], axis), Path(files[0]).name
        masks = [data.read_mask(path, scan, args.label if path is files[-1] else None) for path in files[1:]]
        content = scan.array, masks, scan.spacing
        if page:
            write(out, player(*content, name).encode())
        elif kind == "movie":
            save_gif(movie(*content, axis=axis), out)
        elif kind == "planes":
            save(planes(*content, name), out)
        elif kind == "overlay":
            save(overlay(*content, args.count, name, axis), out)
        else:
            data.require(np.ptp(scan.array), f"{files[0]}: all voxels are equal; there is nothing to augment")
            n, image = masks[0].sum(axis=(1, 2)).argmax(), (scan.array - scan.array.mean()) / scan.array.std()
            save(augmented(image[n], masks[0][n], data.augmenter("full"), scan.spacing[1:], axis), out)
    print(out)


def main(argv: Sequence[str] | None = None) -> int:
    import data

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("picture", choices=("overlay", "planes", "movie", "layers", "curves", "augment"))
    add("files", nargs="+", help="a scan and masks; layers: a checkpoint and a scan; curves: the folders of runs")
    add("--out", required=True, metavar="FILE", help="file to write: .png; of a movie .gif, or .html, a player")
    add("--axis", type=int, choices=(0, 1, 2), default=2,
        help="slices: 0 sagittal, 1 coronal, 2 axial; planes and .html show all three (default: 2)")
    add("--label", type=int, nargs="+", metavar="N", help="foreground of the last file (default: all but 0)")
    add("--count", type=int, default=8, metavar="N", help="slices of overlay, 0 for all (default: 8)")
    return data.run_command(draw, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
