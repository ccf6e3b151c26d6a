"""The phantom: deterministic, resumable, well-formed on disk, upright in space, and not solvable by a threshold."""

import functools
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import phantom
from phantom import ORIENTATIONS, main, make_scan, write_dataset

SMALL = {"scans": 3, "seed": 5, "size": 0.5}


def contents(folder):
    """What data.py sees: hidden files, which an interrupted run leaves, are none of it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


@functools.cache
def scan(k):
    return make_scan(np.random.default_rng([0, k]), list(ORIENTATIONS)[k % 3])


def middle(affine, mask):
    """Centre of mass in mm RAS."""
    return (affine @ [*ndimage.center_of_mass(mask), 1])[:3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """What the command writes; the function must write the same."""
    out = tmp_path_factory.mktemp("phantom") / "small"
    main([str(out), *(f"--{name}={value}" for name, value in SMALL.items())])
    return out


def test_scan_k_depends_on_seed_and_k_alone(dataset, tmp_path):
    """Two with a mask and one without are the first three of any data set of that seed."""
    made, more = contents(write_dataset(tmp_path / "a", **SMALL | {"scans": 2, "test": 1})), contents(dataset)
    listed = json.loads(made.pop("dataset.json"))
    assert (len(listed["training"]), listed["test"]) == (2, ["./imagesTs/la_002.nii.gz"])
    assert made.pop("imagesTs/la_002.nii.gz") == more["imagesTr/la_002.nii.gz"]
    assert len(made) == 4 and made.items() <= more.items()
    other = contents(write_dataset(tmp_path / "b", **SMALL | {"seed": 6}))
    assert not set(other.values()) & set(more.values()) and len(set(other.values())) == 7


def test_layout_and_headers_are_those_of_the_decathlon(dataset):
    listed = json.loads((dataset / "dataset.json").read_text())
    assert listed["labels"] == {"0": "background", "1": "left atrium"} and "ynthetic" in listed["description"]
    names = ("la_000", "la_001", "la_002")
    assert listed["training"] == [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names]
    assert listed["numTraining"] == 3 and listed["test"] == [] and len(contents(dataset)) == 7
    for pair, axes, (least, most) in zip(listed["training"], ("LPS", "RAS", "LPS"), ((0, 0.001), (0, 0.001), (10, 30)),
                                         strict=True):
        image, label = (nib.load(dataset / pair[kind]) for kind in ("image", "label"))
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
        assert image.shape == label.shape and (image.affine == label.affine).all()
        assert nib.aff2axcodes(image.affine) == tuple(axes)
        assert least <= np.degrees(nib.affines.obliquity(image.affine).max()) <= most
        for nifti in (image, label):
            assert (nifti.dataobj.slope, nifti.dataobj.inter, nifti.header.get_xyzt_units()[0]) == (1, 0, "mm")
            assert nifti.header["qform_code"] == nifti.header["sform_code"] == 1
            np.testing.assert_allclose(nifti.get_qform(), nifti.get_sform(), atol=1e-3)


def test_an_interrupted_run_goes_on_where_it_was(dataset, tmp_path, monkeypatch):
    """Stopped at its second patient, and then without one of its files: what is whole is not made again."""
    made = Mock(wraps=make_scan, side_effect=[DEFAULT, KeyboardInterrupt, DEFAULT, DEFAULT, DEFAULT])
    monkeypatch.setattr(phantom, "make_scan", made)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, **SMALL)
    assert contents(write_dataset(tmp_path, **SMALL)) == contents(dataset)
    (tmp_path / "labelsTr/la_001.nii.gz").unlink()
    for _ in range(2):
        assert contents(write_dataset(tmp_path, **SMALL)) == contents(dataset)
    assert made.call_count == 5


def test_runs_at_once_make_one_data_set(tmp_path, dataset):
    """Both used to write the same files in place, and the second fell over the index that the first had renamed."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: write_dataset(tmp_path / "out", **SMALL), range(3)))
    assert contents(tmp_path / "out") == contents(dataset)


