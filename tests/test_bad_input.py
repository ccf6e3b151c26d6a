"""Bad input: whatever is planted, one line says which file, which value and what to do, and nothing is left behind.

Refused: exit code 2, one line on stderr, no traceback, no output. Repaired: exit code 0, and a note where anything was
changed. The two tables below are also the list of what a data set may hold.
"""

import gzip
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
import warnings

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import predict
import train
import visualize
from unet import UNet

NETWORK = {"in_channels": 1, "out_channels": 1, "dims": 2, "width": 2, "depth": 1, "norm": "none", "attention": False}
RECIPE = {"axis": 2, "label": None, "spacing": [None, 1.0, 1.0], "crop": 0, "normalise": "zscore", "size": [16, 16]}
SHAPE = (16, 12, 6)  # of a file's array; 6 axial slices
MASK = np.zeros(SHAPE, np.uint8)
MASK[4:9, 3:8, 1:5] = 1
SCAN = (np.random.default_rng(0).normal(100, 20, SHAPE) + 80 * MASK).astype(np.int16)

COMMANDS = {  # {} is the folder of the test
    "train": "--data {}/set --cache {}/cache --logs {}/logs --out {}/out --width 2 --depth 1 --epochs 1 --folds 3 "
             "--batch-size 2 --limit-batches 1 --workers 0 --augment none --device cpu --precision fp32",
    "predict": "{}/set/imagesTr --checkpoint {}/last.pt --out {}/out --device cpu --precision fp32",
    "score": "{}/set/imagesTr --checkpoint {}/last.pt --out {}/out --device cpu --precision fp32 "
             "--labels {}/set/labelsTr",
    "data": "{}/set",
    "overlay": "overlay {}/set/imagesTr/a.nii.gz {}/set/labelsTr/a.nii.gz --out {}/out/a.png",
    "layers": "layers {}/last.pt {}/set/imagesTr/b.nii.gz --out {}/out/a.png",
}
MODULES = {"train": train, "predict": predict, "score": predict, "data": data, "overlay": visualize,
           "layers": visualize}


# ------------------------------------------------------------------------------------------------------------- plants
# A plant takes the folder that holds the sound set and changes something in it.


def write(array, affine=None, kind=nib.Nifti1Image, **header):
    """A NIfTI image of an array, with fields of its header set."""
    def image():
        made = kind(np.asarray(array), np.eye(4) if affine is None else affine)
        for field, value in header.items():
            made.header[field] = value
        return made
    return image


def scan(image, name="a.nii.gz", folder="imagesTr"):
    def plant(root):
        path = root / "set" / folder / name
        path.unlink(missing_ok=True)
        if callable(image):
            nib.save(image(), path)
        else:
            path.write_bytes(image)
    return plant


def label(image, name="a.nii.gz"):
    return scan(image, name, "labelsTr")


