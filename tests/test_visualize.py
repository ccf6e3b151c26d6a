"""visualize.py: colours, sizes and proportions of the pictures, the files, the command line, and no trace of pyplot."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import HOW, TINY, checkpoint
from PIL import Image

import data
import metrics
import predict
import visualize
from unet import UNet

ROOT = Path(__file__).parents[1]
SKY, YELLOW, VERMILION = visualize.ERRORS.values()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def ball(shape=(12, 48, 64), centre=None, radius=5):
    centre = [n / 2 for n in shape] if centre is None else centre
    return sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), centre, strict=True)) <= radius**2


def noise(*shape):
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


def where(picture, colour):
    return (picture == np.array(colour)).all(axis=-1)


def slice_of(scan, masks=(), n=0, axis=2, title=""):
    """What a picture must show of a slice where it has a pixel for each voxel. The first tests see to these pieces."""
    plain = visualize.overlay_masks(visualize.grey(scan)[n], [mask[n] for mask in masks])
    return visualize.mark(plain, visualize.LETTERS[axis], title)


@pytest.fixture
def files(tmp_path, write_nifti):
    """A scan, a prediction and the truth, stored LPS with axial slices last: 40 x 30 x 9 voxels of 2 x 2 x 4 mm."""
    truth = np.uint8(ball((40, 30, 9), radius=4))
    arrays = {"scan": noise(40, 30, 9), "prediction": np.roll(truth, 2, 0), "truth": truth}
    affine = np.diag((-2.0, -2.0, 4.0, 1.0))
    return [str(write_nifti(tmp_path / f"{name}.nii.gz", array, affine)) for name, array in arrays.items()]


def test_errors_have_the_colours_of_the_legend_and_a_mask_an_opaque_rim():
    prediction, truth = np.array([[True, False], [True, False]]), np.array([[True, True], [False, False]])
    rgb = visualize.overlay_masks(np.zeros((2, 2), np.uint8), [prediction, truth])
    np.testing.assert_array_equal(rgb, [[SKY, YELLOW], [VERMILION, (0, 0, 0)]])
    rgb = visualize.overlay_masks(np.full((5, 5), 100, np.uint8), [np.pad(np.ones((3, 3), bool), 1)])
    tint = np.rint(100 + visualize.FILL * (np.array(SKY) - 100))
    np.testing.assert_array_equal(rgb[2], [(100,) * 3, SKY, tint, SKY, (100,) * 3])


def test_letters_are_those_of_the_axes_on_which_a_scan_is_read():
    """data.py reads a scan of any orientation so that rows run down and columns to the right: test_data.py."""
    opposite = dict(zip("RLAPSI", "LRPAIS", strict=True))
    for letters, (_, down, right) in zip(visualize.LETTERS, data.PLANES, strict=True):
        assert letters == opposite[down] + down + opposite[right] + right


def test_a_letter_stands_at_its_side_white_on_a_dark_rim():
    """Top, bottom, left and right, in this order: a letter that is left out is missing there, and nowhere else."""
    white = np.full((100, 200, 3), 255, np.uint8)
    letters = visualize.mark(white, "APRL")
    assert letters.min() == 0  # The rim is seen on white tissue.
    for without, place in ((" PRL", (0, 0.5)), ("A RL", (1, 0.5)), ("AP L", (0.5, 0)), ("APR ", (0.5, 1))):
        y, x = np.nonzero((letters != visualize.mark(white, without)).any(axis=-1))
        np.testing.assert_allclose((y.mean() / 100, x.mean() / 200), place, atol=0.15)


def test_compare_shows_scan_truth_probability_prediction_error_from_left_to_right():
    scan, levels = noise(1, 60, 176), np.zeros((1, 60, 176), np.float32)
    levels[0, 10:30, 10:50], levels[0, 40:, :20] = 0.51, 0.5  # 0.5 is background
    truth, mask = np.roll(levels > 0.5, 5, axis=1), levels > 0.5
    picture = visualize.rgb(visualize.compare(scan, np.float32(truth), levels, ["scan 1"], axis=1))
    columns = visualize.text_row(900, ["scan", "truth", "probability", "prediction", "error"])
    told = [columns, visualize.text_row(900, ["scan 1"]), *visualize.colour_row(900, 2)]
    np.testing.assert_array_equal([picture[:22], picture[22:44], picture[-22:]], told)
    cells = [cell[2:-2, 2:-2] for cell in np.split(picture[44:-22], 5, axis=1)]
    probability = cells.pop(2)
    assert probability[20, 30].sum() > probability[50, 10].sum() > probability[50, 150].sum()  # 0.51, 0.5, 0
    for cell, masks in zip(cells, ([], [truth], [mask], [mask, truth]), strict=True):
        np.testing.assert_array_equal(cell, slice_of(scan, masks, axis=1))


def test_compare_draws_a_diverged_run_and_bad_arrays_are_refused():
    image, other = noise(1, 8, 8), np.zeros((1, 8, 9))
    empty, diverged = (visualize.rgb(visualize.compare(image, image, image * value)) for value in (0, np.nan))
    np.testing.assert_array_equal(empty, diverged)
    for draw, arguments, message in (
        (visualize.compare, (image, image, image), "sigmoid"),
        (visualize.compare, (image, image, other), r"\(1, 8, 9\)"),
        *((draw, (image, [other], (1, 1, 1)), r"\(1, 8, 9\)")
          for draw in (visualize.movie, visualize.overlay, visualize.planes, visualize.player)),
    ):
        with pytest.raises(ValueError, match=message):
            draw(*arguments)


def test_overlay_picks_slices_with_foreground_or_shows_all_numbered():
    scan, mask = noise(12, 40, 108), np.zeros((12, 40, 108), bool)
    scan[0, 0, :3] = np.nan, np.inf, -np.inf
    mask[[4, 5, 6, 10], 20:30, 20:30] = True
    picture = visualize.rgb(visualize.overlay(scan, [mask], (1, 1, 1), axis=0))
    for n, cell in zip((5, 6, 7, 11), np.split(picture[22:-44], 4, axis=1), strict=True):
        np.testing.assert_array_equal(cell[-24:-2, 2:-2], visualize.text_row(221, [f"{n} / 12"]))
    picture = visualize.rgb(visualize.overlay(scan, [mask], (1, 1, 1), count=0, axis=0))
    cells = [cell for row in np.split(picture[22:-44], 2) for cell in np.split(row, 8, axis=1)]
    for n, cell in enumerate(cells[:12]):
        np.testing.assert_array_equal(cell[2:-24, 2:-2], slice_of(scan, [mask], n, axis=0))
        np.testing.assert_array_equal(cell[-24:-2, 2:-2], visualize.text_row(108, [f"{n + 1} / 12"]))
    assert not np.any(cells[12:]) and 80 < visualize.grey(scan)[0].mean() < 180
    visualize.overlay(scan, [0 * mask], (1, 1, 1), count=2)  # an empty mask
    for truth, dice in ((mask, "1.000"), (0 * mask, "0.000")):
        title = visualize.rgb(visualize.overlay(scan, [mask, truth], (1, 1, 1)))[:22]
        np.testing.assert_array_equal(title, visualize.text_row(900, [f"scan, Dice {dice}"]))


def test_planes_cut_through_the_organ_in_one_scale_with_the_head_up():
    """One voxel above the organ and one behind it are where a physician looks for them, at their distance in mm."""
    shape, centre, zoom = (20, 40, 30), (8, 22, 12), 444 / 40  # the sagittal slice is 40 mm and 444 pixels wide
    organ, above, behind = ball(shape, centre, 4), np.zeros(shape, bool), np.zeros(shape, bool)
    above[16, 22, 12] = behind[8, 36, 12] = True
    picture = visualize.rgb(visualize.planes(np.zeros(shape, np.float32), [organ, above, behind], (2, 1, 1)))
    axial, right = np.split(picture[22:-44], 2, axis=1)
    coronal, sagittal = np.split(right, 2)
    for cut, mask, expected in ((axial, 2, (14, 0)), (coronal, 1, (-16, 0)), (sagittal, 1, (-16, 0)),
                                (sagittal, 2, (0, 14))):
        places = [np.argwhere(where(cut, colour)).mean(axis=0) for colour in (visualize.MASKS[mask], SKY)]
        np.testing.assert_allclose((places[0] - places[1]) / zoom, expected, atol=0.5)  # mm
    bare = visualize.rgb(visualize.planes(np.zeros(shape, np.float32), [organ], (2, 1, 1)))[22:-44, :452]
    dashes = [where(bare, (255, 255, 255)).sum(axis).argmax() for axis in (1, 0)]
    assert dashes == [(900 - 444) // 2 + int(22.5 * zoom), (452 - 333) // 2 + int(12.5 * zoom)]  # through the organ
    axial = bare[(900 - 444) // 2 :, (452 - 333) // 2 :][:444, :333]
    letters = visualize.mark(np.zeros_like(axial), visualize.LETTERS[2])
    assert (axial[where(letters, (255, 255, 255))] == 255).all()


def test_augmented_draws_the_slice_and_24_augmentations_in_one_window():
    """Only the original is named, and has letters at its sides: the others are turned."""
    image, mask = noise(40, 176), ball((40, 176), radius=8)
    views = np.stack([image] * 24 + [image + 20])
    picture = visualize.rgb(visualize.augmented(image, np.uint8(mask), lambda image, mask, n: (views[n], mask), axis=1))
    first, *others = [tile for row in np.split(picture[22:], 5) for tile in np.split(row[2:-2], 5, axis=1)]
    np.testing.assert_array_equal(first[:, 2:-2], slice_of(views, [[mask]], axis=1, title="original"))
    plain = [visualize.overlay_masks(grey, [mask]) for grey in visualize.grey(views)]
    np.testing.assert_array_equal(np.array(others)[:, :, 2:-2], plain[1:])


def test_movie_shows_every_slice_and_the_gif_keeps_its_colours(tmp_path):
    scan, truth, path = noise(12, 48, 240), ball((12, 48, 240)), tmp_path / "new" / "movie.gif"
    masks = [np.roll(truth, 3, 2), truth]
    frames = visualize.movie(scan, masks, (1, 1, 1), size=240, axis=0)
    for n, frame in enumerate(frames):
        np.testing.assert_array_equal(frame[:48], slice_of(scan, masks, n, axis=0))
        caption = visualize.text_row(240, [f"slice {n + 1} / 12", "50 mm"])[:19]  # above the bar
        np.testing.assert_array_equal(frame[48:-25], caption)
    visualize.save_gif(frames, path, seconds_per_frame=0.2)
    with Image.open(path) as gif:
        assert gif.n_frames == 12 and gif.size == (240, 48 + 44) and gif.info["loop"] == 0
        for n, frame in enumerate(frames):
            gif.seek(n)
            read = np.array(gif.convert("RGB"))
            assert gif.info["duration"] == 200 and np.abs(read.astype(int) - frame).mean() < 6  # few greys
            for colour in (SKY, YELLOW, VERMILION):
                np.testing.assert_array_equal(where(read[:48], colour), where(frame[:48], colour))


@pytest.mark.parametrize("spacing, size", [((1, 1, 1), (150, 300)), ((9, 2, 1), (300, 300)), ((1, 1, 2), (75, 300))])
def test_proportions_and_scale_bar_follow_the_spacing(spacing, size):
    frame = visualize.movie(noise(2, 50, 100), [], spacing, size=300)[0]
    assert frame.shape == (size[0] + 22, size[1], 3)
    millimetres = 10 if spacing[2] == 1 else 50  # below a third of the width
    assert where(frame[-2], (255, 255, 255)).sum() == millimetres * 300 / (100 * spacing[2])


def test_player_holds_the_volume_and_a_bit_for_each_mask():
    shape = 2, 300, 642
    scan, prediction, truth = noise(*shape), ball(shape, (1, 150, 303)), ball(shape, (1, 150, 300))
    page = visualize.player(scan, [prediction, truth], (3, 2, 1), "x</script><img onerror=1>")
    told = json.loads(re.search(r"const scan = (.*);", page)[1])
    voxels = np.frombuffer(zlib.decompress(base64.b64decode(told["voxels"])), np.uint8)
    greys, labels = voxels.reshape(2, *told["shape"])
    assert told["step"] == [1, 3, 3] and list(told["masks"]) == ["prediction", "truth"]  # a third of the voxels
    assert told["counts"][2] == [mask.sum((0, 1)).tolist() for mask in (prediction, truth, prediction & truth)]  # all
    dice = metrics.dice(prediction, truth)
    assert told["title"] == f"x</script><img onerror=1>, Dice {dice:.3f}" and "<img" not in page  # a name is text
    assert np.abs(greys.astype(int) - visualize.grey(scan)[:, ::3, ::3]).max() < 4
    np.testing.assert_array_equal(labels, (prediction + 2 * truth)[:, ::3, ::3])
    assert "default-src 'none'" in page and not re.search(r"https?://|\bsrc=|fetch\(", page)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("window, fills", [("1920,1080", 0.7), ("390,844", 0.3)])
def test_player_in_a_browser(window, fills, files, tmp_path):
    """Wheel, keys, drag, double click, click and strip do what the page says; no error is told, nothing is fetched."""
    scan, movie = tmp_path / "<img onerror=told.push(1) src=x>.nii.gz", tmp_path / "movie.html"
    os.rename(files[0], scan)
    assert visualize.main(["movie", str(scan), *files[1:], "--out", str(movie)]) == 0
    listen = "<script>window.told = []; onerror = onunhandledrejection = event => told.push(String(event))</script>"
    check = (ROOT / "tests" / "player_check.js").read_text()
    page = movie.read_text().replace("<title>", f"{listen}<title>")
    movie.write_text(page.replace("</html>", f"<script>{check}</script></html>"))
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", f"--window-size={window}",
               f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", movie.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)[1]))
    assert "CONSOLE" not in done.stderr, done.stderr
    for (width, height), proportion in zip(seen.pop("sizes"), (80 / 60, 80 / 36, 60 / 36), strict=True):  # mm
        assert abs(width / height / proportion - 1) < 0.05
    sky, yellow, vermilion, purple = seen.pop("colours")
    assert min(sky, yellow, vermilion, seen.pop("truth")) > 0 and purple == 0  # the truth: only when asked for
    title = f"{scan.name}, Dice {metrics.dice(*(nib.load(path).get_fdata() > 0 for path in files[1:])):.3f}"
    assert seen.pop("title") == [title, title, True] and seen.pop("fills") > fills
    assert seen.pop("went")[0] == "axial 5 / 9" != seen["left"] and not seen.pop("scrolls")
    assert seen == {
        "start": ["axial 5 / 9", "coronal 16 / 30", "sagittal 21 / 40"], "wheel": ["axial 6 / 9", False], "back": True,
        "darker": [True, True, False, True], "contrast": True, "reset": True, "prediction": 0, "errors": [0, 0],
        "on_again": True, "scan": False, "cross": False, "opacity": False, "right": "axial 6 / 9",
        "left": "axial 4 / 9", "strip": "axial 1 / 9", "jump": "axial 7 / 9", "poor": True,
        "coronal": ["coronal 17 / 30", "coronal"], "play": [True, True], "fetched": [], "errors_told": [],
    }


@pytest.mark.parametrize("network, shape, expected", [
    ({"depth": 2, "attention": True}, (22, 31), {
        "slice": (0, 0), "probability, 0 (purple) to 1 (yellow)": (0, 2), "down 1: 4 of 4 channels, 24 x 32": (1, 0),
        "skip, times gate 1, 0 (purple) to 1 (yellow)": (1, 1), "down 2: 8 of 8 channels, 12 x 16": (2, 0),
        "up 2: 8 of 8 channels, 12 x 16": (2, 2), "bottom: 8 of 16 channels, 6 x 8": (3, 1)}),
    ({"depth": 0}, (22, 31), {"slice": (0, 0), "bottom: 4 of 4 channels, 22 x 31": (1, 1)}),
    ({"depth": 1, "stem": 2}, (22, 31), {"down 1: 4 of 4 channels, 12 x 16": (1, 0)}),
    ({"depth": 1, "dims": 3, "attention": True}, (6, 8, 12), {"up 1: 4 of 4 channels, 8 x 12": (1, 2)}),
])
def test_layers_are_laid_out_as_the_u(network, shape, expected):
    """Of the float16 that `data.preprocess` gives, and for every kind of network."""
    net = UNet(width=4, **network).train()
    picture = visualize.rgb(visualize.layers(net, (noise(*shape) / 20).astype(np.float16)))
    high, wide = len(picture) // (2 + network["depth"]), 276
    for title, (row, column) in expected.items():
        part = picture[row * high : (row + 1) * high, column * wide + 2 : (column + 1) * wide - 2]
        assert any((part[y : y + 22] == visualize.text_row(272, [title])).all() for y in range(high // 2)), title
        assert part[high // 2 :].any()
    assert net.training and not any(module._forward_hooks for module in net.modules())


def test_features_are_what_the_levels_put_out():
    net, image = UNet(width=4, depth=2, norm="none", attention=True), noise(16, 24) / 20
    seen = visualize.features(net, image)
    with torch.no_grad():
        first, last = net.down[0](torch.from_numpy(image)[None, None]), net.head(torch.from_numpy(seen["up 1"])[None])
    np.testing.assert_allclose(seen["down 1"], first[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(seen["probability"], last[0].sigmoid().numpy(), atol=1e-5)
    assert seen["gate 1"].shape == (1, 16, 24) and 0 < seen["gate 1"].min() <= seen["gate 1"].max() < 1
    scan = noise(1, 96, 128)
    picture = visualize.rgb(visualize.layers(UNet(width=2, depth=0), scan[0], axis=0))
    np.testing.assert_array_equal(picture[24:120, 74:202], slice_of(scan, axis=0))
    net, patch = UNet(width=2, depth=1, dims=3).eval(), noise(6, 8, 12)
    middle = net.predict(torch.from_numpy(patch)[None, None])[0, :, 3].numpy()
    np.testing.assert_allclose(visualize.features(net, patch)["probability"], middle, atol=1e-6)


@pytest.mark.parametrize("size, dims, shape", [([32, 20], 2, (1, 32, 20)), ([5, 16, 16], 3, (5, 16, 16))])
def test_layers_command_shows_where_the_network_sees_most(size, dims, shape, files, tmp_path, monkeypatch):
    how, last, out = HOW | {"spacing": [None] * 3, "size": size}, str(tmp_path / "last.pt"), tmp_path / "layers.png"
    torch.save(checkpoint(TINY | {"dims": dims}, how), last)
    assert visualize.main(["layers", last, files[0], "--out", str(out)]) == 0 and out.exists()
    seen = np.zeros((9, 30, 40))
    seen[6, 20, 15] = 1
    monkeypatch.setattr(predict, "predict_volume", lambda net, volume, **_: seen)
    _, image, axis = visualize.fullest_slice(last, files[0])
    scan = data.read_scan(files[0], 2)
    peak = data.preprocess(scan.array, scan.spacing, how)[6, 20, 15]
    assert axis == 2 and image.shape == shape and (image[shape[0] // 2] == peak).any()


def test_curves_count_epochs_from_1_and_keep_gaps(tmp_path):
    (tmp_path / "log.csv").write_text("epoch,train/loss,val/dice\n1,0.5,\n2,nan,0.7\n3,0.3,0.8\n")
    broken = [{"train/loss": np.nan, "train/lr": np.inf, "val/dice": None}]
    figure = visualize.curves(visualize.read_log(tmp_path), broken, names=["first", "second"])
    loss, dice, *_ = figure.axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 0.5], [2, np.nan], [3, 0.3]])
    assert [axes.get_title() for axes in figure.axes] == list(visualize.CURVES) and 0 < loss.get_xlim()[0] < 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run first", "run second"]
    first, best, second = dice.lines
    assert best.get_xydata().tolist() == [[3, 0.8]] and [text.get_text().strip() for text in dice.texts] == ["0.800"]
    assert first.get_color() != second.get_color() and first.get_linewidth() > second.get_linewidth()  # both are seen
    shown = [{"val/dice": dice, "val/dice_worst": np.nan} for dice in (0.1, 0.5, 0.8, 0.89, 0.9, 0.91, 0.9, 0.905)]
    figure = visualize.curves(shown, names=["a $ and a \\frac$"])  # no formula
    low, high = figure.axes[1].get_ylim()
    assert visualize.rgb(figure).shape == (530, 900, 3)
    assert 0.87 < low < 0.9 and 0.91 < high < 0.93  # 0.90 is told from 0.91, whatever the first epochs were
    low, high = visualize.curves(shown, shown[:2]).axes[1].get_ylim()
    assert low < 0.5 and high > 0.91  # the best of a poor run is in the picture, too


def test_runs_that_were_validated_on_other_scans_are_told_apart(tmp_path, capsys):
    for fold, told in ((0, False), (1, True)):
        for name, k in (("a", 0), ("b", fold)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "log.csv").write_text("epoch,val/dice\n1,0.5\n")
            (tmp_path / name / "split.json").write_text(str(k))
        runs = [str(tmp_path / name) for name in "ab"]
        assert visualize.main(["curves", *runs, "--out", str(tmp_path / "x.png")]) == 0
        assert ("note: these runs were not validated on the same scans" in capsys.readouterr().err) == told


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path, figure = tmp_path / "deep" / "down" / "x.png", visualize.compare(*np.zeros((3, 1, 8, 8)))
    visualize.save(figure, path)
    before = path.read_bytes()

    def full(self, content):
        self.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device.*x.png"):
        visualize.save(figure, path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["x.png"]


def test_a_command_prints_where_its_picture_is_and_chooses_an_organ_of_several(files, tmp_path, write_nifti, capsys):
    """The commands that write other pictures are the README's: test_docs.py runs them."""
    organs, pictures = np.asarray(nib.load(files[2]).dataobj).copy(), []
    organs[:6] = 2
    several = str(write_nifti(tmp_path / "several.nii.gz", organs, nib.load(files[2]).affine))
    for truth, *label in ((files[2],), (several, "--label", "1"), (several,)):
        out = tmp_path / "made" / f"{len(pictures)}.gif"
        assert visualize.main(["movie", *files[:2], truth, *label, "--axis", "0", "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2] and pictures[0].startswith(b"GIF")


def test_bad_input_is_one_line_that_names_it_and_exit_code_2(files, tmp_path, write_nifti, capsys):
    """What data.py says of files that are no scan or of another grid is tested there."""
    even = str(write_nifti(tmp_path / "even.nii", np.ones((4, 4, 4))))
    (tmp_path / "old.png").write_text("old")
    (tmp_path / "log.csv").write_text("epoch;train/loss\n1;0,5\n")  # by a spreadsheet
    for command, out, words in (
        (["movie", *files], "x.png", "x.png: movie writes .gif or .html"),
        (["movie", *files[:1] * 10], "x.html", "found 9 masks; a player shows 0 to 8"),
        (["augment", files[0]], "x.png", "augment takes two files, found 1"),
        (["augment", even, even], "x.png", "even.nii: all voxels are equal"),
        (["overlay", files[0], "--count", "-3"], "x.png", "--count -3: give 1 to 1000 slices"),
        (["overlay", files[0], "--count", "1000000"], "x.png", "--count 1000000: give 1 to 1000 slices"),
        (["curves", str(tmp_path / "nowhere")], "x.png", "nowhere/log.csv: No such file"),
        (["curves", str(tmp_path)], "x.png", "log.csv: no table of numbers"),
        (["planes", files[0]], "old.png/x.png", "old.png"),
    ):
        assert visualize.main([*command, "--out", str(tmp_path / out)]) == 2, command
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and words in printed.err, printed.err
        assert printed.err.startswith("visualize.py: ")
    assert len(list(tmp_path.iterdir())) == 6 and (tmp_path / "old.png").read_text() == "old"


def test_alone_in_a_folder_it_draws_without_pyplot_and_shows_itself_in_a_notebook(tmp_path):
    """No display, no figure that stays open; no sibling, torch or nibabel is imported for functions on arrays."""
    shutil.copy(ROOT / "visualize.py", tmp_path)
    code = """
import gc, sys, numpy as np, visualize
from matplotlib.figure import Figure
for figure in (visualize.planes(np.ones((6, 6, 6)), [], (1, 1, 1)), visualize.curves([{"train/lr": 1.0}])):
    assert figure._repr_png_()[:4] == b"\\x89PNG"
assert not {"matplotlib.pyplot", "torch", "nibabel", "data"} & set(sys.modules), "imported"
del figure
gc.collect()
assert not any(isinstance(thing, Figure) for thing in gc.get_objects()), "open"
"""
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