@pytest.mark.parametrize("k", range(3))
def test_one_upright_atrium_of_plausible_size_that_brightness_does_not_give_away(k):
    image, mask, spacing, affine = scan(k)
    assert image.shape == mask.shape and (image.dtype, mask.dtype) == (np.int16, np.uint8) and image.min() >= 0
    assert set(np.unique(mask)) == {0, 1} and ndimage.label(mask)[1] == 1
    np.testing.assert_allclose(nib.affines.voxel_sizes(affine), spacing)
    assert spacing[2] > 1.3 * spacing[0] and 0.35 < mask.any(axis=(0, 1)).mean() < 0.7
    assert 40 < mask.sum() * np.prod(spacing) / 1000 < 130  # ml; a healthy left atrium has 40 to 80, a dilated one more

    # No threshold finds it; and a voxel of it is brighter than one of the other blood about as often as not.
    inside = image[mask == 1]
    above = [image >= low for low in np.percentile(inside, range(0, 100, 4))]
    assert max(2 * (found & (mask == 1)).sum() / (found.sum() + mask.sum()) for found in above) < 0.6
    far = ndimage.binary_dilation(mask, iterations=3) == 0
    blood = np.sort(image[far & (image > np.percentile(inside, 2))])
    assert 0.2 < (np.searchsorted(blood, inside) / len(blood)).mean() < 0.8

    def brightness(*place):  # around a place in mm RAS from the middle of the atrium; 1 is blood
        x, y, z = np.round(np.linalg.solve(affine, [*(middle(affine, mask) + place), 1])[:3]).astype(int)
        return image[x - 2:x + 3, y - 2:y + 3, z - 1:z + 2].mean() / inside.mean()

    # Whatever the stored axes: aorta left of the spine, left ventricle in front of and below the atrium.
    aorta, ventricle = brightness(-21, -38, 0), brightness(-38, 28, -28)
    assert aorta > brightness(33, -38, 0) + 0.3  # its mirror image on the other side of the spine
    assert ventricle > brightness(-38, -28, -28) + 0.3  # behind: lung
    assert ventricle > brightness(-38, 28, 28) + 0.2  # above: lung and fat


def test_orientation_and_size_do_not_change_the_patient():
    how = (("LPS", 0.5), ("RAS", 0.5), ("oblique", 0.5), ("LPS", 1))
    made = [make_scan(np.random.default_rng(3), *arguments) for arguments in how]
    volumes = [mask.sum() * np.prod(spacing) for _, mask, spacing, _ in made]
    np.testing.assert_allclose(volumes, volumes[-1], rtol=0.05)
    middles = [middle(affine, mask) for _, mask, _, affine in made]
    np.testing.assert_allclose(middles, [middles[-1]] * 4, atol=1.0)


def test_noise_is_rician():
    """In air the magnitude of complex noise is Rayleigh: mean over spread is sqrt(pi / (4 - pi)), about 1.91."""
    image, *_ = scan(0)
    corners = [image[i, j].astype(float) for i in (slice(8), slice(-8, None)) for j in (slice(8), slice(-8, None))]
    corner = min(corners, key=np.mean)  # the one that holds no skin
    assert corner.mean() / corner.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.1)


@pytest.mark.parametrize(("planted", "words", "told"), [
    ("", "out --test 999", "test=999"), ("", "out --size nan", "size=nan"),
    ("out/dataset.json", "out --scans 3 --size 0.5", "out holds something else"),  # that of another seed
    # A real Decathlon folder has our file names, too: none of its scans may be overwritten.
    ("out/imagesTr/la_000.nii.gz", "out", "out holds something else"),
    ("file", "file/below", "file"), ("", "out", "No space left on device"),
])
def test_what_is_refused_ends_in_one_line_and_nothing_is_written(dataset, tmp_path, capsys, monkeypatch, planted, words,
                                                                 told):
    def full(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    if planted:
        Path(planted).parent.mkdir(parents=True, exist_ok=True)
        Path(planted).write_bytes((dataset / "dataset.json").read_bytes())
    monkeypatch.setattr(Path, "write_bytes", full)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("phantom.py: ") and told in line
    assert contents(tmp_path) == before


def test_a_terminal_that_cannot_print_the_folder_ends_nothing(tmp_path, monkeypatch):
    """ASCII, and code pages of Windows: a UnicodeEncodeError after the work."""
    monkeypatch.setattr(sys, "stdout", screen := io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True))
    main([str(tmp_path / "心"), "--scans", "1", "--size", "0.5"])
    assert rb"\u5fc3" in screen.buffer.getvalue()
