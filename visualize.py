"""Pictures of scans, masks, networks and training runs: looking often tells more than a score.

    Okabe and Ito, "Color Universal Design", 2008 (the colours: safe for colour-blind readers)
    Lorensen and Cline, "Marching Cubes", 1987 (the surface, by scikit-image)

Contract: a scan is (D, H, W), slices first, in any unit, and upright: in an axial slice rows run to the patient's
posterior, columns to the left. Spacing is (D, H, W) in mm, and every picture keeps its proportions. A mask has the
scan's shape; non-zero is foreground. Of two masks the first is a prediction, the second the truth, and their errors are
shown. Arrays go in; a matplotlib `Figure` comes out, or frames, uint8 RGB (H, W, 3). Nothing touches pyplot's global
state: no display is needed, and no figure stays open in a long run. The functions stand alone; the commands below read
scans as the training does, with data.py (layers with predict.py, too, and the player is player.html) beside this file.

    python visualize.py overlay scan.nii.gz prediction.nii.gz truth.nii.gz --out overlay.png    # eight slices
    python visualize.py montage scan.nii.gz prediction.nii.gz truth.nii.gz --out montage.png    # all of them
    python visualize.py planes  scan.nii.gz prediction.nii.gz truth.nii.gz --out planes.png
    python visualize.py surface scan.nii.gz prediction.nii.gz truth.nii.gz --out surface.png    # errors in mm
    python visualize.py movie   scan.nii.gz prediction.nii.gz truth.nii.gz --out movie.gif      # or .html: a player
    python visualize.py layers  runs/first/last.pt scan.nii.gz --out layers.png
    python visualize.py curves  runs/first runs/second --out curves.png
    python visualize.py augment scan.nii.gz mask.nii.gz --kind full --out augment.png
"""

from __future__ import annotations

import argparse
import base64
import copy
import csv
import io
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np
from matplotlib import cm, colormaps, colors
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from scipy import ndimage

ERRORS = {"correct": (86, 180, 233), "missed": (240, 228, 66), "false": (213, 94, 0)}  # sky blue, yellow, vermilion
MASKS = ((86, 180, 233), (230, 159, 0), (204, 121, 167), (0, 158, 115))  # sky blue, orange, purple, bluish green
RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")  # the darker ones, for a white background
FILL = 0.45  # Opacity inside a mask's rim: the tissue under it must stay readable.
WIDTH = 900  # Pixels of a figure: what a README shows.
PLANES = {"axial": (0, 1, 2), "coronal": (1, 0, 2), "sagittal": (2, 0, 1)}  # of an axial volume: slice, row, column


# ----------------------------------------------------------------------------------------------------------- one slice


