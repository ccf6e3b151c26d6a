"""The phantom: deterministic, resumable, well-formed on disk, upright in space, and not solvable by a threshold."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import phantom
from phantom import ORIENTATIONS, main, make_scan, write_dataset

SMALL = {"scans": 3, "seed": 5, "size": 0.5}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.cache
def scan(k: int):
    return make_scan(np.random.default_rng([0, k]), ORIENTATIONS[k % 3])


def to_world(affine: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    """Centre of mass, mm RAS, of a boolean array."""
    return (affine @ [*ndimage.center_of_mass(voxels), 1])[:3]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("phantom") / "small", **SMALL)


# ------------------------------------------------------------------------------------------------------------ on disk


def test_same_arguments_give_same_bytes(dataset, tmp_path):
    again = write_dataset(tmp_path / "again", **SMALL)
    assert contents(again) == contents(dataset)


def test_scan_k_does_not_depend_on_the_number_of_scans(dataset, tmp_path):
    fewer = contents(write_dataset(tmp_path / "fewer", **SMALL | {"scans": 2}))
    more = contents(dataset)
    shared = [name for name in fewer if name.endswith(".nii.gz")]
    assert len(shared) == 4
    assert all(fewer[name] == more[name] for name in shared)


def test_seeds_and_scans_differ(dataset, tmp_path):
    other = write_dataset(tmp_path / "other", **SMALL | {"seed": 6})
    images = [path.read_bytes() for folder in (dataset, other) for path in (folder / "imagesTr").iterdir()]
    assert len(set(images)) == 6


def test_layout_is_that_of_the_decathlon(dataset):
    listed = json.loads((dataset / "dataset.json").read_text())
    assert listed["modality"] == {"0": "MRI"}
    assert listed["labels"] == {"0": "background", "1": "left atrium"}
    assert listed["numTraining"] == len(listed["training"]) == 3
    assert listed["test"] == []
    assert "ynthetic" in listed["description"]
    assert listed["training"][2] == {"image": "./imagesTr/la_002.nii.gz", "label": "./labelsTr/la_002.nii.gz"}
    files = {path for pair in listed["training"] for path in pair.values()} | {"./dataset.json"}
    assert {f"./{Path(name).as_posix()}" for name in contents(dataset)} == files


def test_headers(dataset):
    for k in range(3):
        image = nib.load(dataset / f"imagesTr/la_{k:03d}.nii.gz")
        label = nib.load(dataset / f"labelsTr/la_{k:03d}.nii.gz")
        assert (image.get_data_dtype(), label.get_data_dtype()) == (np.int16, np.uint8)
        assert image.shape == label.shape
        np.testing.assert_array_equal(image.affine, label.affine)
        for nifti in (image, label):
            assert (nifti.dataobj.slope, nifti.dataobj.inter) == (1, 0)
            assert nifti.header.get_xyzt_units()[0] == "mm"
            assert int(nifti.header["qform_code"]) == int(nifti.header["sform_code"]) == 1
            np.testing.assert_allclose(nifti.get_qform(), nifti.get_sform(), atol=1e-3)


def test_orientations_cycle_from_lps_to_ras_to_oblique(dataset):
    affines = [nib.load(dataset / f"imagesTr/la_{k:03d}.nii.gz").affine for k in range(3)]
    assert [nib.aff2axcodes(affine) for affine in affines] == [tuple("LPS"), tuple("RAS"), tuple("LPS")]
    assert nib.affines.obliquity(affines[0]).max() < 1e-3
    assert nib.affines.obliquity(affines[1]).max() < 1e-3
    assert 10 <= np.degrees(nib.affines.obliquity(affines[2]).max()) <= 30


def test_a_complete_data_set_is_left_alone(tmp_path, monkeypatch):
    write_dataset(tmp_path, **SMALL)
    monkeypatch.setattr(phantom, "make_scan", lambda *_: pytest.fail("made a scan again"))
    write_dataset(tmp_path, **SMALL)


def test_an_interrupted_run_goes_on_where_it_was(dataset, tmp_path, monkeypatch):
    made = []

    def interrupted(*args):
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make_scan(*args)

    monkeypatch.setattr(phantom, "make_scan", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, **SMALL)
    assert (tmp_path / "imagesTr/la_000.nii.gz").exists()
    assert contents(write_dataset(tmp_path, **SMALL)) == contents(dataset)
    assert len(made) == 4  # the first scan was there


def test_half_a_file_is_not_taken_for_a_scan(dataset, tmp_path, monkeypatch):
    write = phantom.nib.save

    def killed(nifti, path):
        write(nifti, path)
        path.write_bytes(path.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(phantom.nib, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, **SMALL)
    monkeypatch.undo()
    made = contents(write_dataset(tmp_path, **SMALL))
    left = [name for name in made if Path(name).name.startswith(".")]  # what data.py does not see
    assert len(left) == 1 and {name: made[name] for name in made if name not in left} == contents(dataset)


def test_a_lost_file_is_written_anew(dataset, tmp_path):
    write_dataset(tmp_path, **SMALL)
    (tmp_path / "labelsTr/la_001.nii.gz").unlink()
    assert contents(write_dataset(tmp_path, **SMALL)) == contents(dataset)


@pytest.mark.parametrize("name", ["notes.txt", "dataset.json", "imagesTr/la_000.nii.gz"])
def test_a_foreign_folder_is_left_alone(tmp_path, name):
    """A real Decathlon folder has our file names too: none of its scans may be overwritten."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="holds something else") as error:
        write_dataset(tmp_path, **SMALL)
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == {str(Path(name)): b"{}"}


