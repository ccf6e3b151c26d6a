"""Pictures of scans, masks, networks and training runs: looking often tells more than a score.

    Okabe and Ito, "Color Universal Design", 2008 (the colours: safe for colour-blind readers)
    Lorensen and Cline, "Marching Cubes", 1987 (the surface, by scikit-image)

Contract: a scan is (D, H, W), slices first, in any unit, and upright: in an axial slice rows run to the patient's
posterior, columns to the left. Spacing is (D, H, W) in mm, and every picture keeps its proportions. A mask has the
scan's shape; non-zero is foreground. Of two masks the first is a prediction, the second the truth, and their errors are
shown. Arrays go in; a matplotlib `Figure` comes out, or frames, uint8 RGB (H, W, 3). Nothing touches pyplot's global
state: no display is needed, and no figure stays open in a long run.

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
import csv
import gzip
import io
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from itertools import cycle, zip_longest
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

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


def legend(count: int) -> dict[str, tuple[int, int, int]]:
    """What `count` masks are drawn as: names and colours."""
    return ERRORS if count == 2 else {f"mask {n + 1}": MASKS[n % len(MASKS)] for n in range(count)}


def regions(masks: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """The areas that `legend` names: the masks, or, of two, where they agree and how they differ."""
    if len(masks) != 2:
        return masks
    prediction, truth = masks
    return prediction & truth, truth & ~prediction, prediction & ~truth


def paint(picture: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (H, W) and bool masks (H, W) to RGB: a mask's rim is opaque, its inside a tint."""
    rgb = np.repeat(picture[..., None], 3, axis=-1)  # (H, W, 3)
    for area, colour in zip(regions(masks), legend(len(masks)).values(), strict=True):
        p = np.pad(area, 1)
        core = area & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]  # All four neighbours are in, too.
        rgb[core] = np.rint(rgb[core] + FILL * (np.float32(colour) - rgb[core]))
        rgb[area & ~core] = colour
    return rgb


def strip(width: int, words: Sequence[str], colours: Sequence = ()) -> np.ndarray:
    """A line of text, RGB (22, width, 3), white on black: each word in the middle of its equal share of the width."""
    image = Image.new("RGB", (width, 22))
    for n, (word, colour) in enumerate(zip_longest(words, colours, fillvalue="white")):
        ImageDraw.Draw(image).text(((n + 0.5) * width / len(words), 11), word, colour, font(), "mm")
    return np.array(image)


def font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 13)