def grey(scan: np.ndarray, window: Sequence[float] | None = None) -> np.ndarray:
    """Intensities as uint8 of the same shape; `window` is (black, white), by default the 0.5 and 99.5 percentiles."""
    scan = np.nan_to_num(np.asarray(scan, np.float32), posinf=0, neginf=0)
    sample = scan.ravel()[:: 1 + scan.size // 1_000_000]  # A million voxels fix a percentile well enough.
    black, white = np.percentile(sample, (0.5, 99.5)) if window is None else window
    return ((scan - black) * (255 / max(white - black, 1e-12))).clip(0, 255).astype(np.uint8)


def check(scan: np.ndarray, masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks as bool. Raises ValueError unless they have the scan's shape."""
    if np.ndim(scan) != 3 or any(np.shape(mask) != np.shape(scan) for mask in masks):
        found = [np.shape(mask) for mask in masks]
        raise ValueError(f"scan {np.shape(scan)}, masks {found}; expected (D, H, W) and a list of masks of that shape")
    return [np.not_equal(mask, 0) for mask in masks]


def legend(count: int) -> dict[str, tuple[int, int, int]]:
    """What `count` masks are drawn as, names and colours: two are taken for a prediction and the truth."""
    return ERRORS if count == 2 else {f"mask {n + 1}": MASKS[n % len(MASKS)] for n in range(count)}


def paint(picture: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (H, W) and bool masks (H, W) to RGB: a mask's rim is opaque, its inside a tint. Of two: their errors."""
    colours = legend(len(masks)).values()
    if len(masks) == 2:
        prediction, truth = masks
        masks = prediction & truth, truth & ~prediction, prediction & ~truth
    rgb = np.repeat(picture[..., None], 3, axis=-1)  # (H, W, 3)
    for area, colour in zip(masks, colours, strict=True):
        core = ndimage.binary_erosion(area)  # All four neighbours are in, too.
        rgb[core] = np.rint(rgb[core] + FILL * (np.float32(colour) - rgb[core]))
        rgb[area & ~core] = colour
    return rgb


def frame(picture: np.ndarray, masks: Sequence, zoom: Sequence[float], title: str = "") -> np.ndarray:
    """A slice, uint8 (H, W), and its masks, bool (H, W), as RGB of `zoom` (y, x) pixels a voxel; title in a corner."""
    size = [max(1, round(n * factor)) for n, factor in zip(picture.shape, zoom, strict=True)][::-1]
    # The scan is interpolated, a mask is not: one wants to see which voxels it holds.
    masks = [np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    image = Image.fromarray(paint(np.array(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)), masks))
    ImageDraw.Draw(image).text((3, 1), title, "white", font_size=13, stroke_width=1, stroke_fill="black")
    return np.array(image)


def strip(width: int, words: Sequence[str], colours: Sequence = (), apart: float = np.inf) -> np.ndarray:
    """A line of words side by side, RGB (22, width, 3) on black: over its whole width, or `apart` pixels apart."""
    image = Image.new("RGB", (width, 22))
    apart = min(apart, width / len(words))
    for n, (word, colour) in enumerate(zip_longest(words, colours, fillvalue="white")):
        x = width / 2 + (n + 0.5 - len(words) / 2) * apart
        ImageDraw.Draw(image).text((x, 11), word, colour, anchor="mm", font_size=13)
    return np.array(image)


def footer(width: int, count: int, caption: str, zoom: float) -> np.ndarray:
    """What goes below a picture of `zoom` pixels per mm: caption and scale bar, and the legend of several masks."""
    bar = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm * zoom < width / 3), default=1)
    lines = [strip(width, [caption, f"{bar} mm"])]
    left = round(0.75 * width - bar * zoom / 2)
    lines[0][-3:-1, left : left + round(bar * zoom)] = 255
    if count > 1:
        lines.append(strip(width, legend(count), legend(count).values(), 100))
    return np.concatenate(lines)


# ------------------------------------------------------------------------------------------------- figures and frames


def centred(picture: np.ndarray, width: int, height: int = 0) -> np.ndarray:
    """A picture with black around it, at least `width` wide and `height` high."""
    room = [max(0, want - have) for want, have in zip((height, width), picture.shape, strict=False)]
    return np.pad(picture, (*((n // 2, n - n // 2) for n in room), (0, 0)))


def grid(pictures: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """RGB pictures row by row, on black."""
    high, wide = np.max([picture.shape[:2] for picture in pictures], axis=0)
    cells = [centred(picture, wide + 4, high + 4) for picture in pictures]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    return np.concatenate([np.hstack(cells[n : n + columns]) for n in range(0, len(cells), columns)])


def sheet(*pictures: np.ndarray) -> Figure:
    """RGB pictures one below the other as a Figure, pixel for pixel: ten times as fast as axes for each of them."""
    width = max(picture.shape[1] for picture in pictures)
    picture = np.concatenate([centred(picture, width) for picture in pictures])
    figure = Figure((width / 100, len(picture) / 100), dpi=100)
    figure.add_axes((0, 0, 1, 1)).set_axis_off()
    figure.axes[0].imshow(picture, aspect="auto", interpolation="nearest")
    return figure


def coloured(picture: np.ndarray, name: str) -> np.ndarray:
    """uint8, or float of 0 to 1, (H, W) to RGB by a colour map of matplotlib."""
    return colormaps[name](picture, bytes=True)[..., :3]


def compare(images: np.ndarray, truths: np.ndarray, predictions: np.ndarray, titles: Sequence[str] = ()) -> Figure:
    """Scan, truth, probability (unless the predictions are bool), prediction and error of N slices, one row each.

    Args:
        images: (N, H, W) in any range.
        truths: (N, H, W), non-zero is foreground.
        predictions: (N, H, W), bool, or probabilities: above 0.5 is foreground.
        titles: N lines, each above its row.
    """
    shapes = [np.shape(array) for array in (images, truths, predictions)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(f"images, truths, predictions: shapes are {shapes}; expected one shape (N, H, W)")
    low, high = np.min(predictions), np.max(predictions)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"predictions: values are {low:g} to {high:g}; expected 0 to 1: give a mask or the sigmoid")
    bare = np.asarray(predictions).dtype == bool
    columns = ["scan", "truth", *([] if bare else ["probability"]), "prediction", "error"]
    zoom = [(WIDTH // len(columns) - 4) / shapes[0][2]] * 2
    rows = [strip(WIDTH, columns)]
    for image, truth, probability, title in zip_longest(images, np.not_equal(truths, 0), predictions, titles):
        mask = probability > 0.5
        cells = [frame(grey(image), masks, zoom) for masks in ([], [truth], [mask], [mask, truth])]
        if not bare:
            levels = frame(np.uint8(255 * probability), [], zoom)[..., 0]
            cells.insert(2, coloured(levels, "cividis"))  # dark blue 0, yellow 1
        rows += [strip(WIDTH, [title])] if title else []
        rows.append(grid(cells, len(cells)))
    return sheet(*rows, strip(WIDTH, ERRORS, ERRORS.values(), 100))


def montage(scan: np.ndarray, masks: Sequence, spacing: Sequence[float], slices=None, columns: int = 8) -> Figure:
    """The slices of a scan (all, or those of these indices), numbered from 1, with the masks over them."""
    masks, pictures = check(scan, masks), grey(scan)
    slices = range(len(scan)) if slices is None else slices
    columns = min(columns, len(slices))
    zoom = (WIDTH // columns - 4) / (scan.shape[2] * spacing[2])  # pixels per mm
    scale = np.multiply(spacing[1:], zoom)
    cells = grid([frame(pictures[n], [mask[n] for mask in masks], scale, str(n + 1)) for n in slices], columns)
    return sheet(cells, footer(cells.shape[1], len(masks), f"{len(slices)} of {len(scan)} slices", zoom))


def overlay(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], count: int = 8) -> Figure:
    """`count` slices with the masks over them, spread evenly over those with foreground (over all if there is none)."""
    held = np.flatnonzero(np.any([mask.any(axis=(1, 2)) for mask in check(scan, masks)], axis=0))
    held = held if len(held) else np.arange(len(scan))
    return montage(scan, masks, spacing, held[np.unique(np.linspace(0, len(held) - 1, count).round().astype(int))], 4)


def planes(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float]) -> Figure:
    """Three planes of an axial scan, in one scale, through the middle of the largest section of the masks."""
    masks, picture = check(scan, masks), grey(scan)
    union = np.any(masks, axis=0) if np.any(masks) else np.ones(scan.shape, bool)
    largest = int(union.sum(axis=(1, 2)).argmax())
    centre = largest, *(int(np.median(places)) for places in np.nonzero(union[largest]))
    zoom = (WIDTH // 2 - 6) / max(np.multiply(scan.shape, spacing)[1:])
    cells = []
    for name, axes in PLANES.items():
        upright = slice(None, None, 1 if name == "axial" else -1)  # the patient's head is up
        cut, *cuts = (array.transpose(axes)[centre[axes[0]]][upright] for array in (picture, *masks))
        scale = [spacing[axis] * zoom for axis in axes[1:]]
        cells.append(frame(cut, cuts, scale, f"{name} {centre[axes[0]] + 1} / {scan.shape[axes[0]]}"))
    both = grid([cells[0], grid(cells[1:], 1)], 2)
    return sheet(both, footer(both.shape[1], len(masks), "through the largest section", zoom))


def augmented(image: np.ndarray, mask: np.ndarray, augment: Callable, spacing: Sequence[float] = (1, 1)) -> Figure:
    """5 x 5 views of one slice: as it is, then `augment(image, mask, entropy)` for entropy 1 to 24.

    Args:
        image: float32 (H, W). All views share its window of intensities, so that a change of brightness shows.
        mask: uint8 (H, W), 0 or 1.
        spacing: (H, W) in mm.
    """
    samples = [(image, mask), *(augment(image, mask, entropy) for entropy in range(1, 25))]
    window = np.percentile(image, (0.5, 99.5))
    zoom = np.multiply(spacing, (WIDTH // 5 - 4) / (image.shape[1] * spacing[1]))
    pictures = [frame(grey(image, window), [mask > 0], zoom) for image, mask in samples]
    return sheet(strip(WIDTH, ["the slice as it is, then 24 augmentations of it"]), grid(pictures, 5))


def surface(masks: Sequence[np.ndarray], spacing: Sequence[float]) -> Figure:
    """The organ in space, from the front and from behind; of two masks the first, coloured by its error in mm.

    Smoothed by 1.5 mm, for the eye: measure with metrics.py. The masks are axial; an empty one raises ValueError.
    """
    from skimage.measure import marching_cubes

    if not all(np.any(mask) for mask in masks):
        raise ValueError("a mask is empty; it has no surface")
    box = ndimage.find_objects(np.any(check(masks[0], masks), axis=0).astype(int))[0]
    mask, *truths = (np.pad(np.not_equal(mask[box], 0), 1) for mask in masks)
    # In voxels of 1.5 mm: equal sides for a smooth surface, and few enough triangles for matplotlib to sort.
    solid = ndimage.zoom(np.float32(mask), np.divide(spacing, 1.5), order=1, grid_mode=True, mode="nearest")
    voxel = np.multiply(mask.shape, spacing) / solid.shape  # as rounded
    points, triangles, normals, _ = marching_cubes(ndimage.gaussian_filter(np.pad(solid, 3), 1), 0.5, spacing=voxel)
    corners = (points - 2.5 * voxel)[triangles]  # (triangles, 3, zyx): mm from the corner of the box to S, P, L
    high, deep, wide = np.ptp(corners, axis=(0, 1))
    inches = WIDTH / 100, 4.2 * min(1, (high + deep / 4) / wide) + 0.3 + 0.8 * len(truths)
    figure = Figure(inches, dpi=100, layout="constrained")
    views, colour = figure.subplots(1, 2), np.divide(MASKS[:1], 255)
    if truths:
        outside, inside = (ndimage.distance_transform_edt(part, spacing) for part in (~truths[0], truths[0]))
        middles = corners.mean(axis=1) / spacing - 0.5  # in voxels, from the middle of the first
        error = ndimage.map_coordinates(outside - inside, middles.T, order=1, mode="nearest")
        limit = max(1, np.ceil(np.percentile(abs(error), 98)))
        blue, vermilion = RUNS[:2]
        ramp = colors.LinearSegmentedColormap.from_list("error", (blue, "0.9", vermilion))
        scale = cm.ScalarMappable(colors.Normalize(-limit, limit), ramp)
        colour = scale.to_rgba(error)[:, :3]
        bar = figure.colorbar(scale, ax=views, location="bottom", shrink=0.4, aspect=25)
        bar.set_label("mm from the surface of the truth: below 0 inside, above 0 outside", fontsize=9)
    cosine, sine = np.cos(np.radians(15)), np.sin(np.radians(15))  # seen from 15 degrees above
    for axes, title, way in zip(views, ("front", "back"), (1, -1), strict=True):
        turn = np.transpose([(0, 0, way), (cosine, way * sine, 0), (sine, -way * cosine, 0)])  # to right, up and near
        seen, light = corners @ turn, normals[triangles].mean(axis=1) @ turn @ (-0.4, 0.45, 0.8)
        shaded = colour * (0.55 + 0.45 * light.clip(0, 1))[:, None]
        order = seen[..., 2].mean(axis=1).argsort()  # The near ones are painted last.
        axes.add_collection(PolyCollection(seen[order, :, :2], facecolors=shaded[order], antialiased=False))
        axes.autoscale_view()
        axes.set_aspect("equal", "datalim")
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
    return figure


# ------------------------------------------------------------------------------------------------------------- movies


def movie(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], size: int = 320) -> list[np.ndarray]:
    """A frame for each slice, with the masks over it; `size` is the longer side of the slice, in pixels."""
    masks, zoom, frames = check(scan, masks), size / max(np.multiply(scan.shape, spacing)[1:]), []
    for n, picture in enumerate(grey(scan)):
        picture = frame(picture, [mask[n] for mask in masks], np.multiply(spacing[1:], zoom))
        picture = centred(picture, 200)  # what a caption needs
        caption = footer(picture.shape[1], len(masks), f"slice {n + 1} / {len(scan)}", zoom)
        frames.append(np.concatenate((picture, caption)))
    return frames


def player(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], plane: int = 2) -> str:
    """An axial scan and its masks as one HTML page that needs no network: player.html, with the volume in it.

    Slices above 320 pixels are shrunk. `plane` is the one that the keys move first: 0 sagittal, 1 coronal, 2 axial.
    """
    masks = check(scan, masks)
    if len(masks) > 8:
        raise ValueError(f"{len(masks)} masks; a voxel of the player has eight bits, one for each mask")
    page = Path(__file__).with_name("player.html")
    if not page.is_file():
        raise ValueError(f"{page}: no such file; the .html movie needs it beside visualize.py")
    shrink = min(1, 320 / max(scan.shape[1:]))
    labels = np.packbits([*masks, np.zeros(scan.shape, bool)], axis=0, bitorder="little")[0]  # a bit for each mask
    greys, labels = (
        ndimage.zoom(volume, (1, shrink, shrink), order=order, grid_mode=True, mode="nearest")
        for volume, order in ((grey(scan), 1), (labels, 0))
    )
    greys &= 252  # Steps of 4: the eye cannot tell them apart, and they compress.
    two = len(masks) == 2
    content = {
        "shape": greys.shape,
        "spacing": (np.multiply(spacing, scan.shape) / greys.shape).tolist(),
        "planes": PLANES,
        "start": ("sagittal", "coronal", "axial")[plane],
        "masks": {"prediction": MASKS[0], "truth": MASKS[2]} if two else legend(len(masks)),
        "errors": {name: ERRORS[name] for name in ("missed", "false")} if two else {},
        "fill": FILL,
        "voxels": base64.b64encode(zlib.compress(greys.tobytes() + labels.tobytes(), 9)).decode(),
    }
    return page.read_text(encoding="utf-8").replace("/* visualize.py writes the scan here */ null", json.dumps(content))


# ------------------------------------------------------------------------------------------------ what the network sees


def features(net, image: np.ndarray) -> dict[str, np.ndarray]:
    """What a U-Net of unet.py makes of a slice: by name, feature maps (C, H, W), finest level 1, and `probability`.

    Args:
        net: the network; of attention gates, `gate 1` and so on are the weights (1, H, W) of the skips.
        image: float32 (H, W), or (C, H, W) with its neighbours, preprocessed as for training; for a 3D network a patch
            (D, H, W), of which the middle slice is kept.
    """
    import torch  # Here, so that the other pictures work without it.

    net, seen = copy.deepcopy(net), {}  # a copy, so that the hooks go with it

    def middle(maps):  # (C, H, W) of (C, D, H, W)
        return maps if net.dims == 2 else maps[:, maps.shape[1] // 2]

    def watch(name, part):
        def keep(module, inputs, output):
            output = middle(output[0].float())
            seen[name] = (output.sigmoid() if name.startswith("gate") else output).cpu().numpy()

        part.register_forward_hook(keep)

    watch("bottom", net.bottom)
    for name, parts in (("down", net.down), ("up", net.up[::-1]), ("gate", net.gates[::-1])):  # finest level first
        for level, part in enumerate(parts, start=1):
            watch(f"{name} {level}", part.weight if name == "gate" else part)  # of a gate, before its sigmoid
    size = image.shape[-2:] if net.dims == 2 else image.shape
    x = torch.from_numpy(image).reshape(1, net.in_channels, *size).to(next(net.parameters()).device)
    seen["probability"] = middle(net.predict(x)[0]).cpu().numpy()
    return seen


def layers(net, image: np.ndarray) -> Figure:
    """The `features` of a network laid out as the U: eight channels a level, attention gates on the skips."""
    stack = image.reshape(-1, *image.shape[-2:])  # of neighbours, of a patch, or of one
    seen = {"slice": stack[[len(stack) // 2]], **features(net, image)}
    tile = 64, round(64 * image.shape[-2] / image.shape[-1])  # pixels (width, height) of a map
    levels = range(1, len(net.down) + 1)
    names = [["slice", "note", "probability"], *([f"down {n}", f"gate {n}", f"up {n}"] for n in levels)]
    figure = Figure((WIDTH / 100, (len(names) + 1) * (2 * tile[1] + 50) / 100), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.97, wspace=0.14, hspace=25 / tile[1])
    parts = figure.subplot_mosaic([*names, [".", "bottom", "."]])
    for axes in parts.values():
        axes.set_axis_off()
    for name, maps in seen.items():
        title, picture, limits = name.split()[0], maps[0], {"vmin": 0, "vmax": 1}
        if title == "slice":
            limits = {"cmap": "gray"}
        elif title not in ("gate", "probability"):
            title = "{}: {} channels, {} x {}".format(name, *maps.shape)
            tiles = []
            for channel in sorted(maps, key=np.std)[:-9:-1]:  # those that vary most over the slice
                channel = coloured((channel - channel.min()) / max(np.ptp(channel), 1e-9), "viridis")
                tiles.append(np.array(Image.fromarray(channel).resize(tile, Image.Resampling.NEAREST)))
            picture = grid(tiles, 4)
        parts[name].imshow(picture, **limits)
        parts[name].set_title(title, fontsize=8)
    note = ("the eight channels of each level that vary most, each in\n"
            "its own range; gates and probability from 0 (blue) to 1 (yellow)")
    parts["note"].text(0.5, 0.5, note, fontsize=8, ha="center", va="center")

    def arrow(start, end, gaps=(3, 3), bend="arc3"):  # from border to border; a gap leaves room for a title
        style = {"arrowstyle": "-|>", "color": RUNS[0], "linewidth": 1.5, "connectionstyle": bend,
                 "patchA": parts[start].patch, "patchB": parts[end].patch, "shrinkA": gaps[0], "shrinkB": gaps[1]}
        parts[end].annotate("", (0.5, 0.5), (0.5, 0.5), parts[end].transAxes, parts[start].transAxes, style)

    for n in levels:
        arrow(f"down {n - 1}" if n > 1 else "slice", f"down {n}", (3, 17))
        arrow(f"up {n}", f"up {n - 1}" if n > 1 else "probability", (17, 3))
        stops = [f"down {n}", *([f"gate {n}"] if net.gates else []), f"up {n}"]
        for start, end in zip(stops, stops[1:], strict=False):
            arrow(start, end)
        parts[f"down {n}"].text(1.05, 0.53, "skip", fontsize=8, color=RUNS[0], transform=parts[f"down {n}"].transAxes)
    arrow(f"down {n}", "bottom", bend="angle,angleA=90,angleB=0")
    arrow("bottom", f"up {n}", bend="angle,angleA=0,angleB=90")
    return figure


# ----------------------------------------------------------------------------------------------------- training curves

CURVES = {
    "training loss": ("train_loss",),
    "Dice per scan": ("dice_mean", "dice_worst"),
    "foreground share": ("foreground_truth", "foreground_prediction"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "skipped steps": ("skipped",),
    "seconds per epoch": ("seconds",),
    "share of time waiting for data": ("waiting",),
    "peak memory, GB": ("peak_memory_gb",),
}


def read_log(run: str | Path) -> list[dict[str, float]]:
    """The rows of log.csv in a run's folder, NaN where there is no value. Raises ValueError without an epoch."""
    path = Path(run, "log.csv")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the log of a run: give the folder that train.py wrote it to")
    with open(path, newline="") as file:
        rows = [{name: float(text or "nan") for name, text in row.items()} for row in csv.DictReader(file)]
    if not rows or "epoch" not in rows[0]:
        raise ValueError(f"{path}: {len(rows)} rows, no `epoch`; expected the log of a run with a finished epoch")
    return rows


def curves(*runs: Sequence[dict[str, float]], names: Sequence[str] = ()) -> Figure:
    """Loss, Dice (band: one standard deviation), foreground, learning rate, gradient, time, memory of one or more runs.

    A run is the rows of its log.csv. A panel of which no run has the columns is left out. `names` label several runs.
    """
    have = {name for run in runs for row in run for name in row}
    shown = {title: columns for title, columns in CURVES.items() if have.intersection(columns)}
    figure = Figure((WIDTH / 100, 2.5 * -(-len(shown) // 3) + 0.3), dpi=100, layout="constrained")
    for n, (title, columns) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(-(-len(shown) // 3), 3, n)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch" if n > len(shown) - 3 else "", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        # The first run is the widest line: it is seen where the others lie on it.
        for run, colour, width in zip(runs, cycle(RUNS), np.linspace(1.5, 4, len(runs))[::-1], strict=False):
            needed = ("epoch", "dice_std", *columns)
            log = {name: np.array([row.get(name, np.nan) for row in run], float) for name in needed}
            for name, style in zip(columns, ("-", "--"), strict=False):
                axes.plot(log["epoch"], log[name], style, marker=".", color=colour, linewidth=width, label=name)
            if title == "Dice per scan":
                band = log["dice_mean"] - log["dice_std"], log["dice_mean"] + log["dice_std"]
                axes.fill_between(log["epoch"], *band, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(0, axes.get_ylim()[1] if axes.dataLim.y1 > 0 else 1)
        if len(columns) > 1:
            axes.legend(handles=axes.lines[: len(columns)], fontsize=8)
    if names:
        lines = figure.axes[0].lines[:: len(figure.axes[0].lines) // len(runs)]  # one of each run
        figure.legend(lines, names, loc="outside lower center", ncols=3, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------------------- files


def rgb(figure: Figure) -> np.ndarray:
    """The figure as uint8 (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def write(path: str | Path, put: Callable[[io.BytesIO], object]) -> None:
    """Make the folder, write what `put` makes under another name, rename: the file is there whole or not at all."""
    path, content = Path(path), io.BytesIO()
    put(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.getbuffer())
        temporary.replace(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        size = len(content.getbuffer())
        raise OSError(f"{path}: {error.strerror}; {size:,} bytes to write, {free:,} bytes free") from None
    finally:
        temporary.unlink(missing_ok=True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    write(path, lambda file: Image.fromarray(rgb(figure)).save(file, "PNG", optimize=True))


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
    options = {"save_all": True, "append_images": rest, "duration": round(1000 * seconds_per_frame), "loop": 0}
    write(path, lambda file: first.save(file, "GIF", **options))


# -------------------------------------------------------------------------------------------------------- command line


def fullest_slice(checkpoint: str, path: str) -> tuple:
    """The network of a checkpoint, and the slice (C, H, W) or patch (D, H, W) of a scan in which it sees most."""
    import data
    import predict

    saved = predict.load_checkpoint(checkpoint)
    net, recipe = predict.load_network(saved, path=checkpoint), saved["preprocess"]
    scan = data.read_scan(path, recipe["axis"])
    volume = data.preprocess(scan.array, scan.spacing, recipe)
    most = predict.predict_volume(net, volume, size=recipe["size"]).sum(axis=(1, 2)).argmax()
    # In 3D as many slices as a patch has, the fullest in the middle.
    around = net.in_channels // 2 if net.dims == 2 else recipe["size"][0] // 2
    image = data.with_neighbours(volume, [most], around)[0]
    return net, data.fit(image, np.maximum(volume.shape[1:], recipe["size"][-2:]))


ARGUMENTS = {
    "scan": {"help": "NIfTI file"},
    "masks": {"nargs": "*", "help": "on the scan's grid; of two, a prediction and the truth, the errors are shown"},
    "checkpoint": {"help": "last.pt or best.pt of a run"},
    "runs": {"nargs": "+", "help": "folders of runs, with their log.csv"},
    "--axis": {"type": int, "choices": (0, 1, 2), "default": 2,
               "help": "slice axis: 0 sagittal, 1 coronal, 2 axial (default: %(default)s)"},
    "--kind": {"choices": ("seed", "full"), "default": "seed",
               "help": "the augmentation, as in train.py (default: %(default)s)"},
    "--out": {"required": True, "help": "file to write"},
}
COMMANDS = {
    "overlay": ("eight slices of a scan with masks over them, as PNG", "scan", "masks", "--axis"),
    "montage": ("all slices of a scan with masks over them, as PNG", "scan", "masks", "--axis"),
    "planes": ("an axial, a coronal and a sagittal slice, as PNG", "scan", "masks"),
    "surface": ("the surface of a mask; with the truth, its errors in mm, as PNG", "scan", "masks"),
    "movie": ("all slices, as GIF, or as HTML: a player of the three planes", "scan", "masks", "--axis"),
    "layers": ("what each level of a trained network sees, as PNG", "checkpoint", "scan"),
    "curves": ("training curves of runs, as PNG", "runs"),
    "augment": ("one slice, augmented in 24 ways, as PNG", "scan", "masks", "--axis", "--kind"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (text, *arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        for argument in (*arguments, "--out"):
            command.add_argument(argument, **ARGUMENTS[argument])
    return parser.parse_args(argv)


def draw(args: argparse.Namespace) -> None:
    endings = (".gif", ".html") if args.command == "movie" else (".png",)
    ending = Path(args.out).suffix.lower()
    if ending not in endings:
        raise ValueError(f"--out {args.out}: {args.command} writes {' or '.join(endings)}; name the file so")
    if args.command == "curves":
        return save(curves(*map(read_log, args.runs), names=args.runs), args.out)
    if args.command == "layers":
        return save(layers(*fullest_slice(args.checkpoint, args.scan)), args.out)
    import data  # The command line reads files as the training does; the functions above need no other file.

    axis = 2 if ending == ".html" else getattr(args, "axis", 2)  # The player cuts all planes out of the axial volume.
    found = data.read_scan(args.scan, axis)
    scan, spacing = found.array, found.spacing
    masks = [data.read_mask(path, found, axis) > 0 for path in args.masks]
    if not masks and args.command in ("surface", "augment"):
        raise ValueError(f"{args.command} draws a mask; give one after the scan")
    if ending == ".html":
        page = player(scan, masks, spacing, args.axis)
        write(args.out, lambda file: file.write(page.encode()))
    elif ending == ".gif":
        save_gif(movie(scan, masks, spacing), args.out)
    elif args.command == "surface":
        save(surface(masks, spacing), args.out)
    elif args.command == "augment":
        largest = masks[0].sum(axis=(1, 2)).argmax()
        scan = scan.clip(*np.percentile(scan, (0.5, 99.5)))
        image = np.float32((scan[largest] - scan.mean()) / scan.std())  # mean 0 and deviation 1, as in the training
        save(augmented(image, np.uint8(masks[0][largest]), data.augmenter(args.kind), spacing[1:]), args.out)
    else:
        picture = {"overlay": overlay, "montage": montage, "planes": planes}[args.command]
        save(picture(scan, masks, spacing), args.out)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        draw(args)
    except (ValueError, OSError, ImportError) as error:
        hint = "; run it beside data.py and predict.py, with requirements.txt" if isinstance(error, ImportError) else ""
        print(f"visualize.py: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
