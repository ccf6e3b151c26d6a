"""Bad input: whatever is planted, one line says which file or flag, what is wrong and what to do; nothing is written.

Refused: exit code 2, one line on stderr, no traceback. Repaired: exit code 0, and a note where anything was changed.
The tables are also the list of what a data set may hold.
"""

import gzip
import io
import os
import shlex
import shutil
import sys
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import phantom
import predict
import train
import visualize
from unet import UNet

NETWORK = {"dims": 2, "width": 2, "depth": 1, "norm": "none", "attention": False, "stem": 1}
HOW = {"axis": 2, "label": None, "spacing": [None, 1.0, 1.0], "crop": 0, "normalise": "zscore", "smooth": 0.0,
       "size": [16, 16]}
MASK = np.zeros((16, 12, 6), np.uint8)  # of a file's array; 6 axial slices
MASK[4:9, 3:8, 1:5] = 1
SCAN = (np.random.default_rng(0).normal(100, 20, MASK.shape) + 80 * MASK).astype(np.int16)
# Of one organ a column is a third: many values, but most voxels are as their neighbour.
ATLAS = np.int16(np.arange(16)[:, None, None] // 6 + 3 * np.arange(72).reshape(12, 6))
ONE_NAN = SCAN.astype(np.float32)
ONE_NAN[0, 0, 0] = np.nan

COMMANDS = {  # in the folder of the test
    "train": (train, "--data set --cache cache --tensorboard logs --out out --width 2 --depth 1 --stem 1 --epochs 1 "
                     "--folds 3 --batch-size 2 --limit-batches 1 --workers 0 --augment none --device cpu --precision "
                     "fp32"),
    "predict": (predict, "set/imagesTr --checkpoint last.pt --out out --device cpu"),
    "score": (predict, "set/imagesTr --checkpoint last.pt --out out --device cpu --labels set/labelsTr"),
    "data": (data, "set"),
    "phantom": (phantom, "out --scans 1 --size 0.5"),
    "overlay": (visualize, "overlay set/imagesTr/a.nii.gz set/labelsTr/a.nii.gz --out out/a.png"),
    "layers": (visualize, "layers last.pt set/imagesTr/b.nii.gz --out out/a.png"),
    "movie": (visualize, "movie set/imagesTr/b.nii.gz --out out/a.png"),
    "augment": (visualize, "augment set/imagesTr/b.nii.gz --out out/a.png"),
    "curves": (visualize, "curves set --out out/a.png"),
}


# ------------------------------------------------------------- plants: what changes the sound set of the current folder


def nifti(array, affine=None, **header):
    """A NIfTI image, with fields of its header set."""
    image = nib.Nifti1Image(np.asarray(array), np.eye(4) if affine is None else affine)
    for field, value in header.items():
        image.header[field] = value
    return image


def scan(content, name="a.nii.gz", folder="imagesTr"):
    def plant():
        path = Path("set", folder, name)
        path.unlink(missing_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else nib.save(content, path)
    return plant


def changed(change, folder="imagesTr", unpacked=False):
    """A scan, or a label, whose bytes are changed, of the .gz file or of what it holds."""
    def plant():
        path = Path("set", folder, "a.nii.gz")
        content = path.read_bytes()
        path.write_bytes(gzip.compress(change(gzip.decompress(content))) if unpacked else change(content))
    return plant


def label(content, name="a.nii.gz"):
    return scan(content, name, "labelsTr")


def labels(array):
    return lambda: [label(nifti(array), f"{name}.nii.gz")() for name in "abc"]


def header(**fields):
    """A scan whose header says what its voxels are not: the bytes are changed, since nibabel would not write it."""
    def change(content):
        head = nib.Nifti1Header(content[:348])
        for field, value in fields.items():
            head[field] = value
        return head.binaryblock + content[348:]
    return changed(change, unpacked=True)


def file(name, content=b""):
    def plant():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    return plant


def move(name, new):
    return lambda: os.renames(name, new)  # makes the folder


def remove(*names):
    return lambda: [shutil.rmtree(name) if Path(name).is_dir() else os.unlink(name) for name in names]


def rename(name, new, folders=("imagesTr", "labelsTr")):
    return lambda: [os.rename(f"set/{folder}/{name}.nii.gz", os.path.join(f"set/{folder}", new)) for folder in folders]


def checkpoint(**changes):
    return lambda: torch.save({"version": predict.VERSION, "model": UNet(**NETWORK).state_dict(), "network": NETWORK,
                               "preprocess": HOW, "split": {"train": [], "val": []}, "doubt_below": 0.0} | changes,
                              "last.pt")


def both(*plants):
    return lambda: [plant() for plant in plants]


def other_sum(content):  # four bytes before the last four
    return content[:-8] + b"1234" + content[-4:]


def shifted(mm):
    return nib.affines.from_matvec(np.eye(3), [mm, 0, 0])


def sound():
    pass


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


# ------------------------------------------------------------------------------------------------------------- refused

ALL = "train, predict, data, overlay"
PAIRED = "train, score, data, overlay"
SETS, NETS = "train, data, predict", "predict, layers"
SETS, NETS = "train, data, predict", "predict, layers"
SCANS = [f"set/imagesTr/{name}.nii.gz" for name in "abc"]

REFUSED = [
    # planted, met by, words of the line
    # -- folders and names
    ("no folder", remove("set"), "train, data", "set: not a folder; imagesTr/ and labelsTr/"),
    ("no folder to predict", remove("set"), "predict", "set/imagesTr; not a readable NIfTI file"),
    ("a file for a folder", both(remove("set"), file("set")), "train, data", "set: not a folder; imagesTr/"),
    ("no scans", remove(*SCANS), SETS, "imagesTr: holds no .nii or .nii.gz file, but nothing"),
    ("scans in another format", both(remove(*SCANS), file("set/imagesTr/a.nrrd")), SETS,
     "imagesTr: holds no .nii or; but a.nrrd; convert"),
    ("labels in another", both(remove("set/labelsTr"), file("set/labelsTr/a.seg.nrrd")), "train, score, data",
     "labelsTr: holds no; a.seg.nrrd; convert"),
    ("no labels folder", remove("set/labelsTr"), "train, data", "set: holds imagesTr; expected; labelsTr/"),
    ("no labels folder to score by", remove("set/labelsTr"), "score", "set/labelsTr: No such file"),
    ("scan without label", remove("set/labelsTr/b.nii.gz"), "train, data",
     "imagesTr: b: no file of; in labelsTr/; add it"),
    ("scan without label, scored", remove("set/labelsTr/b.nii.gz"), "score", "labelsTr: no label for b"),
    ("label without scan", remove("set/imagesTr/b.nii.gz"), "train, data",
     "labelsTr: b: no file of; in imagesTr/; add it"),
    ("labels that are all named otherwise", lambda: [rename(n, f"{n}_seg.nii.gz", ["labelsTr"])() for n in "abc"],
     "train, data", "set/labelsTr; a_seg, b_seg, c_seg; no file of; name"),
    ("two scans of one name", both(scan(nifti(SCAN), "a.nii")), SETS, "a.nii.gz; same name; rename"),
    # -- damaged files: each is read to its end, wherever it is read
    ("another check sum", changed(other_sum), ALL, "a.nii.gz: damaged (CRC check failed); copy it again"),
    ("that of a label", changed(other_sum, "labelsTr"), PAIRED,
     "labelsTr/a.nii.gz: damaged (CRC check failed); copy it again"),
    ("a bit flipped", changed(lambda c: c[:900] + bytes([c[900] ^ 4]) + c[901:]), ALL,
     "a.nii.gz: damaged (; copy it again"),
    ("another length", changed(lambda c: c[:-1] + b"1"), ALL, "a.nii.gz: damaged (Incorrect length; copy it again"),
    ("bytes after the end", changed(lambda c: c + b"surplus"), ALL, "a.nii.gz: damaged (Not a gzipped file; copy it"),
    ("a second part, cut", changed(lambda c: c + gzip.compress(b"")[:-6]), ALL,
     "a.nii.gz: damaged (Compressed file ended; copy"),
    ("bytes after the voxels", changed(lambda c: c + b"1", unpacked=True), ALL,
     "a.nii.gz: damaged (bytes follow; copy"),
    ("and not packed", both(remove(SCANS[0]), scan(nifti(SCAN).to_bytes() + b"1", "a.nii")), SETS,
     "a.nii: its header claims; copy it"),
    # -- files that are no scan
    ("truncated .gz", lambda: os.truncate("set/imagesTr/a.nii.gz", 700), ALL, "a.nii.gz; copy it again"),
    ("gz of garbage", scan(gzip.compress(b"garbage" * 999)), ALL, "a.nii.gz: not a readable NIfTI file; export it"),
    ("empty file", scan(b""), ALL, "a.nii.gz: not a readable NIfTI file"),
    ("a folder named as a scan", both(remove(SCANS[0]), lambda: os.mkdir(SCANS[0])), ALL, "a.nii.gz"),
    ("a link to nothing", both(remove(SCANS[0]), lambda: os.symlink("../annex/a", SCANS[0])), ALL, "a.nii.gz"),
    ("a link to a secret", both(remove(SCANS[0]), file("pw", b"secret" * 99), lambda: os.symlink("../../pw", SCANS[0])),
     ALL, "a.nii.gz: not a readable NIfTI file"),
    # -- headers
    ("too many voxels", header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), ALL, "a.nii.gz: its header claims"),
    ("negative size", header(dim=[3, -16, 12, 6, 1, 1, 1, 1]), ALL, "a.nii.gz"),
    ("more voxels than the file", header(dim=[3, 16, 12, 60, 1, 1, 1, 1]), ALL, "a.nii.gz; copy it again"),
    ("voxels before the file", header(vox_offset=-1e18), ALL, "a.nii.gz"),
    ("voxels behind gigabytes of comment", header(vox_offset=2e9), ALL, "a.nii.gz: its header claims"),
    ("a picture in 2D", scan(nifti(SCAN[..., 0])), ALL, "a.nii.gz: shape is (16, 12); one volume"),
    ("a series in 4D", scan(nifti(np.stack([SCAN, SCAN], -1))), ALL, "a.nii.gz: shape is (16, 12, 6, 2); one volume"),
    ("complex voxels", scan(nifti(SCAN.astype(np.complex64))), ALL, "a.nii.gz: voxels are complex64"),
    ("RGB voxels", scan(nifti(np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"]))), ALL, "a.nii.gz: voxels are"),
    ("singular affine", header(srow_x=0, srow_y=0), ALL, "a.nii.gz; correct the affine"),
    ("axes in one plane", header(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), ALL,
     "a.nii.gz: a voxel is; two axes alike"),
    ("affine of NaN", header(srow_x=np.nan), ALL, "a.nii.gz; correct the affine"),
    ("spacing in metres", scan(nifti(SCAN, np.diag([1e-3, 1e-3, 3e-3, 1]), xyzt_units=1)), ALL,
     "a voxel is 0.003 x 0.001; metres"),
    ("spacing in microns", scan(nifti(SCAN, np.diag([1e3, 1e3, 3e3, 1]), xyzt_units=3)), ALL,
     "3000 x 1000 x 1000 mm; microns"),
    ("a slope of 1e38", header(scl_slope=1e38), ALL, "a.nii.gz: voxels are 2.4e+39 to 2.25e+40; scale them to"),
    # -- voxels
    ("times 1e300", scan(nifti(SCAN * 1e300)), ALL, "a.nii.gz: voxels are 2.4e+301 to 2.25e+302; scale them to"),
    ("times 1e-50", scan(nifti(SCAN * 1e-50)), ALL, "a.nii.gz: voxels are 2.4e-49 to 2.25e-48; scale them to"),
    ("NaN everywhere", scan(nifti(SCAN * np.float32(np.nan))), ALL, "a.nii.gz: no voxel is finite; export it again"),
    ("constant", scan(nifti(SCAN * 0 + 7)), SETS, "a.nii.gz; voxel; 7; scan"),
    # -- labels
    ("another shape", label(nifti(MASK[:-1])), PAIRED, "labelsTr/a.nii.gz: shape is (15, 12, 6); must be equal"),
    ("label 5 mm off", label(nifti(MASK, shifted(5))), PAIRED, "labelsTr/a.nii.gz: the affine differs; 5 mm; resample"),
    ("label 0.1 mm off", label(nifti(MASK, shifted(0.1))), "data", "labelsTr/a.nii.gz: the affine differs; by 0.1 mm"),
    ("label at NaN", label(nifti(MASK, shifted(np.nan))), PAIRED, "labelsTr/a.nii.gz: the affine differs"),
    ("fractions", label(nifti(MASK * np.float32(0.5))), PAIRED, "values are 0, 0.5; between 0 and 1; threshold"),
    ("negative label", label(nifti(-MASK.astype(np.int8))), PAIRED, "labelsTr/a.nii.gz: values are -1, 0; from 0"),
    ("NaN for background", label(nifti(np.where(MASK, 1, np.nan))), PAIRED,
     "a.nii.gz: values are 1, nan; whole numbers"),
    ("Inf in a label", label(nifti(np.where(MASK, np.inf, 0))), PAIRED, "labelsTr/a.nii.gz: values are 0, inf"),
    ("a scan as its own label", label(nifti(SCAN)), PAIRED + ", train --label 99, data --label 99",
     "labelsTr/a.nii.gz; different values: this is no mask"),
    ("swapped", both(move("set/imagesTr", "x"), move("set/labelsTr", "set/imagesTr"), move("x", "set/labelsTr")),
     "train, data", "labelsTr/a.nii.gz; different values: this is no mask"),
    ("a probability map", label(nifti(MASK * np.float32(0.7) + 0.1)), PAIRED,
     "labelsTr/a.nii.gz: values are 0.1, 0.8; between 0 and 1: a probability map; threshold it"),
    ("a probability map in 8 bits", label(nifti(np.uint8(ATLAS.clip(max=200)))), PAIRED,
     "labelsTr/a.nii.gz; 201 different values: this is no mask"),
    ("an atlas, of which nothing is chosen", label(nifti(ATLAS)), PAIRED,
     "labelsTr/a.nii.gz; 216 different values: this is no mask; --label"),
    ("a mask of all ones", label(nifti(MASK * 0 + 1)), "train, data", "labelsTr/a.nii.gz: every voxel is organ"),
    ("a mask without background", label(nifti(MASK + 1)), "train, data", "labelsTr/a.nii.gz: every voxel is organ"),
    ("no foreground anywhere", labels(MASK * 0), "train", "set; foreground; --label; nothing to learn"),
    ("a label that no file holds", sound, "train --label 7", "set; foreground; --label [7]"),
    ("an empty label", label(nifti(MASK * 0)), "data", "labelsTr/a.nii.gz: no voxel is foreground; --label"),
    # -- arguments
    ("one scan", remove(*SCANS[1:], "set/labelsTr/b.nii.gz", "set/labelsTr/c.nii.gz"), "train", "--folds 3: expected"),
    ("--fold", sound, "train --fold 3, train --fold -1, train --fold x", "--fold; expected 0 to 2"),
    ("--folds", sound, "train --folds 4, train --folds 1", "--folds; expected 2 to 3"),
    ("--spacing", sound,
     "train --spacing -1, train --spacing 0, train --spacing nan, train --spacing inf, train --spacing x", "--spacing"),
    ("--patch of nothing", sound, "train --dims 3 --patch 0 32 32", "--patch; 0: expected a number from 1"),
    ("--size of another rank", sound, "train --size 7, train --dims 3 --size 7 7", "--size: expected"),
    ("--size below the network's", sound,
     "train --size 4 4 --depth 3 --norm batch, train --size 7 7 --depth 3, train --size 4 4 --depth 2 --norm instance",
     "--size; lower --depth"),
    ("--depth", sound, "train --depth 30, train --depth -1", "--depth; from 0 to 8"),
    ("--depth of 8 for small scans", sound, "train --depth 8 --width 1000 --size 32 32", "--size; lower --depth"),
    ("--seed beyond", sound, f"train --seed {2**64}, train --seed -1", "--seed; from 0"),
    ("--lr", sound, "train --lr -1, train --lr nan", "--lr"),
    ("a --crop of everything", sound, "train --crop 6", "a.nii.gz; 12; 16; --crop 6"),
    ("--device", sound, "train --device cuda:9, predict --device nonsense", "--device; use --device auto or cpu"),
    ("--resume of nothing named", sound, "train --resume --out=", "--resume; --out"),
    ("--out is a file", file("out"), "train, predict, overlay, phantom", "out"),
    ("--cache is a file", file("cache"), "train", "cache"),
    ("--out of a picture", sound, "overlay --out a.txt, movie, curves --out a", "--out"),
    ("augment without a mask", sound, "augment", "augment; two"),
    ("curves of no run", sound, "curves", "set/log.csv"),
    ("phantoms out of range", sound, "phantom --scans 0, phantom --size 9, phantom --seed -1", "expected"),
    ("phantoms beside something else", file("out/mine.txt"), "phantom", "out holds something else; empty folder"),
    ("masks over labels", sound,
     "score --out set/labelsTr, predict --out set/imagesTr, score --out ./set/../set/labelsTr",
     "overwrite a scan or a label; another --out"),
    ("and linked", lambda: os.symlink("set/labelsTr", "link"), "score --out link", "overwrite; another --out"),
    ("no scan held out", checkpoint(split={"train": ["a"], "val": ["x"]}), "score --held-out", "--held-out; x"),
    # -- runs and checkpoints
    ("a run in --out", file("out/last.pt"), "train", "out: holds a run; --resume; another --out"),
    ("best.pt alone in --out", file("out/best.pt"), "train", "out: holds a run; --resume; another --out"),
    ("a run that has just begun in --out", file("out/args.json"), "train", "out: holds a run; another --out"),
    ("a garbled run to resume", file("out/last.pt", b"x"), "train --resume", "out/last.pt; checkpoint; train.py"),
    ("no checkpoint", remove("last.pt"), NETS, "last.pt; no such file"),
    ("checkpoint of garbage", file("last.pt", b"garbage" * 99), NETS, "last.pt; checkpoint; train.py"),
    ("checkpoint cut short", lambda: os.truncate("last.pt", 999), NETS, "last.pt; checkpoint; train.py"),
    ("a scan for a checkpoint", sound, "predict --checkpoint set/imagesTr/a.nii.gz", "a.nii.gz; checkpoint; train.py"),
    ("of another program", lambda: torch.save({"state_dict": {}}, "last.pt"), NETS, "last.pt; checkpoint; train.py"),
    ("the first version", checkpoint(version=1), NETS, "last.pt; version is 1; train it anew"),
    ("a later version", checkpoint(version=99, split=None), "predict", "last.pt; version is 99"),
    ("another network", checkpoint(network=NETWORK | {"width": 3}), NETS, "last.pt; do not fit"),
    ("a huge network", checkpoint(network=NETWORK | {"width": 10**6, "depth": 8}), "predict", "last.pt; do not fit"),
    ("code", checkpoint(model=Payload()), NETS, "last.pt; holds code, posix.mkdir, which was not run"),
    ("code that nobody reads", checkpoint(note=Payload()), NETS, "last.pt; holds code; not run: no checkpoint"),
    ("code in a run to resume", both(checkpoint(note=Payload()), move("last.pt", "out/last.pt")), "train --resume",
     "out/last.pt; checkpoint; train.py"),
]
ODD = ()  # names that other systems do not allow
if sys.platform == "linux":
    ODD = ("'\"`$(x);&", "two\nlines", "\33[2J", "\udcff")
    REFUSED += [
        ("names alike to Windows", scan(nifti(SCAN), "A.nii.gz"), SETS, "A.nii.gz; a.nii.gz; same name"),
        ("a name of two lines", both(rename("a", "a\nb.nii.gz"), scan(b"", "a\nb.nii.gz")), ALL[:-9],
         "a\\nb.nii.gz: not a readable NIfTI file"),
    ]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a sound data set and a checkpoint; the commands run in it."""
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        for folder, array in (("imagesTr", SCAN), ("labelsTr", MASK)):
            Path("set", folder).mkdir(parents=True, exist_ok=True)
            nib.save(nifti(array), f"set/{folder}/{name}.nii.gz")
    checkpoint()()
    return tmp_path


def run(met_by):
    name, *flags = met_by.split()
    module, arguments = COMMANDS[name]
    with warnings.catch_warnings():  # main() sets showwarning
        try:
            return module.main([*shlex.split(arguments), *flags])
        except SystemExit as end:  # argparse's own
            return end.code


def contents(root):
    """Everything but the cache, which may keep what is sound."""
    kept = (path for path in root.rglob("*") if path.relative_to(root).parts[0] != "cache")
    return {path: path.read_bytes() if path.is_file() else None for path in kept}


def each(table):
    return [pytest.param(plant, met_by, words, id=f"{name}: {met_by}")
            for name, plant, commands, words in table for met_by in commands.split(", ")]


@pytest.mark.parametrize(("plant", "met_by", "words"), each(REFUSED))
def test_refused(plant, met_by, words, root, capsys):
    plant()
    before = contents(root)
    code = run(met_by)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    if lines and lines[0].startswith("usage:"):  # argparse says how a command is used, then what was wrong
        lines = lines[-1:]
    if met_by.startswith("data"):  # the check finds all problems, a line for each
        lines = [line for line in lines if words.split("; ")[0] in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in out + err, (out, err)
    assert not [word for word in words.split("; ") if word not in lines[0]], lines
    script = f"{COMMANDS[met_by.split()[0]][0].__name__}.py: "
    assert err.startswith("usage:") or lines[0].startswith(script) and lines[0].isprintable(), lines
    assert contents(root) == before


# ------------------------------------------------------------------------------------------------------------ repaired

REPAIRED = [
    # planted, how, met by, the note (or nothing, where nothing was changed)
    ("a sound set", sound, "train, predict, score, data, overlay, layers", ""),
    ("hidden and other files", both(scan(b"x", "._a.nii.gz"), label(b"x", "._a.nii.gz"), scan(b"x", "README.txt"),
                                    file("set/dataset.json", b'{"training": ["/etc/passwd"]}')), "data, score", ""),
    ("one volume in 4D", both(scan(nifti(SCAN[..., None])), label(nifti(MASK[..., None]))), "data, score", ""),
    ("a NaN", scan(nifti(ONE_NAN)), "train, score, data", "a.nii.gz: 1 voxels are NaN or infinite; set to the lowest"),
    ("a label that one file lacks", label(nifti(MASK * 7)), "data --label 1, train --label 1",
     "1 of 3 scans hold no voxel of label 1: a"),
    ("a label 1e-5 mm off", label(nifti(MASK, shifted(1e-5))), "score, data", "labelsTr/a.nii.gz; 1.0e-05 mm"),
    ("a label saved through a float", label(nifti(MASK * np.float32(1.00002))), "score", "labelsTr/a.nii.gz; rounded"),
    ("other formats beside NIfTI", both(file("set/imagesTr/x.nrrd"), file("set/imagesTr/z.mgz")),
     "train, predict, data", "set/imagesTr: 2 left out; x.nrrd: NRRD; 3D Slicer"),
    ("an atlas", labels(ATLAS), "train --label 5, data --label 5 6", ""),
    ("compressed in parts, and zeros after the end", changed(
        lambda c: gzip.compress(gzip.decompress(c)[:999]) + gzip.compress(gzip.decompress(c)[999:]) + bytes(99)),
     "data, score", ""),
    ("NIfTI-2, 64 bits", scan(nib.Nifti2Image(SCAN, np.eye(4), dtype=np.int64)), "score, data", ""),
    ("big-endian", scan(nib.Nifti1Image(SCAN, np.eye(4), nib.Nifti1Header(endianness=">"))), "score, data", ""),
    ("one slice", both(*(plant(nifti(array[..., 2:3]), f"{n}.nii.gz") for plant, array in ((scan, SCAN), (label, MASK))
                         for n in "abc")), "train, score", ""),
    ("slices smaller than --size", sound, "train --size 64 48", ""),
    ("another spacing than in training", both(*(plant(nifti(array, np.diag([2, 3, 4, 1]))) for plant, array in
                                                ((scan, SCAN), (label, MASK)))), "score", ""),
    ("capital endings", rename("a", "a.NII.GZ"), "score, data, train", ""),
    *((f"the name {ascii(name[:9])}", rename("b", f"{name}.nii.gz"), "train, score, data", "")
      for name in ("left atrium", "心" * 80, "l" * 248, "-x", "100%s", *ODD)),
]


@pytest.mark.parametrize(("plant", "met_by", "note"), each(REPAIRED))
def test_repaired(plant, met_by, note, root, capsys, monkeypatch):
    monkeypatch.setattr(visualize, "png", lambda figure: b"")  # pictures have tests of their own, and take time
    monkeypatch.setattr(visualize, "rgb", lambda figure: np.zeros((2, 2, 3), np.uint8))
    plant()
    before = contents(root / "set")
    code = run(met_by)
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err).splitlines())
    assert code == 0 and "Traceback" not in err and (bool(note) == bool(err)), err
    assert not note or err.startswith("note: ") and all(word in err for word in note.split("; ")), err
    for path in Path("out").glob("*.nii.gz"):  # a mask lies on its scan
        mask, source = nib.load(path), nib.load(data.by_name(data.nifti_files(Path("set/imagesTr")))[path.name[:-7]])
        assert mask.shape == source.shape and np.array_equal(mask.affine, source.affine)
    assert contents(root / "set") == before  # the data are never written to


# ------------------------------------------------------------------------------------------------------------ the rest


def test_the_check_finds_every_problem_and_no_other(root, capsys):
    for plant in (scan(b"x" * 999), label(nifti(MASK * 0), "b.nii.gz"), label(nifti(MASK, shifted(1e-5)), "c.nii.gz"),
                  scan(nifti(SCAN), "d.nii.gz"), label(nifti(MASK), "e.nii.gz"), scan(nifti(SCAN * 0), "c.nii.gz")):
        plant()
    assert run("data") == 2
    table, problems = capsys.readouterr()
    assert table.endswith("3 pairs, 5 problems\n")
    for word in ("imagesTr: d: no file", "labelsTr: e: no file", "imagesTr/a.nii.gz: not",
                 "labelsTr/b.nii.gz: no voxel", "labelsTr/c.nii.gz: the affine", "imagesTr/c.nii.gz: every voxel is 0"):
        assert sum(word in line for line in problems.splitlines()) == 1, word
    assert "6 x 12 x 16 voxels of" in table


@pytest.mark.parametrize(("name", "kind"), [
    ("x.nrrd", "3D Slicer"), ("x.nhdr", "3D Slicer"), ("x.MHA", "SimpleITK"), ("x.mhd", "SimpleITK"),
    ("x.hdr", "Analyze"), ("x.img", "Analyze"), ("x.mgz", "mri_convert"), ("x.mgh", "mri_convert"),
    ("x.dcm", "dcm2niix"), ("IM_0001", "dcm2niix"), ("x.nii.bz2", "bunzip2"), ("x.nii.xz", "unxz"),
    ("x.nii.zip", "unzip"), ("x.nii.zst", "unzstd"), ("patient", "a folder; docs/challenge.md")])
def test_a_scan_in_another_format_is_told_what_converts_it(name, kind, root, capsys):
    """Half of a data set was left out in silence. Given as a file, it was "not a readable NIfTI file"."""
    path = Path("set/imagesTr", name)
    path.mkdir() if name == "patient" else path.write_bytes(bytes(128) + b"DICM" if name == "IM_0001" else b"x")
    assert run("data") == 0
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: set/imagesTr: 1 left out, for they are no NIfTI files: {name}: ")
    assert visualize.main(["overlay", str(path), "--out", "a.png"]) == 2
    remove(*SCANS)()
    assert run("data") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"visualize.py: {path}: ") and f"but {name}: " in lines[1] and len(lines) == 2
    assert all(word in line for word in kind.split("; ") for line in (note, *lines))


@pytest.mark.parametrize(("shape", "offset"), [((2000, 2000, 2000), 352), ((4, 4, 4), 2_000_000_000)])
def test_nothing_is_allocated_that_a_header_only_claims(root, capsys, shape, offset):
    """A file of 1 MB that unpacks to 1 GB, and claims eight of voxels, or two of comment before them."""
    head = nifti(np.zeros((2, 2, 2), np.uint8)).header
    head.set_data_shape(shape)
    head["magic"], head["vox_offset"] = b"n+1", offset
    scan(gzip.compress(head.binaryblock + bytes(4)) + gzip.compress(bytes(2**24)) * 60)()
    tracemalloc.start()
    codes = [run(command) for command in ("data", "predict")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert codes == [2, 2] and capsys.readouterr().err.count("a.nii.gz: its header claims") == 2 and peak < 1e7


def test_a_bad_header_among_many_scans_is_told_before_the_first_mask(root):
    scan(nifti(np.stack([SCAN, SCAN], -1)), "c.nii.gz")()
    assert run("predict") == 2 and not Path("out").exists()


def test_a_mask_replaces_a_link_in_out_and_not_what_it_leads_to(root):
    file("out/mine", b"mine")()
    os.symlink("mine", "out/a.nii.gz")
    assert run("predict") == 0
    assert Path("out/mine").read_bytes() == b"mine" and not Path("out/a.nii.gz").is_symlink()


@pytest.mark.parametrize("command", ["data", "score", "train"])
def test_ctrl_c_ends_with_one_line(command, root, capsys, monkeypatch):
    """It was a traceback in data.py and predict.py."""
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "read_voxels", interrupted)
    try:
        code = run(command)
    except KeyboardInterrupt:  # which would end the tests
        code = None
    assert code == 130 and capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("command", ["data", "score", "train --fold 2"])
def test_an_output_that_cannot_print_a_name_ends_nothing(command, root, monkeypatch):
    """ASCII, and some code pages of Windows: a UnicodeEncodeError, in training before anything was saved."""
    rename("a", "心.nii.gz")()  # the last name, so that fold 2 validates on it
    monkeypatch.setattr(visualize, "png", lambda figure: b"")
    monkeypatch.setattr(visualize, "rgb", lambda figure: np.zeros((2, 2, 3), np.uint8))
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert run(command) == 0