def centred(picture: np.ndarray, width: int, height: int = 0) -> np.ndarray:
    """A picture with black around it, at least `width` wide and `height` high."""
    room = [max(0, want - have) for want, have in zip((height, width), picture.shape, strict=False)]
    return np.pad(picture, (*((n // 2, n - n // 2) for n in room), (0, 0)))


def footer(width: int, count: int, caption: str = "", zoom: float = 0) -> np.ndarray:
    """What goes below a picture: caption and scale bar, if it has `zoom` pixels per mm; the legend of several masks."""
    lines = []
    if zoom:
        bar = max((mm for mm in (1, 2, 5, 10, 20, 50, 100) if mm * zoom < width / 3), default=1)
        words = [caption, f"{bar} mm"] if caption else [f"{bar} mm"]
        lines.append(strip(width, words))
        left = round((len(words) - 0.5) * width / len(words) - bar * zoom / 2)
        lines[0][-3:-1, left : left + round(bar * zoom)] = 255
    if count > 1:
        colours = legend(count)
        lines.append(centred(strip(min(width, 100 * count), list(colours), colours.values()), width))
    return np.concatenate(lines)


def resized(picture: np.ndarray, masks: Sequence, spacing: Sequence[float], zoom: float) -> tuple[np.ndarray, list]:
    """A slice and its masks at `zoom` pixels per mm; `spacing` is (H, W) in mm."""
    shape = [max(1, round(n * mm * zoom)) for n, mm in zip(picture.shape, spacing, strict=True)][::-1]
    # The scan is interpolated, a mask is not: one wants to see which voxels it holds.
    masks = [np.array(Image.fromarray(np.uint8(mask)).resize(shape, Image.Resampling.NEAREST)) > 0 for mask in masks]
    return np.array(Image.fromarray(picture).resize(shape, Image.Resampling.BILINEAR)), masks


def frame(picture: np.ndarray, masks: Sequence, spacing: Sequence[float], zoom: float, number: int = 0) -> np.ndarray:
    """One slice, uint8 (H, W), and its masks, bool (H, W), as RGB; a `number` stands in the corner."""
    rgb = paint(*resized(picture, masks, spacing, zoom))
    if number:
        image = Image.fromarray(rgb)
        ImageDraw.Draw(image).text((3, 1), str(number), "white", font(), stroke_width=1, stroke_fill="black")
        rgb = np.array(image)
    return rgb


# ------------------------------------------------------------------------------------------------- figures and frames


def sheet(picture: np.ndarray) -> Figure:
    """An RGB picture as a Figure, pixel for pixel: ten times as fast as axes for each part, and training waits."""
    figure = Figure((picture.shape[1] / 100, picture.shape[0] / 100), dpi=100)
    figure.add_axes((0, 0, 1, 1)).set_axis_off()
    figure.axes[0].imshow(picture, aspect="auto", interpolation="nearest")
    return figure


def panels(pictures: Sequence[np.ndarray], columns: int, headings=(), titles=(), below=()) -> Figure:
    """RGB pictures row by row; headings above the columns, titles above the rows, `below` (RGB) under them all."""
    high, wide = np.max([picture.shape[:2] for picture in pictures], axis=0)
    cells = [np.pad(centred(picture, wide, high), ((2, 2), (2, 2), (0, 0))) for picture in pictures]
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    rows = [np.concatenate(cells[n : n + columns], axis=1) for n in range(0, len(cells), columns)]
    width = rows[0].shape[1]
    lines = [strip(width, headings)] if headings else []
    for row, title in zip_longest(rows, titles):
        lines += [strip(width, [title]), row] if title else [row]
    return sheet(np.concatenate([*lines, centred(below, width)] if len(below) else lines))


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
    zoom = (WIDTH // len(columns) - 4) / shapes[0][2]
    pictures = []
    for image, truth, probability in zip(images, np.not_equal(truths, 0), predictions, strict=True):
        mask = probability > 0.5
        shown = {"scan": (), "truth": (truth,), "prediction": (mask,), "error": (mask, truth)}
        cells = {name: frame(grey(image), masks, (1, 1), zoom) for name, masks in shown.items()}
        levels = frame(np.uint8(255 * probability), (), (1, 1), zoom)[..., 0]
        cells["probability"] = matplotlib.colormaps["cividis"](levels, bytes=True)[..., :3]  # dark blue 0, yellow 1
        pictures += [cells[name] for name in columns]
    return panels(pictures, len(columns), columns, titles or (), footer(WIDTH, 2))


def check(scan: np.ndarray, masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The masks as bool. Raises ValueError unless they have the scan's shape."""
    if np.ndim(scan) != 3 or any(np.shape(mask) != np.shape(scan) for mask in masks):
        found = [np.shape(mask) for mask in masks]
        raise ValueError(f"scan {np.shape(scan)}, masks {found}; expected (D, H, W) and a list of masks of that shape")
    return [np.not_equal(mask, 0) for mask in masks]


def montage(scan: np.ndarray, masks: Sequence, spacing: Sequence[float], slices=None, columns: int = 8) -> Figure:
    """The slices of a scan (all, or those of these indices), numbered from 1, with the masks over them."""
    masks, pictures = check(scan, masks), grey(scan)
    slices = range(len(scan)) if slices is None else slices
    columns = min(columns, len(slices))
    zoom = (WIDTH // columns - 4) / (scan.shape[2] * spacing[2])
    cells = [frame(pictures[n], [mask[n] for mask in masks], spacing[1:], zoom, number=n + 1) for n in slices]
    below = footer(cells[0].shape[1] * columns, len(masks), f"{len(cells)} of {len(scan)} slices", zoom)
    return panels(cells, columns, below=below)


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
    zoom = (WIDTH - 8) / (scan.shape[2] * spacing[2] + max(np.multiply(scan.shape, spacing)[1:]))
    cells = {}
    for name, axes in PLANES.items():
        upright = slice(None, None, 1 if name == "axial" else -1)  # the patient's head is up
        cut, *cuts = (array.transpose(axes)[centre[axes[0]]][upright] for array in (picture, *masks))
        rgb = frame(cut, cuts, [spacing[axis] for axis in axes[1:]], zoom)
        title = f"{name} {centre[axes[0]] + 1} / {scan.shape[axes[0]]}"
        cells[name] = np.concatenate((strip(rgb.shape[1], [title]), rgb))
    wide = max(cells[name].shape[1] for name in ("coronal", "sagittal"))
    right = np.concatenate([centred(cells[name], wide) for name in ("coronal", "sagittal")])
    high = max(len(cells["axial"]), len(right))
    both = np.concatenate([centred(part, part.shape[1] + 4, high) for part in (cells["axial"], right)], axis=1)
    return sheet(np.concatenate((both, footer(both.shape[1], len(masks), zoom=zoom))))


def augmented(image: np.ndarray, mask: np.ndarray, augment: Callable, spacing: Sequence[float] = (1, 1)) -> Figure:
    """5 x 5 views of one slice: as it is, then `augment(image, mask, entropy)` for entropy 1 to 24.

    Args:
        image: float32 (H, W). All views share its window of intensities, so that a change of brightness shows.
        mask: uint8 (H, W), 0 or 1.
        spacing: (H, W) in mm.
    """
    samples = [(image, mask), *(augment(image, mask, entropy) for entropy in range(1, 25))]
    window, zoom = np.percentile(image, (0.5, 99.5)), (WIDTH // 5 - 4) / (image.shape[1] * spacing[1])
    pictures = [frame(grey(image, window), [mask > 0], spacing, zoom) for image, mask in samples]
    return panels(pictures, 5, titles=["the slice as it is, then 24 augmentations of it"])


def surface(masks: Sequence[np.ndarray], spacing: Sequence[float]) -> Figure:
    """The organ in space, from the front and from behind; of two masks the first, coloured by its error in mm.

    Smoothed by 1.5 mm, for the eye: measure with metrics.py. The masks are axial; an empty one raises ValueError.
    """
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection
    from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates, zoom
    from skimage.measure import marching_cubes

    mask, *truths = check(masks[0], masks)
    if not mask.any():
        raise ValueError("the mask is empty; it has no surface")
    # In voxels of 1.5 mm: equal sides for a smooth surface, and few enough triangles for matplotlib to sort.
    around = tuple(slice(max(places.min() - 2, 0), places.max() + 3) for places in np.nonzero(mask))
    factors = np.divide(spacing, 1.5)
    solid = zoom(np.float32(mask[around]), factors, order=1, grid_mode=True, mode="nearest")
    factors = np.divide(solid.shape, mask[around].shape)  # as rounded
    points, triangles, *_ = marching_cubes(gaussian_filter(np.pad(solid, 3), 1), 0.5)
    # Back to the voxels of the mask; grid_mode counts from a voxel's border, map_coordinates from its middle.
    points = (points - 2.5) / factors - 0.5 + [part.start for part in around]  # (points, 3)
    corners = (points * spacing)[triangles][..., ::-1]  # (triangles, 3 corners, xyz), in mm: left, posterior, superior
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    colour = np.broadcast_to(np.divide(MASKS[0], 255), normals.shape)
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    across, deep, up = high - low
    seen = max(across, up + deep / 4)  # mm; a quarter of the depth shows from 15 degrees above
    tall = 4.1 * (up + deep / 4) / seen + 0.4  # inches
    below = 0.8 if truths else 0
    figure = Figure((WIDTH / 100, tall + below), dpi=100)
    if truths:
        blue, vermilion = RUNS[:2]
        scale = ScalarMappable(cmap=LinearSegmentedColormap.from_list("error", (blue, "0.9", vermilion)))
        outside, inside = (distance_transform_edt(part, spacing) for part in (~truths[0], truths[0]))
        error = map_coordinates(outside - inside, points[triangles].mean(axis=1).T, order=1, mode="nearest")
        limit = max(1.0, float(np.ceil(np.percentile(abs(error), 98))))
        scale.set_clim(-limit, limit)
        colour = scale.to_rgba(error)[:, :3]
        place = figure.add_axes((0.3, 0.55 / (tall + below), 0.4, 0.15 / (tall + below)))
        figure.colorbar(scale, cax=place, orientation="horizontal")
        place.set_xlabel("mm from the surface of the truth: below 0 inside, above 0 outside", fontsize=9)
    for n, (title, azimuth, light) in enumerate((("front", -90, (-0.4, -0.8, 0.45)), ("back", 90, (0.4, 0.8, 0.45)))):
        # Square axes, as matplotlib's 3D wants them, of which what is above and below the organ is cut off.
        square = 0.5 * n, (below + tall / 2 - 2.25) / (tall + below), 0.5, 4.5 / (tall + below)
        axes = figure.add_axes(square, projection="3d", proj_type="ortho")
        shade = 0.55 + 0.45 * (normals @ light).clip(0, 1)
        axes.add_collection3d(Poly3DCollection(corners, facecolors=colour * shade[:, None], antialiased=False))
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
        axes.set_box_aspect(high - low, zoom=0.88 * np.linalg.norm(high - low) / seen)  # 4.1 of the 4.5 inches
        axes.view_init(elev=15, azim=azimuth)
        axes.set_axis_off()
        axes.patch.set_visible(False)
        figure.text(0.25 + 0.5 * n, 1 - 0.05 / tall, title, ha="center", va="top", fontsize=10)
    return figure


# ------------------------------------------------------------------------------------------------------------- movies


def movie(scan: np.ndarray, masks: Sequence[np.ndarray], spacing: Sequence[float], size: int = 320) -> list[np.ndarray]:
    """A frame for each slice, with the masks over it; `size` is the longer side of the slice, in pixels."""
    masks, zoom, frames = check(scan, masks), size / max(np.multiply(scan.shape, spacing)[1:]), []
    for n, picture in enumerate(grey(scan)):
        picture = centred(frame(picture, [mask[n] for mask in masks], spacing[1:], zoom), 200)  # what a caption needs
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
    zoom = min(1, 320 / max(scan.shape[1:]))  # here in voxels, not in mm
    slices = [resized(picture, [m[n] for m in masks], (1, 1), zoom) for n, picture in enumerate(grey(scan))]
    # Two bytes a voxel: its grey in steps of 4, which the eye cannot tell apart and gzip can, and a bit for each mask.
    greys = np.stack([picture for picture, _ in slices]) & 252  # (D, H, W)
    labels = np.zeros_like(greys)
    for n in range(len(masks)):
        labels |= np.stack([cuts[n] for _, cuts in slices]).astype(np.uint8) << n
    two = len(masks) == 2
    colours = dict(zip(("prediction", "truth"), MASKS[::2], strict=True)) if two else legend(len(masks))
    content = {
        "shape": greys.shape,
        "spacing": (np.multiply(spacing, scan.shape) / greys.shape).tolist(),
        "planes": PLANES,
        "start": ("sagittal", "coronal", "axial")[plane],
        "masks": colours,
        "errors": {name: ERRORS[name] for name in ("missed", "false")} if two else {},
        "fill": FILL,
        "voxels": base64.b64encode(gzip.compress(greys.tobytes() + labels.tobytes(), 9)).decode(),
    }
    try:
        page = Path(__file__).with_name("player.html").read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename}: no such file; the .html movie needs it beside visualize.py") from None
    return page.replace("/* visualize.py writes the scan here */ null", json.dumps(content))


# ------------------------------------------------------------------------------------------------ what the network sees


def features(net, image: np.ndarray) -> dict[str, np.ndarray]:
    """What a 2D U-Net of unet.py makes of a slice: by name, feature maps (C, H, W), finest level 1, and `probability`.

    Args:
        net: the network; of attention gates, `gate 1` and so on are the weights (1, H, W) of the skips.
        image: float32 (H, W), preprocessed as for training.
    """
    import torch  # Here, so that the other pictures work without it.

    if net.dims != 2:
        raise ValueError(f"the network has {net.dims} dimensions; layers draws those of a 2D one")
    seen, depth = {}, len(net.down)
    parts = {"bottom": net.bottom}
    for level in range(1, depth + 1):  # The lists of the way up begin at the coarsest level.
        parts |= {f"down {level}": net.down[level - 1], f"up {level}": net.up[depth - level]}
        if net.gates:
            parts[f"gate {level}"] = net.gates[depth - level].weight

    def keep(name):
        return lambda module, inputs, output: seen.update({name: output[0].float().cpu().numpy()})

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    try:
        x = torch.from_numpy(image)[None, None].to(next(net.parameters()).device)  # (1, 1, H, W)
        seen["probability"] = net.predict(x)[0].cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    for name in seen:
        if name.startswith("gate"):
            seen[name] = 1 / (1 + np.exp(-seen[name]))  # the sigmoid, which the gate takes after its last layer
    return seen


def layers(net, image: np.ndarray) -> Figure:
    """The `features` of a network laid out as the U: eight channels a level, attention gates on the skips."""
    seen, depth = features(net, image), len(net.down)
    tile = 62, round(62 * image.shape[0] / image.shape[1])  # pixels (width, height) of a map
    wide, high = 4 * tile[0] + 6, 2 * tile[1] + 2  # of a level: two rows of four
    rows = [2 * tile[1] + 60 + level * (high + 42) for level in range(depth + 1)]  # upper edges
    figure = sheet(np.full((rows[-1] + high + 10, WIDTH, 3), 255, np.uint8))
    axes, middle = figure.axes[0], WIDTH / 2

    def show(picture, left, upper, title, colours="viridis", **limits):
        height, width = picture.shape
        axes.imshow(picture, colours, extent=(left, left + width, upper + height, upper), **limits)
        axes.text(left + width / 2, upper - 4, title, fontsize=8, ha="center", va="bottom")

    def scaled(channel, factor=1):
        return np.array(Image.fromarray(channel).resize(np.multiply(tile, factor), Image.Resampling.BOX))

    def maps(name, left, upper):
        cells = np.full((high, wide), np.nan, np.float32)
        for n, channel in enumerate(sorted(seen[name], key=np.std)[:-9:-1]):  # those that vary most over the slice
            y, x = n // 4 * (tile[1] + 2), n % 4 * (tile[0] + 2)
            cells[y : y + tile[1], x : x + tile[0]] = scaled((channel - channel.min()) / max(np.ptp(channel), 1e-9))
        count, height, width = seen[name].shape
        show(cells, left, upper, f"{name}: {count} channels, {height} x {width}")

    def arrow(start, end, title=""):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": RUNS[0], "linewidth": 1.5})
        axes.text((start[0] + end[0]) / 2, start[1] - 4, title, fontsize=8, color=RUNS[0], ha="center", va="bottom")

    show(scaled(image, 2), 10 + wide / 2 - tile[0], 20, "the slice", "gray")
    output = scaled(seen["probability"][0], 2)
    show(output, WIDTH - 10 - wide / 2 - tile[0], 20, "probability", "cividis", vmin=0, vmax=1)
    note = "the eight channels of each level that vary most,\neach in its own range"
    note += "; gates from 0 (blue) to 1 (yellow)" if net.gates else ""
    axes.text(middle, 20 + tile[1], note, fontsize=8, ha="center")
    narrower = (middle - tile[0] / 2 - 50 - wide) / max(depth - 1, 1)  # a level and a side; a gate fits between
    lefts = [10 + level * narrower for level in range(depth)] + [middle - wide / 2]
    maps("bottom", lefts[-1], rows[-1])
    arrow((10 + wide / 2, 22 + 2 * tile[1]), (10 + wide / 2, rows[0] - 20))
    arrow((WIDTH - 10 - wide / 2, rows[0] - 20), (WIDTH - 10 - wide / 2, 22 + 2 * tile[1]))
    for level in range(depth):
        left, right, half = lefts[level], WIDTH - lefts[level] - wide, rows[level] + high / 2
        maps(f"down {level + 1}", left, rows[level])
        maps(f"up {level + 1}", right, rows[level])
        upper = min(lefts[level + 1] + 10, left + wide - 10), rows[level] + high + 2
        lower = lefts[level + 1] + 10, rows[level + 1] - 4
        arrow(upper, lower)
        arrow((WIDTH - lower[0], lower[1]), (WIDTH - upper[0], upper[1]))
        if net.gates:
            weights = scaled(seen[f"gate {level + 1}"][0])
            show(weights, middle - tile[0] / 2, half - tile[1] / 2, "gate", vmin=0, vmax=1)
            arrow((left + wide + 4, half), (middle - tile[0] / 2 - 4, half), "skip")
            arrow((middle + tile[0] / 2 + 4, half), (right - 4, half))
        else:
            arrow((left + wide + 4, half), (right - 4, half), "skip")
    axes.set(xlim=(0, WIDTH), ylim=(rows[-1] + high + 10, 0), aspect="auto")
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
    "slices per second": ("slices_per_second",),
    "share of time waiting for data": ("waiting",),
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
    shown = {title: [name for name in columns if name in have] for title, columns in CURVES.items()}
    shown = {title: columns for title, columns in shown.items() if columns}
    down = max(1, math.ceil(len(shown) / 3))
    figure = Figure((WIDTH / 100, 2.5 * down + 0.3), dpi=100, layout="constrained")
    for n, (title, columns) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(down, 3, n)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        for run, colour in zip(runs, cycle(RUNS), strict=False):
            needed = have.intersection(("epoch", "dice_std", *columns))
            data = {name: np.array([row.get(name, math.nan) for row in run], float) for name in needed}
            for name, style in zip(columns, ("-", "--"), strict=False):
                axes.plot(data["epoch"], data[name], style, marker=".", color=colour, label=name)
            if "dice_mean" in columns and "dice_std" in needed:
                band = data["dice_mean"] - data["dice_std"], data["dice_mean"] + data["dice_std"]
                axes.fill_between(data["epoch"], *band, color=colour, alpha=0.15, linewidth=0)
        axes.set_ylim(0, axes.get_ylim()[1] if axes.dataLim.y1 > 0 else 1)
        if len(columns) > 1:
            axes.legend(handles=axes.lines[: len(columns)], fontsize=8)
    for axes in figure.axes[-3:]:
        axes.set_xlabel("epoch", fontsize=8)
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


def write(path: str | Path, content: bytes) -> None:
    """Make the folder, write under a temporary name, rename: the file is there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        told = f"{error.strerror}; {len(content):,} bytes to write, {free:,} free"
        raise OSError(error.errno, told, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    write(path, encoded(Image.fromarray(rgb(figure)), "PNG", optimize=True))


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
    duration = round(1000 * seconds_per_frame)
    write(path, encoded(first, "GIF", save_all=True, append_images=rest, duration=duration, loop=0))


# -------------------------------------------------------------------------------------------------------- command line


def read(path: str | Path, axis: int = 2) -> tuple[np.ndarray, list[float], np.ndarray]:
    """An upright volume (D, H, W), its spacing, and the affine of its NIfTI file. Raises ValueError for other files."""
    import nibabel as nib  # Here, so that the functions above work without it.
    from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

    try:
        nifti = nib.load(path)
        array = np.asanyarray(nifti.dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{path}: {error}; expected a NIfTI file: check the path, or export it again") from None
    if array.ndim < 3 or array.shape[3:].count(1) < array.ndim - 3 or not array.size or array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: is {array.dtype} {array.shape}; expected one volume of numbers on three axes")
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
            raise ValueError(f"{path}: (D, H, W) is {mask.shape}; expected {volume.shape}, as {scan}; give its mask")
        if not np.allclose(other, affine, rtol=0, atol=1e-3):
            off = np.abs(other - affine).max()
            raise ValueError(f"{path}: the affine is {off:.3g} mm off that of {scan}; resample it")
    return volume, [mask != 0 for mask, *_ in found], spacing


COMMANDS = {
    "overlay": "eight slices of a scan with masks over them, as PNG",
    "montage": "all slices of a scan with masks over them, as PNG",
    "planes": "an axial, a coronal and a sagittal slice, as PNG",
    "surface": "the surface of a mask; with the truth, its errors in mm, as PNG",
    "movie": "all slices of a scan with masks over them, as GIF, or as HTML: a player of the three planes",
    "layers": "what each level of a trained network sees, as PNG",
    "curves": "training curves of runs, as PNG",
    "augment": "one slice, augmented in 24 ways, as PNG",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        add = commands.add_parser(name, help=text, description=text).add_argument
        if name == "curves":
            add("runs", nargs="+", metavar="RUN", help="folder of a run, with its log.csv")
        elif name == "layers":
            add("checkpoint", metavar="CHECKPOINT", help="last.pt or best.pt of a run")
            add("scan", metavar="SCAN", help="NIfTI file")
        else:
            add("scan", metavar="SCAN", help="NIfTI file")
            masks = "on the scan's grid; of two, a prediction and the truth, the errors are shown"
            add("masks", metavar="MASK", nargs={"augment": 1, "surface": "+"}.get(name, "*"), help=masks)
        if name in ("overlay", "montage", "movie", "augment"):
            planes = "slice axis: 0 sagittal, 1 coronal, 2 axial (default: %(default)s)"
            add("--axis", type=int, choices=(0, 1, 2), default=2, help=planes)
        if name == "augment":
            kinds = "the augmentation, as in train.py (default: %(default)s)"
            add("--kind", choices=("seed", "full"), default="seed", help=kinds)
        add("--out", required=True, help="file to write")
    return parser.parse_args(argv)


def draw(args: argparse.Namespace) -> None:
    endings = (".gif", ".html") if args.command == "movie" else (".png",)
    ending = Path(args.out).suffix.lower()
    if ending not in endings:
        raise ValueError(f"--out {args.out}: {args.command} writes {' or '.join(endings)}; name the file so")
    if args.command == "curves":
        runs = [read_log(Path(run, "log.csv")) for run in args.runs]
        return save(curves(*runs, names=args.runs if len(runs) > 1 else ()), args.out)
    try:
        if args.command == "layers":
            return save(layers(*fullest_slice(args.checkpoint, args.scan)), args.out)
        if args.command == "augment":
            from data import augmenter  # the very augmentations of the training
    except ImportError as error:
        raise ValueError(f"{args.command} needs data.py, predict.py and what they import beside it: {error}") from None
    scan, masks, spacing = read_all(args.scan, args.masks, 2 if ending == ".html" else getattr(args, "axis", 2))
    if ending == ".html":
        write(args.out, player(scan, masks, spacing, args.axis).encode())
    elif args.command == "movie":
        save_gif(movie(scan, masks, spacing), args.out)
    elif args.command == "surface":
        save(surface(masks, spacing), args.out)
    elif args.command == "augment":
        largest = masks[0].sum(axis=(1, 2)).argmax()
        scan = scan.clip(*np.percentile(scan, (0.5, 99.5)))
        image = np.float32((scan[largest] - scan.mean()) / scan.std())  # mean 0 and deviation 1, as in the training
        save(augmented(image, np.uint8(masks[0][largest]), augmenter(args.kind), spacing[1:]), args.out)
    else:
        picture = {"overlay": overlay, "montage": montage, "planes": planes}[args.command]
        save(picture(scan, masks, spacing), args.out)


def fullest_slice(checkpoint: str, path: str) -> tuple:
    """The network of a checkpoint, and the slice of a scan in which it sees most, preprocessed: (H, W)."""
    from data import fit, preprocess, read_scan  # These siblings only here: one must see what predict.py sees.
    from predict import load_checkpoint, load_network, predict_volume

    saved = load_checkpoint(checkpoint)
    net, recipe = load_network(saved), saved["preprocess"]
    scan = read_scan(path, recipe["axis"])
    volume = preprocess(scan.array, scan.spacing, recipe)
    most = predict_volume(net, volume, size=recipe["size"]).sum(axis=(1, 2)).argmax()
    return net, fit(np.float32(volume[most]), np.maximum(volume.shape[1:], recipe["size"]))


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