def labels(array):
    """The same label for every scan."""
    return lambda root: [label(write(array), name)(root) for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz")]


def header(**fields):
    """A scan whose header says what its voxels are not: the bytes are changed, since nibabel would not write it."""
    def plant(root):
        path = root / "set" / "imagesTr" / "a.nii.gz"
        content = gzip.decompress(path.read_bytes())
        head = nib.Nifti1Header(content[:348])
        for field, value in fields.items():
            head[field] = value
        path.write_bytes(gzip.compress(head.binaryblock + content[348:]))
    return plant


def cut(root):
    path = root / "set" / "imagesTr" / "a.nii.gz"
    path.write_bytes(path.read_bytes()[:700])


def link(target):
    def plant(root):
        path = root / "set" / "imagesTr" / "a.nii.gz"
        path.unlink()
        path.symlink_to(target)
    return plant


def moved_and_linked(root):
    path = root / "set/imagesTr/a.nii.gz"
    path.rename(root / "elsewhere.nii.gz")
    path.symlink_to("../../elsewhere.nii.gz")


def remove(*names):
    def plant(root):
        for path in (root / name for name in names):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return plant


def rename(name, new):
    """Scan and label of one name get another."""
    return lambda root: [(root / "set" / folder / f"{name}.nii.gz").rename(root / "set" / folder / f"{new}.nii.gz")
                         for folder in ("imagesTr", "labelsTr")]


def checkpoint(**changes):
    def plant(root):
        torch.save({"version": predict.VERSION, "model": UNet(**NETWORK).state_dict(), "network": NETWORK,
                    "preprocess": RECIPE, "split": {"train": [], "val": []}} | changes, root / "last.pt")
    return plant


def both(*plants):
    return lambda root: [plant(root) for plant in plants]


def there(name, content=None):
    """A file, or without content a folder, in the folder of the test."""
    return lambda root: (root / name).mkdir(parents=True) if content is None else (root / name).write_bytes(content)


def shifted(mm):
    affine = np.eye(4)
    affine[0, 3] = mm
    return affine


def copy_beside(root):
    shutil.copy(root / "set/imagesTr/a.nii.gz", root / "set/imagesTr/a_0000.nii.gz")


def sound(root):
    pass


# ------------------------------------------------------------------------------------------------------------- refused

ALL = "train, predict, data, overlay"
PAIRED = "train, score, data, overlay"

REFUSED = [
    # planted, how, met by, words of the line
    # -- folders
    ("no folder", remove("set"), "train, data", "set: not a folder; imagesTr/ and labelsTr/"),
    ("no folder to predict", remove("set"), "predict", "set/imagesTr: no such file"),
    ("a file for a folder", both(remove("set"), there("set", b"")), "train, data",
     "set: not a folder; imagesTr/"),
    ("empty folder", remove("set/imagesTr", "set/labelsTr"), "train, data", "set: holds no folder; expected imagesTr/"),
    ("no scans", remove(*(f"set/imagesTr/{n}.nii.gz" for n in "abc")), "train, data, predict",
     "imagesTr: holds no .nii"),
    ("no labels folder", remove("set/labelsTr"), "train, data", "set: holds imagesTr; expected; labelsTr/"),
    ("scan without label", remove("set/labelsTr/b.nii.gz"), "train, data", "label in labelsTr/; : b; add or remove"),
    ("scan without label, scored", remove("set/labelsTr/b.nii.gz"), "score", "labelsTr: no label for b"),
    ("label without scan", remove("set/imagesTr/b.nii.gz"), "train, data", "scan in imagesTr/; : b; add or remove"),
    ("two scans of one name", copy_beside, "train, data, predict", "a_0000.nii.gz; same name; keep one"),
    # -- files that are no scan
    ("truncated .gz", cut, ALL, "a.nii.gz"),
    ("gz of garbage", scan(gzip.compress(b"garbage" * 999)), ALL, "a.nii.gz"),
    ("garbage named .gz", scan(b"garbage" * 99), ALL, "a.nii.gz"),
    ("empty file", scan(b""), ALL, "a.nii.gz"),
    ("text named .nii", both(remove("set/imagesTr/a.nii.gz"), scan(b"hello\n" * 99, "a.nii")), "train, predict, data",
     "a.nii: not a readable NIfTI file"),
    ("wrong magic", header(magic=b"abc"), ALL, "a.nii.gz"),
    ("a folder named as a scan", both(remove("set/imagesTr/a.nii.gz"), there("set/imagesTr/a.nii.gz")), ALL,
     "a.nii.gz"),
    ("a link to nothing", link("../annex/a"), ALL, "a.nii.gz"),
    # -- headers
    ("32767 voxels along each axis", header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), ALL, "a.nii.gz"),
    ("negative size", header(dim=[3, -16, 12, 6, 1, 1, 1, 1]), ALL, "a.nii.gz"),
    ("more voxels than the file", header(dim=[3, 16, 12, 60, 1, 1, 1, 1]), ALL, "a.nii.gz"),
    ("a picture in 2D", scan(write(SCAN[..., 0])), ALL, "a.nii.gz; (16, 12)"),
    ("a series in 4D", scan(write(np.stack([SCAN, SCAN], -1))), ALL, "a.nii.gz; (16, 12, 6, 2); one volume"),
    ("complex voxels", scan(write(SCAN.astype(np.complex64))), ALL, "a.nii.gz; complex64"),
    ("RGB voxels", scan(write(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))), ALL, "a.nii.gz"),
    ("singular affine", header(srow_x=0, srow_y=0), ALL, "a.nii.gz; affine is singular; set the sform"),
    ("affine nearly singular", header(srow_x=[1e30, 0, 0, 0], srow_y=[1e30, 1e-9, 0, 0]), ALL, "a.nii.gz; affine; set"),
    ("voxels before the file", header(vox_offset=-1e18), ALL, "a.nii.gz"),
    ("voxels behind a comment of gigabytes", header(vox_offset=2e9), "train, predict, data", "a.nii.gz; at byte 2e+09"),
    ("affine of NaN", header(srow_x=np.nan), ALL, "a.nii.gz; affine; set; sform"),
    ("spacing of 1000 mm", scan(write(SCAN, np.diag([1e3, 1e3, 1, 1]))), "predict", "a.nii.gz; 1000; --max-gb"),
    # -- voxels
    ("NaN everywhere", scan(write(np.full(SHAPE, np.nan, np.float32))), "train, predict, data",
     "a.nii.gz: no voxel is finite"),
    ("Inf everywhere", scan(write(np.full(SHAPE, np.inf, np.float32))), "train, predict, data",
     "a.nii.gz: no voxel is finite"),
    ("constant", scan(write(np.full(SHAPE, 7, np.int16))), "train, predict, data", "a.nii.gz: every voxel is 7"),
    ("all zero", scan(write(np.zeros(SHAPE, np.int16))), "train, predict, data", "a.nii.gz: every voxel is 0"),
    # -- labels
    ("label of another shape", label(write(MASK[:-1])), PAIRED, "labelsTr/a.nii.gz; 15; 16"),
    ("label 5 mm off", label(write(MASK, shifted(5))), PAIRED, "labelsTr/a.nii.gz; 5 mm; resample"),
    ("label of another spacing", label(write(MASK, np.diag([2, 2, 2, 1]))), PAIRED, "labelsTr/a.nii.gz; 1 mm"),
    ("label with fractions", label(write(MASK * np.float32(0.5))), "train, score, data", "a.nii.gz: values are 0, 0.5"),
    ("negative label", label(write(-MASK.astype(np.int8))), "train, score, data", "a.nii.gz: values are -1, 0"),
    ("no foreground anywhere", labels(MASK * 0), "train", "set: no label file holds foreground"),
    ("a label that no file holds", sound, "train --label 7", "set: no label file holds foreground; --label [7]"),
    ("an empty label", label(write(MASK * 0)), "data", "labelsTr/a.nii.gz: no voxel is foreground"),
    ("the values of --label in one file only", label(write(MASK * 7)), "data --label 1", "a.nii.gz: no voxel is fore"),
    # -- arguments
    ("one scan", remove(*(f"set/{f}Tr/{n}.nii.gz" for f in ("images", "labels") for n in "bc")), "train", "--fold all"),
    ("--fold out of range", sound, "train --fold 3", "--fold 3: expected 0 to 2"),
    ("--fold that is no number", sound, "train --fold x", "--fold x: expected a number"),
    ("more folds than scans", sound, "train --folds 4", "--folds 4: expected 2 to 3"),
    ("no epochs", sound, "train --epochs 0", "--epochs 0: expected at least 1"),
    ("no batch", sound, "train --batch-size 0", "--batch-size 0: expected at least 1"),
    ("no batch to predict", sound, "predict --batch-size 0", "--batch-size 0: expected at least 1"),
    ("a --size of one number", sound, "train --size 7", "--size 7: expected 2 numbers"),
    ("a --size below the network's", sound, "train --size 7 7 --depth 3", "--size 7 7; 8"),
    ("a --size of nothing", sound, "train --size 0 16", "--size 0 16"),
    ("a --crop of everything", sound, "train --crop 6", "a.nii.gz; 12 x 16; --crop 6"),
    ("no learning rate", sound, "train --lr -1", "--lr -1"),
    ("a word for a number", sound, "train --width x", "--width; 'x'"),
    ("a device that is not here", sound, "train --device cuda:9, predict --device cuda:9", "--device cuda:9"),
    ("--out is a file", there("out", b""), "train, predict, overlay", "out"),
    ("--cache is a file", there("cache", b""), "train", "cache"),
    # -- checkpoints
    ("no checkpoint", remove("last.pt"), "predict, layers", "last.pt: no such file; train.py"),
    ("checkpoint of garbage", there("last.pt", b"garbage" * 99), "predict, layers",
     "last.pt: not a checkpoint"),
    ("checkpoint cut short", lambda root: os.truncate(root / "last.pt", 999), "predict, layers",
     "last.pt: not a checkpoint"),
    ("checkpoint of another program", lambda root: torch.save({"state_dict": {}}, root / "last.pt"), "predict, layers",
     "last.pt; it lacks model, network"),
    ("checkpoint of another version", checkpoint(version=99), "predict, layers", "last.pt; version is 99"),
    ("checkpoint of another network", checkpoint(network=NETWORK | {"width": 3}), "predict, layers",
     "last.pt; do not fit"),
    ("checkpoint of an unknown network", checkpoint(network={"hidden": 3}), "predict, layers", "last.pt; do not fit"),
    ("checkpoint without a recipe", checkpoint(preprocess={"axis": 2}), "predict, layers", "last.pt; spacing"),
    ("a huge network", checkpoint(network=NETWORK | {"width": 10**6}), "predict", "last.pt; do not fit"),
    ("a run in --out", both(there("out"), there("out/last.pt", b"")), "train",
     "out/last.pt: this folder holds a run; --resume"),
    ("a garbled run to resume", both(there("out"), there("out/last.pt", b"x")),
     "train --resume", "out/last.pt: not a checkpoint"),
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a sound data set and a checkpoint."""
    monkeypatch.setattr(data, "MAX_GB", 1.0)  # main() sets it
    for name in ("a", "b", "c"):
        (tmp_path / "set/imagesTr").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set/labelsTr").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(SCAN, np.eye(4)), tmp_path / f"set/imagesTr/{name}.nii.gz")
        nib.save(nib.Nifti1Image(MASK, np.eye(4)), tmp_path / f"set/labelsTr/{name}.nii.gz")
    checkpoint()(tmp_path)
    return tmp_path


def command(met_by, root):
    name, *flags = met_by.split()
    return MODULES[name], [*shlex.split(COMMANDS[name].replace("{}", str(root))), *flags]


def run(met_by, root):
    module, argv = command(met_by, root)
    with warnings.catch_warnings():  # main() sets showwarning
        try:
            return module.main(argv)
        except SystemExit as end:  # argparse's own
            return end.code


def contents(root):
    """Everything but the cache, which may keep what is sound."""
    kept = (path for path in root.rglob("*") if path.relative_to(root).parts[0] != "cache")
    return {path: path.read_bytes() if path.is_file() else None for path in kept}


def each(table):
    return [pytest.param(plant, met_by, *rest, id=f"{name}: {met_by}")
            for name, plant, commands, *rest in table for met_by in commands.split(", ")]


@pytest.mark.parametrize(("plant", "met_by", "words"), each(REFUSED))
def test_refused(plant, met_by, words, root, capsys):
    plant(root)
    before = contents(root)
    code = run(met_by, root)
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1 and "Traceback" not in told, told
    for word in words.split("; "):
        assert word in told
    assert contents(root) == before


# ------------------------------------------------------------------------------------------------------------ repaired

NAMES = ("left atrium", "心" * 80, "🫀" * 50, "ä" * 120 + " x", "l" * 230)
ONE_NAN = SCAN.astype(np.float32)
ONE_NAN[0, 0, 0] = np.nan
WHOLE = "train, score"

REPAIRED = [
    # planted, how, met by, the note (or nothing, where nothing was changed)
    ("a sound set", sound, "train, predict, score, data, overlay, layers", ""),
    ("hidden files", both(scan(b"x", "._a.nii.gz"), label(b"x", "._a.nii.gz"), scan(b"x", ".DS_Store")), "train, data",
     ""),
    ("other files", both(scan(b"x", "README.txt"), there("set/dataset.json", b"not json")), "train, data, predict", ""),
    ("4D with one volume", scan(write(SCAN[..., None])), WHOLE, ""),
    ("a label of one volume in 4D", label(write(MASK[..., None])), WHOLE, ""),
    ("a NaN", scan(write(ONE_NAN)), "train, score", "a.nii.gz: 1 voxels are NaN or infinite; set to the lowest"),
    ("a NaN, drawn", scan(write(ONE_NAN)), "overlay", ""),
    ("an Inf", scan(write(np.where(np.isnan(ONE_NAN), np.inf, ONE_NAN))), "train, score", "1 voxels are NaN or inf"),
    ("a label 1e-5 mm off", label(write(MASK, shifted(1e-5))), "train, score", "labelsTr/a.nii.gz; 1.0e-05 mm"),
    ("labels 0 and 255", labels(MASK * np.uint8(255)), WHOLE, ""),
    ("labels of several classes", labels(np.where(SCAN > 120, 3, MASK)), WHOLE + ", train --label 3 1", ""),
    ("labels stored as floats", labels(MASK.astype(np.float64)), WHOLE, ""),
    ("one empty label", label(write(MASK * 0)), WHOLE, ""),
    ("NIfTI-2", scan(write(SCAN, kind=nib.Nifti2Image)), WHOLE, ""),
    ("64-bit integers", scan(lambda: nib.Nifti1Image(SCAN, np.eye(4), dtype=np.int64)), WHOLE, ""),
    ("big-endian", scan(lambda: nib.Nifti1Image(SCAN, np.eye(4), nib.Nifti1Header(endianness=">"))), WHOLE, ""),
    ("one slice", both(*(plant(write(array[..., 2:3]), f"{name}.nii.gz")
                         for plant, array in ((scan, SCAN), (label, MASK)) for name in "abc")), WHOLE, ""),
    ("one scan", remove(*(f"set/{f}Tr/{name}.nii.gz" for f in ("images", "labels") for name in "bc")),
     "train --fold all", ""),
    ("slices smaller than --size", sound, "train --size 64 48", ""),
    ("a --size that is no multiple", sound, "train --size 15 13", ""),
    ("another spacing than in training", both(*(plant(write(array, np.diag([2, 3, 4, 1])))
                                                for plant, array in ((scan, SCAN), (label, MASK)))), "score", ""),
    ("links out of the folder", moved_and_linked, "train, score", ""),
    *((f"the name {name[:20]}", rename("b", name), "train, score", "") for name in NAMES),
]


@pytest.mark.parametrize(("plant", "met_by", "note"), each(REPAIRED))
def test_repaired(plant, met_by, note, root, capsys, monkeypatch):
    if met_by.startswith("train"):  # pictures have tests of their own, and take longer than the rest of such a run
        monkeypatch.setattr(visualize, "rgb", lambda figure: np.zeros((2, 2, 3), np.uint8))
    plant(root)
    before = contents(root / "set")
    code = run(met_by, root)
    told = capsys.readouterr().err
    assert code == 0 and "Traceback" not in told, told
    if note:
        assert told.startswith("note: ") and all(word in told for word in note.split("; ")), told
    else:
        assert not told
    if not met_by.startswith("data"):
        assert (root / "out").exists()
    for path in (root / "out").glob("*.nii.gz"):  # a mask lies on its scan
        mask, source = nib.load(path), nib.load(root / "set/imagesTr" / path.name)
        assert mask.shape == source.shape and np.array_equal(mask.affine, source.affine)
    assert contents(root / "set") == before  # the data are never written to


# -------------------------------------------------------------------------------------------------------------- unsafe


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("met_by", ["predict", "layers", "train --resume"])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["model", "note"])
def test_a_pickled_payload_is_refused_and_not_executed(met_by, zipped, where, root, capsys, monkeypatch):
    """Under a known key and under one that nobody reads, in the format of today and of old."""
    monkeypatch.chdir(root)
    (root / "out").mkdir()
    content = torch.load(root / "last.pt", weights_only=True) | {where: Payload()}
    for path in (root / "last.pt", root / "out/last.pt"):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert run(met_by, root) == 2
    told = capsys.readouterr().err
    assert "last.pt: not a checkpoint that can be loaded safely" in told and told.count("\n") == 1
    assert not (root / "executed").exists()


def test_a_damaged_checkpoint_is_never_a_traceback(tmp_path):
    """Of 8,000 changed files, 180 ended in an IndexError, TypeError, AttributeError or struct.error."""
    checkpoint()(tmp_path)
    content, rng, refused = (tmp_path / "last.pt").read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        changed = bytearray(content)
        for where in rng.integers(len(content), size=3):
            changed[where] ^= 1 << int(rng.integers(8))
        (tmp_path / "changed.pt").write_bytes(changed)
        try:
            predict.load_network(predict.load_checkpoint(tmp_path / "changed.pt"))
        except data.DataError:
            refused += 1
    assert refused > 50


def bomb(shape, offset=352):
    """A .nii.gz of a few MB at most that unpacks to gigabytes: zeros, the same packed 16 MB again and again."""
    head = nib.Nifti1Header()
    head.set_data_shape(shape)
    head.set_data_dtype(np.uint8)
    head["magic"], head["vox_offset"] = b"n+1", offset
    head.set_sform(np.eye(4), 1)
    extension = np.array([1, offset - 352, 6], "<i4").tobytes()
    return gzip.compress(head.binaryblock + extension) + gzip.compress(bytes(2**24)) * 130


@pytest.mark.parametrize("content", [bomb((1024, 1024, 2000)), bomb((4, 4, 4), offset=2_000_000_352)],
                         ids=["voxels", "a comment before the voxels"])
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(content, root, capsys):
    scan(content)(root)
    for script in ("train --max-gb 0.1", "predict --max-gb 0.1", "data --max-gb 0.1"):
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert run(script, root) == 2
        told = capsys.readouterr().err
        assert "a.nii.gz" in told and ("--max-gb 0.1" in told or "begin at byte" in told) and told.count("\n") == 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
        assert time.perf_counter() - begun < 5


def test_max_gb_lets_through_what_fits(root, capsys):
    assert run("predict --max-gb 0.00001", root) == 2
    assert "a.nii.gz: 16 x 12 x 6 voxels take 1.84e-05 GB, more than --max-gb 1e-05" in capsys.readouterr().err
    assert run("predict --max-gb 0.00002", root) == 0


@pytest.mark.parametrize("entry", ["../../etc/passwd", "/etc/passwd", "./imagesTr/out.nii.gz"])
def test_a_hostile_dataset_json_changes_nothing(entry, root, capsys):
    """It is never read: names in the folders decide."""
    before = data.find_pairs(root / "set")
    training = [{"image": entry, "label": entry}]
    (root / "set/dataset.json").write_text(json.dumps({"training": training, "test": [entry], "numTraining": 1}))
    assert data.find_pairs(root / "set") == before
    assert [pair.name for pair in data.find_pairs(root / "set", labels=False)] == ["a", "b", "c"]
    assert run("data", root) == 0 and "3 scans read, 0 problems" in capsys.readouterr().out


def test_a_link_out_of_the_folder_is_read_as_nifti_or_refused_and_its_content_not_told(root, capsys):
    (root / "secret").write_text("password" * 99)
    link("../../secret")(root)
    for script in ("train", "predict", "data"):
        assert run(script, root) == 2
        told = capsys.readouterr().err
        assert "a.nii.gz" in told and "password" not in told


def test_a_mask_replaces_a_link_in_out_and_not_what_it_leads_to(root):
    (root / "out").mkdir()
    (root / "mine").write_text("mine")
    (root / "out/a.nii.gz").symlink_to(root / "mine")
    assert run("predict", root) == 0
    assert (root / "mine").read_text() == "mine" and not (root / "out/a.nii.gz").is_symlink()


# ------------------------------------------------------------------------------------------------------ data-set check

SCANS, LABELS = "imagesTr/", "labelsTr/"
CHECKED = [
    # planted, how, a line for each problem
    ("nothing", sound, []),
    ("no labels folder", remove("set/labelsTr"), ["set: holds imagesTr"]),
    ("no scans", remove(*(f"set/imagesTr/{n}.nii.gz" for n in "abc")), [SCANS[:-1] + ": holds no"]),
    ("no partner on either side", both(remove("set/imagesTr/a.nii.gz"), remove("set/labelsTr/c.nii.gz")),
     ["without label in labelsTr/: c", "without scan in imagesTr/: a"]),
    ("one name twice", copy_beside, [SCANS + "a_0000.nii.gz: a.nii.gz is a scan of the same name"]),
    ("cut short", cut, [SCANS + "a.nii.gz: the voxels cannot be read"]),
    ("garbage and text", both(scan(b"x" * 999), label(gzip.compress(b"text" * 99), "b.nii.gz")),
     [SCANS + "a.nii.gz: not a readable", LABELS + "b.nii.gz: not a readable"]),
    ("a link to nothing", link("../annex/a"), [SCANS + "a.nii.gz: no such file"]),
    ("wrong magic", header(magic=b"abc"), [SCANS + "a.nii.gz"]),
    ("a size that no file has", header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), [SCANS + "a.nii.gz: 32767 x 32767"]),
    ("2D and 4D", both(scan(write(SCAN[..., 0])), scan(write(np.stack([SCAN, SCAN], -1)), "c.nii.gz")),
     [SCANS + "a.nii.gz: shape is (16, 12)", SCANS + "c.nii.gz: shape is (16, 12, 6, 2)"]),
    ("complex", scan(write(SCAN.astype(np.complex64))), [SCANS + "a.nii.gz: voxels are complex64"]),
    ("singular affine", header(srow_x=0, srow_y=0), [SCANS + "a.nii.gz: the affine is singular"]),
    ("a NaN", scan(write(ONE_NAN)), [SCANS + "a.nii.gz: 1 voxels are NaN or infinite"]),
    ("constant, its label empty", both(scan(write(SCAN * 0)), label(write(MASK * 0))),
     [SCANS + "a.nii.gz: every voxel is 0", LABELS + "a.nii.gz: no voxel is foreground"]),
    ("label of another shape", label(write(MASK[1:])), [LABELS + "a.nii.gz: shape is (15, 12, 6)"]),
    ("labels off by little and by much", both(label(write(MASK, shifted(5))),
                                              label(write(MASK, shifted(1e-5)), "b.nii.gz")),
     [LABELS + "a.nii.gz: the affine differs from its scan's by 5 mm", LABELS + "b.nii.gz: the affine differs"]),
    ("a label of fractions", label(write(MASK * np.float32(0.5))), [LABELS + "a.nii.gz: values are 0, 0.5"]),
    ("a negative label", label(write(-MASK.astype(np.int8))), [LABELS + "a.nii.gz: values are -1, 0"]),
    ("labels all empty", labels(MASK * 0), [LABELS + f"{n}.nii.gz: no voxel is foreground" for n in "abc"]),
    ("a problem in every scan", both(cut, scan(write(ONE_NAN), "b.nii.gz"), label(write(MASK[1:]), "c.nii.gz"),
                                     scan(write(SCAN), "d.nii.gz")),
     ["without label in labelsTr/: d", SCANS + "a.nii.gz", SCANS + "b.nii.gz", LABELS + "c.nii.gz"]),
]


@pytest.mark.parametrize(("plant", "lines"), [pytest.param(*case[1:], id=case[0]) for case in CHECKED])
def test_check_finds_every_problem_and_no_other(plant, lines, root, capsys):
    plant(root)
    assert run("data", root) == (2 if lines else 0)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(lines), told
    for line in lines:
        assert sum(line in problem for problem in told) == 1, (line, told)


# ------------------------------------------------------------------------------------------------------------- as typed


@pytest.mark.parametrize("script", ["train", "predict", "data"])
def test_the_command_itself(script, root):
    """As in a terminal, so that what torch, nibabel and NumPy print at exit would be seen too."""
    cut(root)
    module, argv = command(script, root)
    ended = subprocess.run([sys.executable, module.__file__, *argv], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "a.nii.gz" in ended.stderr, ended.stderr
    assert not (root / "out").exists() and not (root / "logs").exists()


def test_unreadable_file(root, capsys):
    path = root / "set/imagesTr/a.nii.gz"
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read every file")
    for script in ("train", "predict", "data"):
        assert run(script, root) == 2
        told = capsys.readouterr().err
        assert "a.nii.gz" in told and "Permission denied" in told and told.count("\n") == 1


def test_a_bad_header_among_many_scans_is_told_before_the_first_mask(root, capsys):
    scan(write(np.stack([SCAN, SCAN], -1)), "c.nii.gz")(root)
    assert run("predict", root) == 2 and "c.nii.gz" in capsys.readouterr().err
    assert not (root / "out").exists()


def test_the_table_is_long():
    assert len(REFUSED) >= 60 and len(CHECKED) > 20
