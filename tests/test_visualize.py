"""visualize.py: sizes, colours and proportions of the pictures, the files, the command line, and no trace of pyplot."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

import visualize

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


def test_a_probability_tints_as_strongly_as_it_is_and_has_its_rim_at_one_half():
    rgb = visualize.paint(np.zeros((1, 3), np.uint8), [np.array([[0.2, 0.5, 0.51]])])
    expected = [np.rint(visualize.FILL * p * np.array(SKY)) for p in (0.2, 0.5)]  # 0.5 itself is background
    np.testing.assert_array_equal(rgb[0], [*expected, SKY])


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


def test_compare_shows_scan_truth_prediction_error_from_left_to_right():
    image, truth = np.zeros((1, 64, 64)), np.zeros((1, 64, 64), np.uint8)
    image[0, :, 63] = 1
    truth[0, 10:30, 10:50] = 1
    prediction = np.full((1, 64, 64), 0.49, np.float32)
    prediction[0, 20:40, 10:50] = 0.51
    picture = visualize.rgb(visualize.compare(image, truth, prediction, ["scan 1"]))
    assert picture.dtype == np.uint8 and picture.shape[1] == 900 and 240 < picture.shape[0] < 310
    columns = np.split(picture[44:270], 4, axis=1)  # between titles and legend
    found = [[has(column, colour) for colour in (SKY, YELLOW, VERMILION)] for column in columns]
    assert found == [[False] * 3, [True, False, False], [True, False, False], [True] * 3]
    rows = [np.flatnonzero((columns[3] == colour).all(-1).any(1)).min() for colour in (YELLOW, SKY, VERMILION)]
    assert rows == sorted(rows)  # the truth lies higher: missed above, correct in the middle, false below
    titled = visualize.rgb(visualize.compare(image, truth, prediction))
    assert len(picture) - len(titled) == 22


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_compare_takes_any_range_dtype_and_number_of_rows(n, dtype):
    picture = visualize.rgb(visualize.compare(noise(n, 30, 50), ball((n, 30, 50)), ball((n, 30, 50)).astype(dtype)))
    assert picture.shape[1] == 900 and abs(len(picture) - 44 - n * (4 + 221 * 30 / 50)) < n + 1
    assert has(picture, SKY) and not has(picture[22:-22], YELLOW) and not has(picture[22:-22], VERMILION)


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
    views = visualize.views
    monkeypatch.setattr(visualize, "views", lambda *args: seen.append(list(args[3])) or views(*args))
    picture = visualize.rgb(visualize.overlay(scan, [mask], (1, 1, 1)))
    visualize.overlay(scan, [], (1, 1, 1), count=4)
    visualize.overlay(scan, [np.zeros_like(mask)], (1, 1, 1), count=2)
    assert seen == [[4, 5, 6, 20], [0, 10, 19, 29], [0, 29]]
    assert all(has(column, SKY) for column in np.split(picture, 4, axis=1))


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
    assert (frame[-1] == 255).all(axis=-1).sum() == 60


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
            file.write(content[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        visualize.save(visualize.curves([{"epoch": 0.0, "train_loss": 1.0}]), path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["x.png"]


# -------------------------------------------------------------------------------------------------------------- curves


def test_read_log_makes_floats_and_marks_what_is_missing(tmp_path):
    folder = write_log(tmp_path, "epoch,train_loss,note,lr\n0,0.5,warm,\n1,,,1e-3\n2,0.2\n")
    rows = visualize.read_log(Path(folder, "log.csv"))
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
    assert len(figure.axes) == 6 and [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    first, _, second, _ = figure.axes[0].lines
    assert first.get_color() != second.get_color()
    assert visualize.rgb(figure).shape[1:] == (900, 3)


# -------------------------------------------------------------------------------------------------------- command line


def test_every_command_writes_its_picture_and_prints_where(files, tmp_path, capsys):
    scan, prediction, truth = files
    run = write_log(tmp_path / "run")
    for command, ending in (
        (["overlay", scan], "png"),
        (["overlay", scan, prediction, truth, "--axis", "0"], "png"),
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


def test_read_turns_every_storage_upright(tmp_path):
    """The same anatomy, stored on other axes, is the same array: superior, posterior and left last."""
    upright, spacing = noise(5, 6, 7), (4.0, 3.0, 2.0)
    for codes in ("SPL", "LPS", "RAS", "AIR", "PLS"):
        way = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("SPL"), nib.orientations.axcodes2ornt(codes)
        )
        stored = nib.orientations.apply_orientation(upright, way)
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, code in enumerate(codes):
            row = {"L": 0, "R": 0, "A": 1, "P": 1, "S": 2, "I": 2}[code]
            size = {0: 2.0, 1: 3.0, 2: 4.0}[row]
            affine[row, axis] = size if code in "RAS" else -size
        array, found, _ = visualize.read(write_nifti(tmp_path / f"{codes}.nii", stored, affine))
        np.testing.assert_array_equal(array, upright)
        assert tuple(found) == spacing
    assert visualize.read(tmp_path / "SPL.nii", axis=0)[0].shape == (7, 5, 6)
    assert visualize.read(tmp_path / "SPL.nii", axis=1)[1] == [3.0, 4.0, 2.0]


def test_bad_input_is_one_line_that_names_the_file_and_exit_code_2(files, tmp_path, capsys):
    scan, _, truth = files
    small = write_nifti(tmp_path / "small.nii", np.zeros((40, 30, 8), np.uint8), np.diag((-2.0, -2.0, 4.0, 1.0)))
    moved = np.diag((-2.0, -2.0, 4.0, 1.0))
    moved[0, 3] = 5
    moved = write_nifti(tmp_path / "moved.nii", np.zeros((40, 30, 9), np.uint8), moved)
    flat = write_nifti(tmp_path / "flat.nii", np.zeros((40, 30), np.float32))
    (tmp_path / "text.nii").write_text("no scan")
    (tmp_path / "cut.nii.gz").write_bytes(Path(scan).read_bytes()[:5000])
    (tmp_path / "old.png").write_text("old")
    empty, headless = write_log(tmp_path / "empty", ""), write_log(tmp_path / "headless", "a,b\n1,2\n")
    for command, out, words in (
        (["overlay", "absent.nii.gz"], "x.png", ["absent.nii.gz"]),
        (["overlay", str(tmp_path / "text.nii")], "x.png", ["text.nii", "NIfTI"]),
        (["movie", str(tmp_path / "cut.nii.gz")], "x.gif", ["cut.nii.gz", "export it again"]),
        (["overlay", flat], "x.png", ["flat.nii", "(40, 30)", "three axes"]),
        (["overlay", scan, small], "old.png", ["small.nii", "(8, 30, 40)", "(9, 30, 40)"]),
        (["movie", scan, moved], "x.gif", ["moved.nii", "5 mm", "resample"]),
        (["movie", scan, truth], "x.png", ["x.png", ".gif"]),
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
    """A stand-in for data.py: what is tested is what it is given."""
    scan, _, truth = files
    seen = {}

    class Data:
        @staticmethod
        def augmenter(kind):
            def augment(image, mask, entropy):
                seen.update(kind=kind, image=image, mask=mask)
                return image, mask

            return augment

    monkeypatch.setitem(sys.modules, "data", Data)
    out = tmp_path / "augment.png"
    assert visualize.main(["augment", scan, truth, "--kind", "full", "--out", str(out)]) == 0 and out.exists()
    array = visualize.read(truth)[0]
    assert seen["kind"] == "full" and seen["image"].dtype == np.float32 and seen["mask"].dtype == np.uint8
    assert seen["image"].shape == (30, 40) and abs(seen["image"].mean()) < 0.5 and 0.8 < seen["image"].std() < 1.2
    assert seen["mask"].sum() == array.sum(axis=(1, 2)).max()


def test_augment_with_the_real_augmentation(files, tmp_path):
    if importlib.util.find_spec("imgaug") is None:
        pytest.skip("imgaug is not installed")
    assert visualize.main(["augment", *files[::2], "--out", str(tmp_path / "augment.png")]) == 0


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
assert not {"matplotlib.pyplot", "torch", "nibabel", "data"} & set(sys.modules), "imported"
gc.collect()
alive = sum(isinstance(thing, Figure) for thing in gc.get_objects())
assert alive == 0, alive
"""
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_alone_in_a_folder_augment_says_what_is_missing(files, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(ROOT / "visualize.py", alone)
    command = [sys.executable, "visualize.py", "augment", *files[::2], "--out", "x.png"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=alone, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "data.py" in done.stderr
    assert not (alone / "x.png").exists()
