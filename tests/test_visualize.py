"""visualize.py: sizes, colours and proportions of the pictures, the files, the command line, and no trace of pyplot."""

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
from PIL import Image

import visualize
from predict import VERSION
from unet import UNet

ROOT = Path(__file__).parents[1]
SKY, YELLOW, VERMILION, BLACK, WHITE = (86, 180, 233), (240, 228, 66), (213, 94, 0), (0, 0, 0), (255, 255, 255)


def ball(shape=(12, 48, 64), centre=None, radius=5):
    """A bool ball (D, H, W)."""
    centre = [n / 2 for n in shape] if centre is None else centre
    grid = np.indices(shape)
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= radius**2


def noise(*shape):
    return np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)


def has(picture, colour):
    return bool((picture == np.array(colour)).all(axis=-1).any())


def write_nifti(path, array, affine=None):
    nib.Nifti1Image(array, np.diag((2.0, 2.0, 4.0, 1.0)) if affine is None else affine).to_filename(path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A scan and two masks, stored LPS with axial slices last: 40 x 30 x 9 voxels of 2 x 2 x 4 mm."""
    affine = np.diag((-2.0, -2.0, 4.0, 1.0))
    truth = ball((40, 30, 9), radius=4)
    return (
        write_nifti(tmp_path / "scan.nii.gz", noise(40, 30, 9), affine),
        write_nifti(tmp_path / "prediction.nii.gz", np.roll(truth, 2, 0).astype(np.uint8), affine),
        write_nifti(tmp_path / "truth.nii.gz", truth.astype(np.uint8), affine),
    )


def write_log(folder, text="epoch,train_loss,dice_mean\n0,0.9,0.5\n1,0.5,0.7\n"):
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text(text)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- colours


def test_the_four_cases_of_a_pixel_have_the_colours_of_the_legend():
    prediction = np.array([[True, False], [True, False]])
    truth = np.array([[True, True], [False, False]])
    rgb = visualize.paint(np.zeros((2, 2), np.uint8), [prediction, truth])
    np.testing.assert_array_equal(rgb, [[SKY, YELLOW], [VERMILION, BLACK]])
    assert visualize.legend(2) == {"correct": SKY, "missed": YELLOW, "false": VERMILION}


def test_a_mask_has_an_opaque_rim_and_a_tint_inside():
    mask = np.zeros((5, 5), bool)
    mask[1:4, 1:4] = True
    rgb = visualize.paint(np.full((5, 5), 100, np.uint8), [mask])
    tint = np.rint(100 + visualize.FILL * (np.array(SKY) - 100))
    np.testing.assert_array_equal(rgb[2, 2], tint)
    rim = mask.copy()
    rim[2, 2] = False
    assert (rgb[rim] == SKY).all() and (rgb[~mask] == 100).all()


def test_three_masks_have_three_colours():
    masks = np.eye(3, dtype=bool)[:, None]  # each mask one pixel of three
    rgb = visualize.paint(np.zeros((1, 3), np.uint8), masks)
    colours = list(visualize.legend(3).values())
    assert len(set(colours)) == 3
    np.testing.assert_array_equal(rgb[0], colours)


def test_grey_spans_black_to_white_and_survives_what_is_no_number():
    assert list(visualize.grey(np.array([-5, 0, 5, 10, 20]), (0, 10))) == [0, 0, 127, 255, 255]
    scan = noise(8, 64, 64)
    scan[0, 0, :3] = np.nan, np.inf, -np.inf
    grey = visualize.grey(scan)
    assert grey.dtype == np.uint8 and grey.min() == 0 and grey.max() == 255 and 100 < grey.mean() < 155
    assert not visualize.grey(np.full((2, 2), 7.0)).any()


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("dtype, names", [(bool, "scan truth prediction error"),
                                          (np.float32, "scan truth probability prediction error")])
def test_compare_shows_scan_truth_prediction_error_from_left_to_right(dtype, names):
    image, truth = np.zeros((1, 64, 64)), np.zeros((1, 64, 64), np.uint8)
    image[0, :, 63] = 1
    truth[0, 10:30, 10:50] = 1
    prediction = np.full((1, 64, 64), 0.49, np.float32)
    prediction[0, 20:40, 10:50] = 0.51
    prediction = (prediction > 0.5) if dtype is bool else prediction
    picture = visualize.rgb(visualize.compare(image, truth, prediction, ["scan 1"]))
    assert picture.dtype == np.uint8 and picture.shape[1] == 900
    cells = dict(zip(names.split(), np.split(picture[44:-22], len(names.split()), axis=1), strict=True))
    assert len(cells["scan"]) == cells["scan"].shape[1]  # square, as the slice is
    found = {name: [has(cell, colour) for colour in (SKY, YELLOW, VERMILION)] for name, cell in cells.items()}
    one = [True, False, False]
    expected = {"scan": [False] * 3, "truth": one, "probability": [False] * 3, "prediction": one, "error": [True] * 3}
    assert found == {name: expected[name] for name in cells}
    rows = [np.flatnonzero((cells["error"] == colour).all(-1).any(1)).min() for colour in (YELLOW, SKY, VERMILION)]
    assert rows == sorted(rows)  # the truth lies higher: missed above, correct in the middle, false below
    untitled = visualize.rgb(visualize.compare(image, truth, prediction))
    assert len(picture) - len(untitled) == 22
    three = visualize.rgb(visualize.compare(*(np.repeat(array, 3, axis=0) for array in (image - 7, truth, prediction))))
    assert (np.split(three[22:-22], 3) == untitled[22:-22]).all()  # N rows, and any range of the image


def test_a_probability_is_shown_as_it_is_beside_the_mask_above_one_half():
    """0.2 and 0.4 look alike in the mask; the picture of the probability tells them apart, from dark to bright."""
    levels = np.array([[[0.2, 0.4, 0.5, 0.51, 1.0]]], np.float32)
    picture = visualize.rgb(visualize.compare(levels, levels > 0.5, levels))[22 + 10]
    scan, truth, probability, prediction, error = np.split(picture, 5)
    brightness = probability[18:180:35].sum(axis=-1)
    assert (np.diff(brightness.astype(int)) > 0).all()
    np.testing.assert_array_equal(prediction, truth)
    assert 60 < (prediction != scan).any(axis=-1).sum() < 80  # two of five pixels: 0.5 itself is background
    assert (scan != error).any()


@pytest.mark.parametrize(
    "predictions, message",
    [(np.full((1, 8, 8), 3.0), "sigmoid"), (np.full((1, 8, 8), np.nan), "nan"), (np.zeros((1, 8, 9)), "one shape")],
)
def test_compare_refuses_logits_and_other_shapes(predictions, message):
    with pytest.raises(ValueError, match=message):
        visualize.compare(np.zeros((1, 8, 8)), np.zeros((1, 8, 8)), predictions)


def test_overlay_picks_slices_that_hold_foreground(monkeypatch):
    scan, mask = noise(30, 48, 64), np.zeros((30, 48, 64), bool)
    mask[[4, 5, 6, 20], 20:30, 20:30] = True
    seen = []
    montage = visualize.montage
    monkeypatch.setattr(visualize, "montage", lambda *args: seen.append(list(args[3])) or montage(*args))
    picture = visualize.rgb(visualize.overlay(scan, [mask], (1, 1, 1)))
    visualize.overlay(scan, [], (1, 1, 1), count=4)
    visualize.overlay(scan, [np.zeros_like(mask)], (1, 1, 1), count=2)
    assert seen == [[4, 5, 6, 20], [0, 10, 19, 29], [0, 29]]
    assert all(has(column, SKY) for column in np.split(picture, 4, axis=1))


def test_montage_numbers_every_slice_in_rows_of_eight():
    mask = np.zeros((12, 48, 64), bool)
    mask[10] = True
    picture = visualize.rgb(visualize.montage(noise(12, 48, 64), [mask], (1, 1, 1)))
    assert picture.shape == (2 * (4 + 81) + 22, 8 * 112, 3)
    cells = [cell for row in np.split(picture[:-22], 2) for cell in np.split(row, 8, axis=1)]
    assert [n for n, cell in enumerate(cells) if has(cell, SKY)] == [10]
    assert [n for n, cell in enumerate(cells) if not cell.any()] == [12, 13, 14, 15]
    assert len({cell[2:18, 2:20].tobytes() for cell in cells[:12]}) == 12  # the numbers


def test_planes_cut_through_the_largest_section_in_one_scale_with_the_head_up():
    """One voxel above the organ and one behind it are where a physician looks for them, at their distance in mm."""
    shape = (20, 40, 30)
    organ, above, behind = ball(shape, (8, 22, 12), 4), np.zeros(shape, bool), np.zeros(shape, bool)
    above[16, 22, 12] = behind[8, 36, 12] = True
    picture = visualize.rgb(visualize.planes(np.zeros(shape, np.float32), [organ, above, behind], (2, 1, 1)))
    zoom = 444 / 40  # pixels per mm: sagittal is 40 mm wide
    assert abs(picture.shape[1] - 900) <= 4
    axial, right = np.split(picture[:-44], 2, axis=1)
    coronal, sagittal = np.split(right, 2)

    def offset(cut, mask):  # mm below and to the right of the organ
        places = [np.argwhere((cut == colour).all(-1)).mean(axis=0) for colour in (visualize.MASKS[mask], SKY)]
        return (places[0] - places[1]) / zoom

    np.testing.assert_allclose(offset(axial, 2), (14, 0), atol=0.5)
    np.testing.assert_allclose(offset(coronal, 1), (-16, 0), atol=0.5)
    np.testing.assert_allclose(offset(sagittal, 1), (-16, 0), atol=0.5)
    np.testing.assert_allclose(offset(sagittal, 2), (0, 14), atol=0.5)
    size = np.ptp(np.argwhere((sagittal == SKY).all(-1)), axis=0) / zoom
    np.testing.assert_allclose(size, (18, 9), atol=0.5)  # nine voxels of 2 x 1 mm


def test_surface_shows_the_error_in_mm():
    """A ball 3 mm too large is orange all over, one too small blue; without a truth: one colour, no scale."""
    large, small = (ball((24, 48, 48), radius=radius) for radius in (11, 8))
    for masks, red_over_blue in (([large, small], 1), ([small, large], -1)):
        figure = visualize.surface(masks, (1, 1, 1))
        low, high = figure.axes[-1].get_xlim()  # of the colour bar
        assert high == -low and 3 <= high <= 4
        picture = visualize.rgb(figure)[:-80].astype(int)
        difference = red_over_blue * (picture[..., 0] - picture[..., 2])
        assert (difference > 60).sum() > 50_000 and not (difference < -20).any()
    alone = visualize.surface([large], (1, 1, 1))
    assert len(alone.axes) == 2 and (visualize.rgb(alone) == 255).all(-1).any()
    with pytest.raises(ValueError, match="empty"):
        visualize.surface([np.zeros((4, 4, 4), bool)], (1, 1, 1))


def test_surface_keeps_the_proportions_in_mm():
    """A ball is as wide as it is high, however thick the slices are."""
    grid = np.indices((11, 44, 44))
    mask = ((grid[0] - 5) * 4) ** 2 + (grid[1] - 22) ** 2 + (grid[2] - 22) ** 2 <= 14**2
    picture = visualize.rgb(visualize.surface([mask], (4, 1, 1)))[30:, :450]
    rows, columns = np.nonzero((picture < 250).any(axis=-1))
    assert np.ptp(columns) == pytest.approx(np.ptp(rows), rel=0.15) and 300 < np.ptp(columns) < 420


def test_augmented_draws_the_slice_and_24_augmentations_in_one_window():
    seen = []

    def brighter(image, mask, entropy):
        seen.append(entropy)
        return image + 20 * (entropy == 24), mask

    image, mask = noise(40, 40), ball((40, 40), radius=8).astype(np.uint8)
    picture = visualize.rgb(visualize.augmented(image, mask, brighter))
    assert seen == list(range(1, 25)) and picture.shape == (22 + 900, 900, 3)
    tiles = [tile for row in np.split(picture[22:], 5) for tile in np.split(row, 5, axis=1)]
    assert all(has(tile, SKY) for tile in tiles)
    assert (tiles[0] == tiles[23]).all() and tiles[24].mean() > tiles[0].mean() + 10


# -------------------------------------------------------------------------------------------------------------- movies


def test_movie_has_a_frame_a_slice_and_shows_the_mask_where_it_is():
    scan, mask = noise(12, 48, 64), ball()
    frames = visualize.movie(scan, [mask], (1, 1, 1), size=64)
    bare = visualize.movie(scan, [], (1, 1, 1), size=64)
    assert len(frames) == len(bare) == 12
    for n, (with_mask, without) in enumerate(zip(frames, bare, strict=True)):
        assert with_mask.shape == (48 + 22, 200, 3) and with_mask.dtype == np.uint8
        changed = (with_mask != without).any(axis=-1)[:48, 68:132]
        np.testing.assert_array_equal(changed, mask[n])
        assert has(with_mask[48:], WHITE) and not has(with_mask[48:], SKY)
    assert (bare[0][48:] != bare[1][48:]).any()  # the slice number


def test_movie_of_two_masks_colours_the_errors_and_explains_them():
    truth = ball()
    frames = visualize.movie(noise(12, 48, 64), [np.roll(truth, 3, 2), truth], (1, 1, 1), size=320)
    middle = frames[6]
    assert middle.shape == (240 + 44, 320, 3)
    columns = [np.flatnonzero((middle[:240] == c).all(-1).any(0)).mean() for c in (YELLOW, SKY, VERMILION)]
    assert columns == sorted(columns)  # the prediction lies to the right of the truth
    assert not any(has(frames[0][:240], colour) for colour in (SKY, YELLOW, VERMILION))
    assert all(has(frames[0][262:], colour) for colour in (SKY, YELLOW, VERMILION))  # the legend


@pytest.mark.parametrize(
    "spacing, shape", [((1, 1, 1), (150, 300)), ((9, 2, 1), (300, 300)), ((1, 1, 1.5), (100, 300))]
)
def test_proportions_follow_the_spacing(spacing, shape):
    frame = visualize.movie(noise(2, 50, 100), [], spacing, size=300)[0]
    assert frame.shape == (shape[0] + 22, shape[1], 3)


def test_the_scale_bar_measures_its_label():
    """50 mm wide at 6 pixels a mm: a third of the width allows 10 mm, hence 60 white pixels."""
    frame = visualize.movie(noise(1, 50, 100), [], (1, 0.5, 0.5), size=300)[0]
    assert (frame[-2] == 255).all(axis=-1).sum() == 60


def test_a_mask_of_another_shape_is_refused():
    for draw in (visualize.movie, visualize.overlay):
        with pytest.raises(ValueError, match=r"\(12, 48, 63\)"):
            draw(noise(12, 48, 64), [ball((12, 48, 63))], (1, 1, 1))


def test_gif_holds_every_slice_in_true_colours(tmp_path):
    frames = visualize.movie(noise(12, 48, 64), [np.roll(ball(), 3, 2), ball()], (1, 1, 1), size=240)
    visualize.save_gif(frames, tmp_path / "new" / "movie.gif", seconds_per_frame=0.2)
    with Image.open(tmp_path / "new" / "movie.gif") as gif:
        assert gif.n_frames == 12 and gif.size == (240, 180 + 44) and gif.info["loop"] == 0
        for n, frame in enumerate(frames):
            gif.seek(n)
            assert gif.info["duration"] == 200
            read = np.array(gif.convert("RGB"))
            assert np.abs(read.astype(int) - frame).mean() < 6  # few greys
            for colour in (SKY, YELLOW, VERMILION):
                np.testing.assert_array_equal(*((rgb[:180] == colour).all(-1) for rgb in (read, frame)))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["movie.gif"]


def test_save_leaves_the_old_picture_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "down" / "x.png"
    figure = visualize.compare(noise(1, 8, 8), np.zeros((1, 8, 8)), np.zeros((1, 8, 8)))
    visualize.save(figure, path)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.array(image), visualize.rgb(figure))
    before = path.read_bytes()

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"x.png: No space left on device; [\d,]+ bytes to write, [\d,]+ bytes free"):
        visualize.save(visualize.curves([{"epoch": 0.0, "train_loss": 1.0}]), path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(path.parent) == ["x.png"]


# -------------------------------------------------------------------------------------------------------------- player


def content(page):
    """What visualize.py put into the page, and its two volumes: greys and labels (D, H, W)."""
    scan = json.loads(re.search(r"const scan = (.*);", page)[1])
    voxels = np.frombuffer(zlib.decompress(base64.b64decode(scan["voxels"])), np.uint8)
    return scan, *voxels.reshape(2, *scan["shape"])


def test_player_holds_the_volume_and_a_bit_for_each_mask():
    scan, prediction, truth = noise(12, 48, 64), np.roll(ball(), 3, 2), ball()
    page = visualize.player(scan, [prediction, truth], (3, 2, 1), plane=1)
    told, greys, labels = content(page)
    assert told["spacing"] == [3, 2, 1] and told["start"] == "coronal"
    assert list(told["masks"]) == ["prediction", "truth"] and list(told["errors"]) == ["missed", "false"]
    assert np.abs(greys.astype(int) - visualize.grey(scan)).max() < 4
    np.testing.assert_array_equal(labels, prediction + 2 * truth)
    assert content(visualize.player(scan, [], (1, 1, 1)))[2].max() == 0
    assert list(content(visualize.player(scan, [truth] * 3, (1, 1, 1)))[0]["masks"]) == ["mask 1", "mask 2", "mask 3"]


def test_player_shrinks_large_slices_and_keeps_their_size_in_mm():
    told, _, labels = content(visualize.player(noise(2, 320, 640), [np.ones((2, 320, 640))], (5, 1, 1)))
    assert told["shape"] == [2, 160, 320] and told["spacing"] == [5, 2, 2] and labels.all()


def test_player_says_that_its_page_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(visualize, "__file__", str(tmp_path / "visualize.py"))
    with pytest.raises(ValueError, match="player.html: no such file; .* beside visualize.py"):
        visualize.player(noise(2, 3, 4), [], (1, 1, 1))


def test_player_page_fetches_nothing():
    page = (ROOT / "player.html").read_text()
    assert "default-src 'none'" in page and not re.search(r"https?:|//\w|\bsrc=|import|fetch\(", page)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_player_in_a_browser(files, tmp_path):
    """Slider, layers, keys, play and click do what they say; the console stays silent, the network untouched."""
    movie = tmp_path / "movie.html"
    assert visualize.main(["movie", *files, "--out", str(movie)]) == 0
    page = movie.read_text()
    listen = "<script>window.told = []; onerror = onunhandledrejection = event => told.push(String(event))</script>"
    check = (ROOT / "tests" / "player_check.js").read_text()
    movie.write_text(page.replace("<title>", f"{listen}<title>").replace("</html>", f"<script>{check}</script></html>"))
    # The browser itself would call home.
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet,
               "--window-size=900,700", "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom",
               movie.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))

    assert seen["start"] == ["axial 5 / 9", "coronal 16 / 30", "sagittal 21 / 40"]
    (wide, high), (wide_1, high_1), (wide_2, high_2) = seen["sizes"]  # 80 x 60, 80 x 36 and 60 x 36 mm
    assert wide == wide_1 and high_1 == high_2
    assert high / wide == pytest.approx(60 / 80, abs=0.02) and high_1 / wide == pytest.approx(36 / 80, abs=0.02)
    assert wide_2 / wide == pytest.approx(60 / 80, abs=0.02)
    sky, yellow, vermilion, purple = seen["colours"]
    assert min(sky, yellow, vermilion) > 0 and purple == 0  # the truth is a layer that one has to ask for
    assert seen["slider"] == ["axial 1 / 9", True, 0] and seen["back"] is True
    assert seen["opacity"] == [True, True]  # The fill goes, the rim stays.
    assert seen["prediction"] == 0 and seen["errors"] == [0, 0] and seen["truth"] > 0 and seen["scan"] == 2
    assert seen["on_again"] is True and seen["key_1"] is False
    assert seen["right"] == "axial 6 / 9" and seen["left"] == "axial 4 / 9"
    assert seen["coronal"] == ["axial 4 / 9", "coronal 5 / 30", "sagittal 21 / 40"]
    assert seen["play"] == [True, True]
    assert seen["click"][1:] == ["coronal 30 / 30", "sagittal 1 / 40"]  # the corner at the patient's back and right
    # An attempt to fetch would be listed, or, refused by the page's own policy, be an error in the console.
    told = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "willReadFrequently" not in line]
    assert seen["fetched"] == [] and seen["errors_told"] == [] and told == []  # The hint is for the test.


# -------------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("attention", [False, True])
def test_layers_are_laid_out_as_the_u(attention):
    torch.manual_seed(0)
    net = UNet(width=4, depth=2, attention=attention).train()
    figure = visualize.layers(net, noise(22, 31) / 20)
    titles = [axes.get_title() for axes in figure.axes]
    assert {"down 1: 4 channels, 24 x 32", "down 2: 8 channels, 12 x 16", "bottom: 16 channels, 6 x 8",
            "up 2: 8 channels, 12 x 16", "up 1: 4 channels, 24 x 32", "slice", "probability"} <= set(titles)
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert said.count("skip") == 2 and titles.count("gate") == 2 * attention
    assert said.count("") == (10 if attention else 8)  # the arrows
    places = {axes.get_title().split(":")[0]: axes.get_position().corners().mean(axis=0) for axes in figure.axes}
    x, y = np.transpose([places[name] for name in ("down 1", "down 2", "bottom", "up 2", "up 1")]).round(3)
    assert x[0] == x[1] < x[2] < x[3] == x[4] and y[0] == y[4] > y[1] == y[3] > y[2]
    assert visualize.rgb(figure).shape[1] == 900
    assert net.training and not any(module._forward_hooks for module in net.modules())


def test_features_are_what_the_levels_put_out():
    torch.manual_seed(0)
    net, image = UNet(width=4, depth=2, norm="none", attention=True), noise(16, 24) / 20
    seen, x = visualize.features(net, image), torch.from_numpy(image)[None, None]
    with torch.no_grad():
        first = net.down[0](x)
        last = torch.sigmoid(net.head(torch.from_numpy(seen["up 1"])[None]))
    np.testing.assert_allclose(seen["down 1"], first[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(seen["probability"], last[0].numpy(), atol=1e-5)
    assert {name: maps.shape for name, maps in seen.items() if name.startswith("gate")} == {
        "gate 1": (1, 16, 24), "gate 2": (1, 8, 12)}
    assert all(0 < seen[name].min() <= seen[name].max() < 1 for name in ("gate 1", "gate 2"))


def test_layers_show_the_slice_without_its_neighbours():
    image = noise(3, 16, 24)
    figure = visualize.layers(UNet(width=2, depth=1, in_channels=3), image)
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "slice"]
    np.testing.assert_array_equal(axes.images[0].get_array(), image[1])


def test_layers_of_a_3d_network_are_those_of_the_middle_slice():
    net, patch = UNet(width=2, depth=1, dims=3, attention=True).eval(), noise(6, 8, 12)
    seen = visualize.features(net, patch)
    shapes = {name: maps.shape for name, maps in seen.items()}
    assert shapes["down 1"] == (2, 8, 12) and shapes["bottom"] == (4, 4, 6) and shapes["gate 1"] == (1, 8, 12)
    whole = net.predict(torch.from_numpy(patch)[None, None])[0, 0].numpy()
    assert np.allclose(seen["probability"][0], whole[3]) and not np.allclose(whole[3], whole[2])
    visualize.layers(net, patch)


def test_layers_command_shows_the_slice_in_which_the_network_sees_most(files, tmp_path, monkeypatch):
    net = UNet(width=2, depth=1)
    recipe = {"axis": 2, "label": None, "spacing": [None] * 3, "crop": 0, "normalise": "zscore", "size": [32, 40]}
    network = {"width": 2, "depth": 1}
    saved = {"version": VERSION, "model": net.state_dict(), "network": network, "preprocess": recipe}
    torch.save(saved, tmp_path / "x.pt")
    volumes = []

    def predict_volume(net, volume, **_):
        volumes.append(volume)
        return np.eye(len(volume))[6][:, None, None]  # all in slice 6

    monkeypatch.setattr("predict.predict_volume", predict_volume)
    _, image = visualize.fullest_slice(tmp_path / "x.pt", files[0])
    assert image.shape == (1, 32, 40) and image.dtype == np.float32
    np.testing.assert_array_equal(image[0, 1:31], volumes[0][6])
    monkeypatch.undo()
    out = tmp_path / "layers.png"
    assert visualize.main(["layers", str(tmp_path / "x.pt"), files[0], "--out", str(out)]) == 0 and out.exists()
    assert visualize.main(["layers", str(tmp_path / "absent.pt"), files[0], "--out", str(tmp_path / "no.png")]) == 2


# -------------------------------------------------------------------------------------------------------------- curves


def test_read_log_makes_floats_and_marks_what_is_missing(tmp_path):
    rows = visualize.read_log(write_log(tmp_path, "epoch,train_loss,note,lr\n0,0.5,,\n1,,,1e-3\n2,0.2\n"))
    assert [row["epoch"] for row in rows] == [0, 1, 2] and rows[0]["train_loss"] == 0.5 and rows[1]["lr"] == 1e-3
    missing = [rows[0]["note"], rows[0]["lr"], rows[1]["train_loss"], rows[2]["lr"]]
    assert all(isinstance(value, float) for value in missing) and np.isnan(missing).all()


def test_curves_draw_the_columns_that_are_there():
    full = [dict.fromkeys([c for columns in visualize.CURVES.values() for c in columns], 0.5) for _ in range(3)]
    full = [{"epoch": e, "dice_std": 0.1, "unknown": "text", **row} for e, row in enumerate(full)]
    titles = [axes.get_title() for axes in visualize.curves(full).axes]
    assert titles == list(visualize.CURVES)
    part = [{"epoch": 0, "train_loss": 0.9}, {"epoch": 1, "train_loss": 0.5, "val_loss": None}]
    (axes,) = visualize.curves(part).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 0.9], [1, 0.5]])
    figure = visualize.curves(full, part, names=["first", "second"])
    assert len(figure.axes) == len(visualize.CURVES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    first, _, second, _ = figure.axes[1].lines
    assert first.get_color() != second.get_color() and first.get_linewidth() > second.get_linewidth()  # both are seen
    assert visualize.rgb(figure).shape[1:] == (900, 3)


# -------------------------------------------------------------------------------------------------------- command line


def test_every_command_writes_its_picture_and_prints_where(files, tmp_path, capsys):
    scan, prediction, truth = files
    run = write_log(tmp_path / "run")
    for command, ending in (
        (["overlay", scan], "png"),
        (["overlay", scan, prediction, truth, "--axis", "0"], "png"),
        (["montage", scan, prediction, "--axis", "1"], "png"),
        (["planes", scan, prediction, truth], "png"),
        (["surface", scan, prediction, truth], "png"),
        (["movie", scan, prediction], "gif"),
        (["curves", run, run], "png"),
    ):
        out = tmp_path / "made" / f"{command[0]}.{ending}"
        assert visualize.main([*command, "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        with Image.open(out) as image:
            assert image.format == ending.upper()
            if command[0] == "movie":
                assert image.n_frames == 9 and image.size == (320, 240 + 22)


def test_bad_input_is_one_line_that_names_the_file_and_exit_code_2(files, tmp_path, capsys):
    """What data.py says of files that are no scan or of another grid is tested there."""
    scan, _, truth = files
    (tmp_path / "old.png").write_text("old")
    small = write_nifti(tmp_path / "small.nii", np.zeros((40, 30, 8), np.uint8), np.diag((-2.0, -2.0, 4.0, 1.0)))
    empty, headless = write_log(tmp_path / "empty", ""), write_log(tmp_path / "headless", "a,b\n1,2\n")
    for command, out, words in (
        (["overlay", "absent.nii.gz"], "x.png", ["absent.nii.gz"]),
        (["overlay", scan, small], "old.png", ["small.nii", "(40, 30, 8)", "(40, 30, 9)"]),
        (["movie", scan, truth], "x.png", ["x.png", ".gif"]),
        (["surface", scan], "x.png", ["surface", "mask"]),
        (["curves", str(tmp_path / "nowhere")], "x.png", ["nowhere", "log.csv", "train.py"]),
        (["curves", empty], "x.png", ["empty", "0 rows"]),
        (["curves", headless], "x.png", ["headless", "epoch"]),
    ):
        before = sorted(tmp_path.iterdir())
        assert visualize.main([*command, "--out", str(tmp_path / out)]) == 2, command
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1, printed.err
        assert all(word in printed.err for word in words), printed.err
        assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.png").read_text() == "old"


def test_augment_draws_the_fullest_slice_with_the_augmentation_of_the_training(files, tmp_path, monkeypatch):
    """A stand-in for the augmentation: what is tested is what it is given."""
    scan, _, truth = files
    seen = {}

    def augmenter(kind):
        def augment(image, mask, entropy):
            seen.update(kind=kind, image=image, mask=mask)
            return image, mask

        return augment

    monkeypatch.setattr("data.augmenter", augmenter)
    out = tmp_path / "augment.png"
    assert visualize.main(["augment", scan, truth, "--kind", "full", "--out", str(out)]) == 0 and out.exists()
    array = nib.load(truth).get_fdata().T
    assert seen["kind"] == "full" and seen["image"].dtype == np.float32 and seen["mask"].dtype == np.uint8
    assert seen["image"].shape == (30, 40) and abs(seen["image"].mean()) < 0.5 and 0.8 < seen["image"].std() < 1.2
    assert seen["mask"].sum() == array.sum(axis=(1, 2)).max()


# ------------------------------------------------------------------------------------------- on its own, without pyplot


def test_alone_in_a_folder_it_imports_draws_and_never_touches_pyplot(tmp_path):
    """100 figures without a display; no sibling, torch or nibabel is imported for functions on arrays."""
    shutil.copy(ROOT / "visualize.py", tmp_path)
    code = """
import gc, sys, numpy as np, visualize
from matplotlib.figure import Figure
for n in range(50):
    visualize.rgb(visualize.compare(np.ones((1, 8, 8)), np.ones((1, 8, 8)), np.ones((1, 8, 8))))
    visualize.rgb(visualize.curves([{"epoch": 0.0, "lr": 1.0}]))
cube = np.pad(np.ones((6, 6, 6), bool), 2)
for figure in (visualize.surface([cube, cube], (1, 1, 1)), visualize.planes(1 * cube, [cube], (1, 1, 1))):
    visualize.rgb(figure)
del figure
assert not {"matplotlib.pyplot", "torch", "nibabel", "data"} & set(sys.modules), "imported"
gc.collect()
alive = sum(isinstance(thing, Figure) for thing in gc.get_objects())
assert alive == 0, alive
"""
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["overlay", "augment", "layers"])
def test_alone_in_a_folder_it_says_what_is_missing(command, files, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "visualize.py", alone)
    command = [sys.executable, "visualize.py", command, *files[::2], "--out", "x.png"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=alone, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "data.py" in done.stderr
    assert not (alone / "x.png").exists()


def test_pictures_in_docs_are_small_and_made_by_make_docs_or_a_benchmark():
    made = (ROOT / "Makefile").read_text().split("\ndocs:")[1].split("\n\n")[0]
    measured = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    pictures = sorted((ROOT / "docs").iterdir())
    assert pictures and all(path.stat().st_size < 2e6 for path in pictures)
    assert not [path for path in pictures if f"docs/{path.name}\n" not in made + "\n" and path.name not in measured]
