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
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from scipy import ndimage

ERRORS = {"correct": (86, 180, 233), "missed": (240, 228, 66), "false": (213, 94, 0)}  # sky blue, yellow, vermilion
MASKS = ((86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115))  # sky blue, orange, purple, bluish green
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
    places = {"la": (4, 2), "ma": (width / 2, 2), "md": (width / 2, height - 2), "lm": (4, height / 2),
              "rm": (width - 4, height / 2)}
    for word, (anchor, place) in zip((title, *letters), places.items(), strict=False):
        style = {"anchor": anchor, "font_size": 13 if height > 80 else 9, "stroke_width": 2, "stroke_fill": "black"}
        ImageDraw.Draw(image).text(place, word, "white", **style)
    return np.array(image)


def draw_cross(rgb: np.ndarray, y: int, x: int) -> None:
    """Short dashes, white and black, along row `y` and column `x`: they hide little, and are seen on any tissue."""
    for part, shade in ((0, 255), (1, 0)):  # of the four parts of 3 pixels that repeat
        rgb[y, np.arange(rgb.shape[1]) // 3 % 4 == part] = shade
        rgb[np.arange(len(rgb)) // 3 % 4 == part, x] = shade


def render_slice(volumes: Sequence, n: int, zoom: Sequence[float], axis: int = 0, cross: Sequence | None = None):
    """Slice `n` across an axis, as RGB.

    Args:
        volumes: the greys, uint8 (D, H, W), and the masks, bool (D, H, W).
        zoom: pixels per voxel along (D, H, W).
        axis: 0 is the slices' own; across 1 and 2 the first slice is drawn below, so that the patient's head is up.
        cross: the voxel (D, H, W) in which the other planes cut this one.
    """
    picture, *masks = (volume.take(n, axis)[:: -1 if axis else 1] for volume in volumes)
    scale = np.delete(zoom, axis)
    size = np.multiply(picture.shape, scale).round().astype(int).clip(1)[::-1]
    # The scan is interpolated, a mask is not: one wants to see which voxels it holds.
    grey = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    masks = [np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    rgb = overlay_masks(grey, masks)
    if cross is not None:
        y, x = np.delete(cross, axis)
        y = len(picture) - 1 - y if axis else y
        draw_cross(rgb, *((np.array([y, x]) + 0.5) * scale).astype(int))
    return rgb


def text_row(width: int, words: Sequence[str], colours: Sequence = (), apart: float = np.inf) -> np.ndarray:
    """Words side by side, RGB (22, width, 3) on black: spread over the whole width, or `apart` pixels apart."""
    image = Image.new("RGB", (width, 22))
    for n, (word, colour) in enumerate(zip_longest(words, colours, fillvalue="white")):
        x = width / 2 + (n + 0.5 - len(words) / 2) * min(apart, width / len(words))
        ImageDraw.Draw(image).text((x, 11), word, colour, anchor="mm", font_size=13)
    return np.array(image)


def colour_row(width: int, count: int) -> list[np.ndarray]:
    """What the colours of `count` masks mean, as one row or none; in full words where they fit."""
    words = {WORDS.get(name, name) if width >= 550 else name: colour for name, colour in legend(count).items()}
    return [text_row(width, [*words], words.values(), 200)] if words else []


def footer(width: int, count: int, caption: str, zoom: float) -> np.ndarray:
    """What goes below a picture of `zoom` pixels per mm: caption and scale bar, and what the colours mean."""
    bar = max((mm for mm in (1, 10, 50) if mm * zoom < width / 3), default=1)  # 1 is for toys
    row, left = text_row(width, [caption, f"{bar} mm"]), round(0.75 * width - bar * zoom / 2)
    row[-3:-1, left : left + round(bar * zoom)] = 255
    return np.concatenate([row, *colour_row(width, count)])


# ------------------------------------------------------------------------------------------------- figures and frames


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
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
    """RGB pictures one below the other as a Figure, pixel for pixel: ten times as fast as axes for each of them."""
    width = max(picture.shape[1] for picture in pictures)
    picture = np.concatenate([centred(picture, width) for picture in pictures])
    figure = NotebookFigure((width / 100, len(picture) / 100), dpi=100)
    figure.add_axes((0, 0, 1, 1), xticks=(), yticks=(), frame_on=False).imshow(picture, aspect="auto")
    return figure


def titled(picture: np.ndarray, name: str, masks: Sequence[np.ndarray], caption: str, zoom: float) -> Figure:
    """A picture with the scan's name and Dice above it, caption, scale bar and colours below."""
    width = picture.shape[1]
    return to_figure(text_row(width, [headline(name, masks)]), picture, footer(width, len(masks), caption, zoom))


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
    shapes, low, high = {*map(np.shape, (images, truths, predictions))}, predictions.min(), predictions.max()
    if len(shapes) > 1 or predictions.ndim != 3 or low < 0 or high > 1:
        raise ValueError(f"found {shapes}, values {low:g} to {high:g}; expected one (N, H, W), and 0 to 1: the sigmoid")
    greys, truths, masks = np.array([grey(image) for image in images]), np.not_equal(truths, 0), predictions > 0.5
    levels = np.uint8(255 * predictions)
    zoom = [(WIDTH // 5 - 4) / predictions.shape[2]] * 3
    rows = [text_row(WIDTH, ["scan", "truth", "probability", "prediction", "error"])]
    for n, title in zip_longest(range(len(greys)), titles):
        cells = [render_slice([greys, *shown], n, zoom) for shown in ([], [truths], [masks], [masks, truths])]
        # The probability from dark blue, 0, to yellow, 1.
        cells.insert(2, colormaps["cividis"](render_slice([levels], n, zoom)[..., 0], bytes=True)[..., :3])
        rows += [text_row(WIDTH, [title])] if title else []
        rows.append(tile([mark(cell, LETTERS[axis]) for cell in cells], 5))
    return to_figure(*rows, *colour_row(WIDTH, 2))


def overlay(scan: np.ndarray, masks: Sequence, spacing: Sequence[float], count: int | None = 8, name: str = "scan",
            axis: int = 2) -> Figure:
    """`count` slices with the masks over them, spread evenly over those with foreground; None: all slices of the scan.

    Below a slice stands its number, from 1. Without foreground the slices are spread over the whole scan.
    """
    masks, slices = as_bool_masks(scan, masks), np.arange(len(scan))
    if count is not None and count < len(scan):
        with_foreground = np.flatnonzero(np.any([mask.any(axis=(1, 2)) for mask in masks], axis=0))
        slices = with_foreground if len(with_foreground) else slices
        slices = slices[np.unique(np.linspace(0, len(slices) - 1, count).round().astype(int))]
    columns = min(4 if len(slices) <= 8 else 8, len(slices))
    zoom = (WIDTH // columns - 4) / (scan.shape[2] * spacing[2])  # pixels per mm
    volumes, scale, cells = [grey(scan), *masks], np.multiply(spacing, zoom), []
    for n in slices:
        cell = mark(render_slice(volumes, n, scale), LETTERS[axis])
        cells.append(np.concatenate([cell, text_row(cell.shape[1], [f"{n + 1} / {len(scan)}"])]))
    return titled(tile(cells, columns), name, masks, f"{len(slices)} of {len(scan)} slices", zoom)


def planes(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], name: str = "scan") -> Figure:
    """An axial, a coronal and a sagittal slice of an axial scan, in one scale, through the middle of the masks."""
    masks = as_bool_masks(scan, masks)
    # The little that is added makes it the middle of the scan where there is no foreground.
    centre = [round(place) for place in ndimage.center_of_mass(sum(masks, np.full(scan.shape, 1e-9)))]
    zoom = (WIDTH // 2 - 6) / max(np.multiply(scan.shape, spacing)[1:])  # pixels per mm
    volumes, scale, cells = [grey(scan), *masks], np.multiply(spacing, zoom), []
    for axis, plane in enumerate(("axial", "coronal", "sagittal")):
        cell = render_slice(volumes, centre[axis], scale, axis, cross=centre)
        cells.append(mark(cell, LETTERS[2 - axis], f"{plane} {centre[axis] + 1} / {scan.shape[axis]}"))
    both = tile([cells[0], tile(cells[1:], 1)], 2)
    return titled(both, name, masks, "through the middle of the masks", zoom)


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
    return to_figure(text_row(WIDTH, ["the original, then 24 augmentations of it"]), tile(views, 5))


# ------------------------------------------------------------------------------------------------------------- movies


def movie(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], size: int = 320,
          axis: int = 2) -> list[np.ndarray]:
    """A frame for each slice, with the masks over it; `size` is the longer side of the slice, in pixels."""
    volumes = [grey(scan), *as_bool_masks(scan, masks)]
    zoom = size / max(np.multiply(scan.shape, spacing)[1:])  # pixels per mm
    # A caption needs 200 pixels.
    slices = [mark(render_slice(volumes, n, np.multiply(spacing, zoom)), LETTERS[axis]) for n in range(len(scan))]
    slices = [centred(picture, 200) for picture in slices]
    captions = [footer(slices[0].shape[1], len(masks), f"slice {n + 1} / {len(scan)}", zoom) for n in range(len(scan))]
    return [np.concatenate(pictures) for pictures in zip(slices, captions, strict=True)]


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
        "errors": ERRORS if two else {},
        # Voxels of each mask, and of both of two, in each slice across each axis.
        "counts": [[mask.sum(axis=others).tolist() for mask in counted] for others in ((1, 2), (0, 2), (0, 1))],
        "fill": FILL,
        "voxels": base64.b64encode(zlib.compress(volumes.tobytes(), 9)).decode(),
    }
    page = Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    told = json.dumps(content).replace("<", "\\u003c")  # The name of a file is text, never a tag that ends the script.
    return page.replace("/* visualize.py writes the scan here */ null", told)


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


def tile_channels(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The eight channels of (C, H, W) that vary most, each in its own range and of `size` (x, y) pixels, as RGB."""
    shown = sorted(maps, key=np.std)[:-9:-1]
    shown = [colormaps["viridis"]((m - m.min()) / max(np.ptp(m), 1e-9), bytes=True)[..., :3] for m in shown]
    return tile([np.array(Image.fromarray(m).resize(size, Image.Resampling.NEAREST)) for m in shown], 4)


def layers(net, image: np.ndarray, axis: int = 2) -> Figure:
    """The `features` of a network laid out as the U: eight channels a level, attention gates on the skips.

    It takes the memory that one forward pass of `image` takes: of a large scan give a slice, or a patch.
    """
    seen, size = features(net, image), (64, round(64 * image.shape[-2] / image.shape[-1]))
    rows = [[f"down {n}", f"gate {n}", f"up {n}"] for n in range(1, len(net.down) + 1)]
    rows = [["slice", ".", "probability"], *rows, [".", "bottom", "."]]
    figure = NotebookFigure((9, len(rows) * (2 * size[1] + 50) / 100), dpi=100)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.16 / len(rows), wspace=0.14, hspace=25 / size[1])
    parts = figure.subplot_mosaic(rows, subplot_kw={"frame_on": False, "xticks": (), "yticks": ()})
    blocks = f": blocks of {net.stem} voxels a side enter as channels" if net.stem > 1 else ""
    seen["slice"] = grey(seen["slice"])
    for name, maps in seen.items():
        if name.startswith(("down", "bottom", "up")):
            title = "{}: {} of {} channels, {} x {}".format(name, min(8, len(maps)), *maps.shape)
            picture = tile_channels(maps, size)
        else:
            title = f"{name}, 0 (blue) to 1 (yellow)" if name != "slice" else f"slice{blocks}"
            picture = colormaps["viridis" if name != "slice" else "gray"](maps[0], bytes=True)[..., :3]
            picture = mark(np.array(Image.fromarray(picture).resize(np.multiply(size, 2))), LETTERS[axis])
        parts[name].imshow(picture)
        parts[name].set_title(title, fontsize=8)

    def arrow(start, end, gaps=(3, 3), bend="arc3"):  # from border to border; a gap leaves room for a title
        style = {"arrowstyle": "-|>", "color": RUNS[0], "linewidth": 1.5, "connectionstyle": bend,
                 "patchA": parts[start].patch, "patchB": parts[end].patch, "shrinkA": gaps[0], "shrinkB": gaps[1]}
        # Of the axes where it starts: a gate, drawn later, lies on it.
        parts[start].annotate("", (0.5, 0.5), (0.5, 0.5), parts[end].transAxes, parts[start].transAxes, style)

    for (above, _, above_right), (left, _, right) in zip(rows[:-2], rows[1:-1], strict=True):
        arrow(above, left, (3, 17))
        arrow(left, right)
        arrow(right, above_right, (17, 3))
        parts[left].text(1.05, 0.53, "skip", fontsize=8, color=RUNS[0], transform=parts[left].transAxes)
    arrow(rows[-2][0], "bottom", bend="angle,angleA=90,angleB=0")
    arrow("bottom", rows[-2][2], bend="angle,angleA=0,angleB=90")
    return figure


# ----------------------------------------------------------------------------------------------------- training curves

CURVES = {  # title of a panel, and the columns of log.csv in it
    "training loss": ["train/loss"], "Dice on the validation scans": ["val/dice"],
    "Dice of its worst scan": ["val/dice_worst"], "learning rate": ["train/lr"], "gradient norm": ["train/grad_norm"],
    "called organ (dashed: truth)": ["val/foreground_prediction", "val/foreground_truth"],
}


def read_log(run: str | Path) -> list[dict[str, float]]:
    """The rows of log.csv in a run's folder, NaN where there is no value."""
    with open(Path(run, "log.csv"), newline="") as file:
        return [{name: float(text or "nan") for name, text in row.items()} for row in csv.DictReader(file)]


def column(log: Sequence[dict], name: str) -> np.ndarray:
    """A column of a log, NaN where there is no value."""
    return np.array([row.get(name, np.nan) for row in log], float)


def fit_to_dice(axes) -> None:
    """Limits that show 0.90 from 0.91: the poor first epochs, a quarter at most, may lie below the picture."""
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = np.quantile(values, 0.25), values.max()
        room = max(high - low, 0.02)
        axes.set_ylim(max(low - room, 0), high + room / 2)


def curves(*logs: Sequence[dict[str, float]], names: Sequence[str] = ()) -> Figure:
    """What tells whether a run goes well, epoch by epoch (from 1), for one or more runs.

    A log is the rows of a log.csv; a value that it lacks is left out of the picture. The band around the mean Dice is
    one standard deviation over the scans, the star its best epoch. `names` tell several runs apart.
    """
    figure = NotebookFigure((WIDTH / 100, 5.3), dpi=100, layout="constrained")
    for axes, (title, columns) in zip(figure.subplots(2, 3).flat, CURVES.items(), strict=True):
        # The first run is the widest line: it is seen where the others lie on it.
        for log, colour, width in zip(logs, cycle(RUNS), np.linspace(1.5, 4, len(logs))[::-1], strict=False):
            epochs = np.arange(1, len(log) + 1)
            for name, style in zip(columns, ("-", "--"), strict=False):
                axes.plot(epochs, column(log, name), style, marker=".", color=colour, linewidth=width)
            mean, spread = column(log, "val/dice"), column(log, "val/dice_std")
            if columns == ["val/dice"] and np.isfinite(mean).any():
                axes.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
                best = np.nanargmax(mean)
                axes.plot(epochs[best], mean[best], "*", color=colour, markersize=12)
                axes.annotate(f"{mean[best]:.3f}", (epochs[best], mean[best]), (0, 7), textcoords="offset points",
                              horizontalalignment="right", color=colour)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="epoch", xlim=(0.5, None), ylim=(0, None))  # There is no epoch 0.
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
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: {error.strerror}") from None


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    write(path, png(figure))


def save_gif(frames: Sequence[np.ndarray], path: str | Path, seconds_per_frame: float = 0.1) -> None:
    """Write the frames of `movie` as a GIF that repeats for ever; a notebook shows it by `IPython.display.Image(path)`.

    One palette serves all frames: greys, and the same greys under each colour. They are few, because a GIF shrinks what
    repeats itself, and the noise of a scan in many greys never does.
    """
    greys, pure = np.linspace(0, 255, 24)[:, None], np.array([*ERRORS.values(), *MASKS[1:]])
    tints = [greys + FILL * (colour - greys) for colour in pure]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate((greys.repeat(3, axis=1), pure, *tints)).astype(np.uint8).tobytes())
    first, *rest = (Image.fromarray(rgb).quantize(palette=palette, dither=Image.Dither.NONE) for rgb in frames)
    file, milliseconds = io.BytesIO(), round(1000 * seconds_per_frame)
    first.save(file, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
    write(path, file.getvalue())


# -------------------------------------------------------------------------------------------------------- command line


def fullest_slice(checkpoint: str, path: str) -> tuple:
    """The network of a checkpoint, and the slice (1, H, W), or patch (D, H, W), of a scan about where it sees most.

    Slice and patch have the size of the training, so that the memory that `layers` takes does not grow with the scan.
    """
    import data  # The command line reads files as the training does; the functions above need no other file.
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


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("picture", choices=("overlay", "planes", "movie", "layers", "curves", "augment"))
    add("files", nargs="+", help="a scan and masks; layers: a checkpoint and a scan; curves: the folders of runs")
    add("--out", required=True, metavar="FILE", help="file to write: .png; of a movie .gif, or .html, a player")
    add("--axis", type=int, choices=(0, 1, 2), default=2, help="slices: 0 sagittal, 1 coronal, 2 axial (default: 2)")
    add("--label", type=int, nargs="+", metavar="N", help="foreground of the last file (default: all but 0)")
    add("--count", type=int, default=8, metavar="N", help="slices of overlay, 0 for all (default: 8)")
    add("--kind", choices=("geometry", "full"), default="full", help="what augment may change (default: full)")
    return parser.parse_args(argv)


def make_picture(args: argparse.Namespace) -> None:
    """Write the picture of a command line. Raises ValueError or OSError for bad input."""
    endings, html = (".gif", ".html") if args.picture == "movie" else (".png",), args.out.endswith(".html")
    if not args.out.endswith(endings):
        raise ValueError(f"--out {args.out}: {args.picture} writes {' or '.join(endings)}; name the file so")
    if args.picture in ("layers", "augment") and len(args.files) != 2:
        raise ValueError(f"{args.picture} takes two files, found {len(args.files)}; see --help")
    if args.out.endswith(".html") and len(args.files) > 9:
        raise ValueError(f"found {len(args.files) - 1} masks; a player shows 0 to 8")
    if not 0 <= args.count <= 1000:
        raise ValueError(f"--count {args.count}: give 1 to 1000 slices, or 0 for all")
    if args.picture == "curves":
        return save(curves(*map(read_log, args.files), names=args.files), args.out)
    if args.picture == "layers":
        return save(layers(*fullest_slice(*args.files)), args.out)
    import data

    # The three planes, of the picture and of the player, are cut out of the axial volume.
    axis = 2 if html or args.picture == "planes" else args.axis
    scan, name = data.read_scan(args.files[0], axis), Path(args.files[0]).name
    masks = [data.read_mask(path, scan, args.label if path is args.files[-1] else None) for path in args.files[1:]]
    content = scan.array, masks, scan.spacing
    if html:
        write(args.out, player(*content, name).encode())
    elif args.picture == "movie":
        save_gif(movie(*content, axis=axis), args.out)
    elif args.picture == "planes":
        save(planes(*content, name), args.out)
    elif args.picture == "overlay":
        save(overlay(*content, args.count or None, name, axis), args.out)
    else:
        how = {"spacing": [None] * 3, "crop": 0, "normalise": "percentile"}
        image, n = data.preprocess(scan.array, scan.spacing, how), masks[0].sum(axis=(1, 2)).argmax()
        augment = data.augmenter(args.kind)
        save(augmented(np.float32(image[n]), masks[0][n], augment, scan.spacing[1:], axis), args.out)


def draw(args: argparse.Namespace) -> None:
    """The command: write the picture, say where. Raises data.DataError for what a user can mend."""
    import data

    try:
        make_picture(args)
    except (ValueError, OSError, ImportError) as error:
        raise error if isinstance(error, data.DataError) else data.DataError(str(error)) from None
    print(args.out)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import data  # Here, so that the functions above need no other file.

    return data.run_command(draw, args)


if __name__ == "__main__":
    sys.exit(main())