def test_other_arguments_do_not_overwrite(dataset):
    before = contents(dataset)
    with pytest.raises(ValueError, match="holds something else"):
        write_dataset(dataset, **SMALL | {"seed": 6})
    assert contents(dataset) == before


# ---------------------------------------------------------------------------------------------------------- the scans


@pytest.mark.parametrize("k", range(6))
def test_one_atrium_in_about_half_of_the_slices(k):
    image, mask, spacing, affine = scan(k)
    assert image.shape == mask.shape
    assert (image.dtype, mask.dtype) == (np.int16, np.uint8)
    assert image.min() >= 0
    assert set(np.unique(mask)) == {0, 1}
    assert ndimage.label(mask)[1] == 1
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing)
    assert spacing[2] > 1.3 * spacing[0]
    share = mask.mean(axis=(0, 1))
    assert 0.35 < (share > 0).mean() < 0.7
    assert 0.015 < share[share > 0].mean() < 0.055
    assert 40 < mask.sum() * np.prod(spacing) / 1000 < 130  # ml; a healthy left atrium has 40 to 80, a dilated one more


@pytest.mark.parametrize("k", range(6))
def test_no_threshold_finds_the_atrium(k):
    image, mask, *_ = scan(k)
    dice = []
    for low in np.percentile(image[mask == 1], range(0, 100, 4)):
        found = image >= low
        dice.append(2 * (found & (mask == 1)).sum() / (found.sum() + mask.sum()))
    assert max(dice) < 0.6


def test_atrium_and_other_blood_are_equally_bright():
    """A voxel drawn from the atrium is brighter than one from the other blood about as often as not."""
    ranks = []
    for k in range(3):
        image, mask, *_ = scan(k)
        inside = image[mask == 1]
        far = ndimage.binary_dilation(mask, iterations=3) == 0
        blood = np.sort(image[far & (image > np.percentile(inside, 2))])
        ranks.append((np.searchsorted(blood, inside) / len(blood)).mean())
    assert all(0.2 < rank < 0.8 for rank in ranks), ranks


@pytest.mark.parametrize("k", range(6))
def test_patient_is_upright_in_the_world(k):
    """Whatever the stored axes: aorta left of the spine, left ventricle in front of and below the atrium."""
    image, mask, _, affine = scan(k)
    index = np.indices(image.shape).reshape(3, -1)
    position = (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *image.shape)
    position -= to_world(affine, mask == 1)[:, None, None, None]

    def brightness(*place):  # of the voxels within 6 mm of a place, mm RAS from the middle of the atrium; 1 is blood
        near = np.linalg.norm(position - np.reshape(place, (3, 1, 1, 1)), axis=0) < 6
        assert near.sum() > 20
        return image[near].mean() / image[mask == 1].mean()

    aorta, ventricle = (-21, -38, 0), (-38, 28, -28)
    assert brightness(*aorta) > brightness(33, -38, 0) + 0.3  # its mirror image on the other side of the spine
    assert brightness(*ventricle) > brightness(-38, -28, -28) + 0.3  # behind: lung
    assert brightness(*ventricle) > brightness(-38, 28, 28) + 0.2  # above: lung and fat


def test_orientation_and_size_do_not_change_the_patient():
    volumes, middles = [], []
    for orientation, size in (("LPS", 1), ("RAS", 1), ("oblique", 1), ("LPS", 0.5)):
        _, mask, spacing, affine = make_scan(np.random.default_rng(3), orientation, size)
        volumes.append(mask.sum() * np.prod(spacing) / 1000)
        middles.append(to_world(affine, mask == 1))
    np.testing.assert_allclose(volumes, volumes[0], rtol=0.05)
    np.testing.assert_allclose(middles, np.broadcast_to(middles[0], (4, 3)), atol=1.0)


def test_noise_is_rician():
    """In air the magnitude of complex noise is Rayleigh: mean over spread is sqrt(pi / (4 - pi)), about 1.91."""
    image, *_ = scan(0)
    corners = [image[i, j].astype(float) for i in (slice(8), slice(-8, None)) for j in (slice(8), slice(-8, None))]
    corner = min(corners, key=np.mean)  # the one that holds no skin
    assert corner.mean() / corner.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.1)


# ----------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("arguments", [{"orientation": "LAS"}, {"size": 0.1}, {"size": float("nan")}])
def test_make_scan_refuses(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_scan(np.random.default_rng(0), **arguments)


def test_command_line(tmp_path, capsys, dataset):
    main([str(tmp_path / "out"), "--scans", "3", "--seed", "5", "--size", "0.5"])
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(dataset)


@pytest.mark.parametrize("flags", [["--scans", "0"], ["--seed", "-1"], ["--size", "9"], ["--scans", "two"]])
def test_command_line_refuses(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error" in last and flags[0].strip("-") in last
    assert not (tmp_path / "out").exists()


def test_command_line_refuses_a_file_in_the_way(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SystemExit) as stop:
            main([str(out)])
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_at_once_make_one_data_set(tmp_path, dataset):
    """Both used to write the same files in place, and the second fell over the index that the first had renamed."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: write_dataset(tmp_path / "out", scans=3, seed=5, size=0.5), range(3)))
    assert contents(tmp_path / "out") == contents(dataset)
