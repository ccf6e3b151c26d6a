"""Bad input: whatever is planted, one line says which file or flag, what is wrong and what to do; nothing is written.

Refused: exit code 2, one line on stderr, no traceback, no memory taken. Noted: exit code 0, and a note of what was
changed or looks wrong. Taken: exit code 0, and not a word. The tables are also the list of what a data set may hold.
"""

import gzip
import io
import os
import shlex
import shutil
import sys
import tracemalloc
import warnings
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  the optimiser does so, and traced it would take long

import data
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
SERIES = np.stack([SCAN, SCAN], -1)
ONE_NAN = np.where(np.arange(SCAN.size).reshape(SCAN.shape), SCAN, np.float32(np.nan))
# Of one organ a column is a third: many values, but most voxels are as their neighbour.
ATLAS = np.int16(np.arange(16)[:, None, None] // 6 + 3 * np.arange(72).reshape(12, 6))
FORMATS = ("x.nrrd", "x.nhdr", "x.MHA", "x.mhd", "x.hdr", "x.img", "x.mgz", "x.mgh", "x.dcm", "IM_01", "x.nii.bz2",
           "x.nii.xz", "x.nii.zip", "x.nii.zst")

SCANS, LABELS = ([f"set/{folder}/{name}.nii.gz" for name in "abc"] for folder in ("imagesTr", "labelsTr"))
COMMANDS = {  # in the folder of the test; the last: what a command says of a sound set
    "train": (train, "--data set --cache cache --tensorboard logs --out out --width 2 --depth 1 --stem 1 --epochs 1 "
                     "--folds 3 --batch-size 2 --limit-batches 1 --workers 0 --augment none --device cpu --precision "
                     "fp32", "2 scans to train on, 1 to validate on"),
    "predict": (predict, "set/imagesTr --checkpoint last.pt --out out --device cpu", "3 masks in out"),
    "score": (predict, "set/imagesTr --checkpoint last.pt --out out --device cpu --labels set/labelsTr", "3 masks in"),
    "data": (data, "set", "3 pairs, 0 problems"),
    "overlay": (visualize, f"overlay {SCANS[0]} {LABELS[0]} --out out/a.png", "out/a.png"),
    "layers": (visualize, f"layers last.pt {SCANS[1]} --out out/a.png", "out/a.png"),
    "show": (visualize, "overlay --out out/a.png", ""),
}
ALL, PAIRED = "train, predict, data, overlay", "train, score, data, overlay"  # what reads a scan, and its label,
SETS, NETS = "train, data, predict", "predict, layers"  # a folder of scans, a checkpoint


# ------------------------------------------------------------- plants: what changes the sound set of the current folder


def plant(function):
    """What the function does is done later, in the folder of a test."""
    return lambda *args, **fields: partial(function, *args, **fields)


move, link, copy, folder = map(plant, (os.renames, os.symlink, shutil.copy, os.makedirs))


@plant
def put(path, content=b""):
    """Bytes, or an image, whose header says where it lies, so that no two files are copies of one another."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        Path(path).write_bytes(content)
    else:
        content.header["descrip"] = path
        nib.save(content, path)


def nifti(path, array, affine=None, units=0):
    image = nib.Nifti1Image(np.asarray(array), np.eye(4) if affine is None else affine)
    image.header["xyzt_units"] = units
    return put(path, image)


scan, label = partial(nifti, SCANS[0]), partial(nifti, LABELS[0])


def labels(array):
    return [nifti(path, array) for path in LABELS]


@plant
def changed(change, path=SCANS[0]):
    Path(path).write_bytes(change(Path(path).read_bytes()))


def unpacked(change):
    return changed(lambda content: gzip.compress(change(gzip.decompress(content))))


def header(**fields):
    """A scan whose header says what its voxels are not: the bytes are changed, since nibabel would not write it."""
    def change(content):
        head = nib.Nifti1Header(content[:348])
        for field, value in fields.items():
            head[field] = value
        return head.binaryblock + content[348:]
    return unpacked(change)


@plant
def remove(*paths):
    for path in paths:
        shutil.rmtree(path) if Path(path).is_dir() else os.unlink(path)


def rename(*names, ending=".nii.gz"):
    """Scans and labels a, b, c, called otherwise."""
    return [move(f"{kind}/{old}.nii.gz", f"{kind}/{new}{ending}") for kind in ("set/imagesTr", "set/labelsTr")
            for old, new in zip("abc", names, strict=False)]


def checkpoint(path="last.pt", **changes):
    torch.save({"version": predict.VERSION, "model": UNet(**NETWORK).state_dict(), "network": NETWORK, "preprocess":
                HOW, "split": {"train": [], "val": []}, "doubt_below": 0.0} | changes, content := io.BytesIO())
    return put(path, content.getvalue())


def shifted(mm):
    return nib.affines.from_matvec(np.eye(3), [mm, 0, 0])


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


ZEROS = changed(lambda c: c + gzip.compress(bytes(2**24)) * 60)  # 1 MB that unpacks to 1 GB
OTHER_SUM = partial(changed, lambda c: c[:-8] + b"1234" + c[-4:])
NO_SCAN, FOREIGN, DICOM = remove(SCANS[0]), [put(name) for name in FORMATS], bytes(128) + b"DICM"

# ------------------------------------------------------------------------------------------------------------- refused

REFUSED = [  # the commands that meet it; pieces of the line; what is planted, each alone, those of a list together
    # -- folders and names
    ("train, data", "set: not a folder; imagesTr/ and labelsTr/", remove("set"), [remove("set"), put("set")]),
    ("predict", "set/imagesTr; not a readable NIfTI file", remove("set")),
    (SETS, "imagesTr: holds no .nii or .nii.gz file, but nothing", remove(*SCANS)),
    (SETS, "imagesTr: holds no .nii or; but a.nrrd; convert", [remove(*SCANS), put("set/imagesTr/a.nrrd")]),
    ("train, score, data", "labelsTr: holds no; but a.mha; convert", [remove(*LABELS), put("set/labelsTr/a.mha")]),
    ("train, data", "set: holds imagesTr; expected; labelsTr/", remove("set/labelsTr")),
    ("score", "set/labelsTr: No such file", remove("set/labelsTr")),
    ("train, data", "imagesTr: b: no file of; in labelsTr/; add it", remove(LABELS[1])),
    ("score", "labelsTr: no label for b", remove(LABELS[1])),
    ("train, data", "labelsTr: b: no file of; in imagesTr/; add it", remove(SCANS[1])),
    ("train, data", "set/labelsTr; a_seg, b_seg, c_seg; no file of; name",
     [move(path, path.replace(".", "_seg.", 1)) for path in LABELS]),
    (SETS, "a.nii.gz; same name; rename", nifti("set/imagesTr/a.nii", SCAN)),
    ("train, data", "set/imagesTr: x_0000, x_0001: several channels of a patient; of one number only",
     [nifti(f"set/{name}.nii.gz", SCAN) for name in ("imagesTr/x_0000", "imagesTr/x_0001", "labelsTr/x")]),
    # -- damaged files: each is read to its end, wherever it is read
    (ALL, "imagesTr/a.nii.gz: damaged (CRC check failed); copy it again", OTHER_SUM()),
    (PAIRED, "labelsTr/a.nii.gz: damaged (CRC check failed); copy it again", OTHER_SUM(LABELS[0])),
    (ALL, "a.nii.gz: damaged (; copy it again", changed(lambda c: c[:900] + bytes([c[900] ^ 4]) + c[901:]),
     changed(lambda c: c[:-1] + b"1"), changed(lambda c: c + b"surplus"), unpacked(lambda c: c + b"1"),
     changed(lambda c: c + gzip.compress(b"")[:-6])),
    (SETS, "a.nii: its header claims; copy it",
     [changed(lambda c: gzip.decompress(c) + b"1"), move(SCANS[0], SCANS[0][:-3])]),
    (ALL, "a.nii.gz; copy it again", changed(lambda c: c[:700]), header(dim=[3, 16, 12, 60, 1, 1, 1, 1])),
    # -- files that are no scan
    (ALL, "a.nii.gz: not a readable NIfTI file; export it", put(SCANS[0], gzip.compress(b"garbage" * 999)),
     put(SCANS[0]), [NO_SCAN, put("pw", b"secret" * 99), link("../../pw", SCANS[0])]),
    (ALL, "a.nii.gz", [NO_SCAN, folder(SCANS[0])], [NO_SCAN, link("../annex/a", SCANS[0])],
     header(dim=[3, -16, 12, 6, 1, 1, 1, 1]), header(vox_offset=-1e18)),
    ("show x.nrrd, show x.nhdr, show x.MHA, show x.mhd", "NRRD or MetaImage; 3D Slicer or SimpleITK", FOREIGN),
    ("show x.hdr, show x.img, show x.mgz, show x.mgh", "Analyze or FreeSurfer's; mri_convert", FOREIGN),
    ("show x.dcm, show IM_01", "DICOM; dcm2niix", [*FOREIGN, put("IM_01", DICOM)]),
    ("show x.nii.bz2, show x.nii.xz, show x.nii.zip, show x.nii.zst", "compressed; bunzip2, unxz, unzip or", FOREIGN),
    ("show set", "set: a folder; docs/challenge.md"),
    # -- headers
    (ALL, "a.nii.gz: its header claims", header(dim=[3, *[32767] * 3, 1, 1, 1, 1]), header(vox_offset=2e9),
     [header(dim=[3, *[2000] * 3, 1, 1, 1, 1]), ZEROS], [header(vox_offset=2e9), ZEROS]),
    (ALL, "a.nii.gz: shape is (16, 12); one volume", scan(SCAN[..., 0])),
    ("overlay", "a.nii.gz: shape is (16, 12, 6, 2); one volume", scan(SERIES)),
    (SETS, "c.nii.gz: shape is (16, 12, 6, 2); one volume", nifti(SCANS[2], SERIES)),  # told before the first mask
    (ALL, "a.nii.gz: voxels are; expected integers or floats", scan(SCAN.astype(np.complex64)),
     scan(np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"]))),
    (ALL, "a.nii.gz: a voxel is; correct the affine; two axes alike", header(srow_x=0, srow_y=0),
     header(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), header(srow_x=np.nan)),
    (ALL, "a voxel is 0.003 x 0.001; metres", scan(SCAN, np.diag([1e-3, 1e-3, 3e-3, 1]), units=1)),
    (ALL, "3000 x 1000 x 1000 mm; microns", scan(SCAN, np.diag([1e3, 1e3, 3e3, 1]), units=3)),
    # -- voxels
    (ALL, "a.nii.gz: voxels are 2.4e; scale them to", header(scl_slope=1e38), scan(SCAN * 1e300), scan(SCAN * 1e-50)),
    (ALL, "a.nii.gz: no voxel is finite; export it again", scan(SCAN * np.float32(np.nan))),
    (SETS, "a.nii.gz; voxel; 7; scan", scan(SCAN * 0 + 7)),
    # -- labels
    (PAIRED, "labelsTr/a.nii.gz: shape is (15, 12, 6); must be equal", label(MASK[:-1])),
    (PAIRED, "labelsTr/a.nii.gz: the affine differs; 5 mm; resample", label(MASK, shifted(5))),
    (PAIRED, "labelsTr/a.nii.gz: the affine differs; resample", *(label(MASK, shifted(mm)) for mm in (0.1, np.nan))),
    (PAIRED, "labelsTr/a.nii.gz: values are 0; between 0 and 1: a probability map; threshold it",
     label(MASK * np.float32(0.5)), label(MASK * np.float32(0.7) + 0.1)),
    # NaN for background became the lowest finite value, 1: everything was organ.
    (PAIRED, "labelsTr/a.nii.gz: values are; whole numbers from 0", label(np.where(MASK, 1, np.nan)),
     *(label(np.where(MASK, value, 0)) for value in (-1.0, 1.02, np.inf, -np.inf))),
    (f"{PAIRED}, train --label 99, data --label 99", "labelsTr/a.nii.gz; different values: this is no mask",
     label(SCAN)),
    ("train, data", "labelsTr/a.nii.gz; different values: this is no mask",
     [move("set/imagesTr", "x"), move("set/labelsTr", "set/imagesTr"), move("x", "set/labelsTr")]),
    (PAIRED, "labelsTr/a.nii.gz: 201 different values: this is no mask", label(np.uint8(ATLAS.clip(max=200)))),
    (PAIRED, "labelsTr/a.nii.gz: 216 different values: this is no mask; --label", label(ATLAS)),
    ("train, data", "labelsTr/a.nii.gz: every voxel is organ", label(MASK * 0 + 1), label(MASK + 1)),
    ("train", "set; foreground; --label; nothing to learn", labels(MASK * 0)),
    ("train --label 7", "set; foreground; --label [7]"),
    ("data", "labelsTr/a.nii.gz: no voxel is foreground; --label", label(MASK * 0)),
    # -- arguments
    ("train", "--folds 3: expected", remove(*SCANS[1:], *LABELS[1:])),  # one scan is left
    ("train --fold 3, train --fold -1, train --fold x", "--fold; expected 0 to 2"),
    ("train --folds 4, train --folds 1", "--folds; expected 2 to 3"),
    (", ".join(f"train --spacing {wrong}" for wrong in ("-1", "0", "nan", "inf", "x")), "--spacing"),
    ("train --dims 3 --patch 0 32 32", "--patch; 0: expected a number from 1"),
    ("train --size 7, train --dims 3 --size 7 7", "--size: expected"),
    ("train --size 4 4 --depth 3 --norm batch, train --size 7 7 --depth 3, train --size 4 4 --depth 2 --norm instance, "
     "train --depth 8 --width 1000 --size 32 32", "--size; lower --depth"),
    ("train --depth 30, train --depth -1", "--depth; from 0 to 8"),
    (f"train --seed {2**64}, train --seed -1", "--seed; from 0"),
    ("train --lr -1, train --lr nan", "--lr"),
    ("train --crop 6", "a.nii.gz; 12; 16; --crop 6"),
    ("train --device cuda:9, predict --device nonsense", "--device; use --device auto or cpu"),
    ("train --resume --out=", "--resume; --out"),
    ("train, predict, overlay", "out", put("out")),
    ("train", "cache", put("cache")),
    ("overlay --out a.txt", "--out a.txt: overlay writes .png"),
    ("score --out set/labelsTr, predict --out set/imagesTr, score --out ./set/../set/labelsTr, score --out link",
     "overwrite a scan or a label; another --out", link("set/labelsTr", "link")),
    ("score --held-out", "--held-out; x", checkpoint(split={"train": ["a"], "val": ["x"]})),
    # -- runs and checkpoints
    ("train", "out: holds a run; --resume; another --out", put("out/last.pt"), put("out/args.json")),
    (NETS, "last.pt; no such file", remove("last.pt")),
    (NETS, "last.pt; checkpoint; train.py", put("last.pt", b"garbage" * 99), changed(lambda c: c[:999], "last.pt"),
     plant(torch.save)({"state_dict": {}}, "last.pt")),  # another program's
    ("predict --checkpoint set/imagesTr/a.nii.gz", "a.nii.gz; checkpoint; train.py"),
    (NETS, "last.pt: checkpoint version is; train it anew", checkpoint(version=1), checkpoint(version=99, split=None)),
    (NETS, "last.pt; do not fit", checkpoint(network=NETWORK | {"width": 3}),
     checkpoint(network=NETWORK | {"width": 10**6, "depth": 8})),
    (NETS, "last.pt; holds code, posix.mkdir, which was not run: no checkpoint", checkpoint(model=Payload()),
     checkpoint(note=Payload())),
    ("train --resume", "out/last.pt; checkpoint; train.py", checkpoint("out/last.pt", note=Payload())),
]
NOTED = [  # the commands that meet it; pieces of the note; what is planted
    ("train, score, data", "a.nii.gz: 1 voxels are NaN or infinite; set to the lowest", scan(ONE_NAN)),
    ("data --label 1, train --label 1", "1 of 3 scans hold no voxel of label 1: a", label(MASK * 7)),
    ("score, data", "labelsTr/a.nii.gz; 1.0e-05 mm", label(MASK, shifted(1e-5))),
    ("score", "labelsTr/a.nii.gz; rounded", label(MASK * np.float32(1.00002))),
    (SETS, "set/imagesTr: 15 left out; no NIfTI files: IM_01: DICOM; dcm2niix",
     [*(put(f"set/imagesTr/{name}") for name in FORMATS), put("set/imagesTr/IM_01", DICOM), folder("set/imagesTr/x")]),
    ("train, data", "copies of one another: a, b;", copy(*SCANS[:2])),
    ("data", "copies of one another: b, c;", copy(*LABELS[1:])),
]
TAKEN = [  # the commands; what it is; what is planted
    ("train, predict, score, data, overlay, layers", "a sound set"),
    ("data, score", "hidden and other files", [put(f"set/{kind}Tr/{name}") for kind in ("images", "labels") for name in
     ("._a.nii.gz", "README.txt")] + [put("set/dataset.json", b'{"training": ["/etc/passwd"]}')]),
    ("data, train", "the other layout", [move(f"set/{kind}Tr", f"set/{kind}") for kind in ("images", "labels")]),
    ("score, data, train", "capital endings", rename("a", ending=".NII.GZ")),
    ("score, data", "nnU-Net's channel", [move(path, path.replace(".", "_0000.", 1)) for path in SCANS]),
    ("score, data", "no channel, but a number", rename("x_0000", "x_0001", "x_0002")),
    ("data, score", "one volume in 4D", [scan(SCAN[..., None]), label(MASK[..., None])]),
    ("data, score", "compressed in parts, and zeros after the end", changed(
        lambda c: gzip.compress(gzip.decompress(c)[:999]) + gzip.compress(gzip.decompress(c)[999:]) + bytes(99))),
    ("score, data", "NIfTI-2 of 64 bits, big-endian", put(SCANS[0], nib.Nifti2Image(SCAN, np.eye(4), dtype=np.int64)),
     put(SCANS[0], nib.Nifti1Image(SCAN, np.eye(4), nib.Nifti1Header(endianness=">")))),
    ("train --label 5, data --label 5 6", "an atlas", labels(ATLAS)),
    ("train, score", "one slice", [*(nifti(path, SCAN[..., 2:3]) for path in SCANS), *labels(MASK[..., 2:3])]),
    ("train --size 64 48", "slices smaller than --size"),
    ("score", "another spacing than in training", [make(array, np.diag([2, 3, 4, 1])) for make, array in
                                                   ((scan, SCAN), (label, MASK))]),
    ("predict", "a link in --out, which the mask replaces", [put("out/mine"), link("mine", "out/a.nii.gz")]),
]
NAMES = [("left atrium", "心" * 80, "l" * 248), ("-x", "100%s", "a.b")]
if sys.platform == "linux":  # names that other systems do not allow
    NAMES.append(("'\"`$(x);&", "two\n\33[2Jlines", "\udcff"))
    REFUSED += [(SETS, "A.nii.gz; a.nii.gz; same name", nifti("set/imagesTr/A.nii.gz", SCAN)),
                (SETS, "a\\nb.nii.gz: not a readable NIfTI file", [*rename("a\nb"), put("set/imagesTr/a\nb.nii.gz")])]
TAKEN += [("train, train --fold 1, train --fold 2, score, data", ascii(names)[:20], rename(*names)) for names in NAMES]


def each(table):
    """A case for each command, and for each of the things that are planted, of each row."""
    return [pytest.param(met_by, words.split("; "), plants if isinstance(plants, list) else [plants],
                         id=f"{met_by}: {words}")
            for commands, words, *planted in table for plants in planted or [[]] for met_by in commands.split(", ")]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a sound data set and a checkpoint, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visualize, "png", lambda figure: b"")  # pictures have tests of their own, and take time
    monkeypatch.setattr(visualize, "rgb", lambda figure: np.zeros((2, 2, 3), np.uint8))
    sow([*(nifti(path, SCAN) for path in SCANS), *labels(MASK), checkpoint()])
    yield tmp_path
    tracemalloc.stop()  # a test may have started it


def sow(plants):
    for plant in plants:
        plant()


def run(met_by):
    name, *flags = met_by.split()
    module, arguments, _ = COMMANDS[name]
    with warnings.catch_warnings():  # main() sets showwarning
        try:
            return module.main([*shlex.split(arguments), *flags])
        except (SystemExit, KeyboardInterrupt) as end:  # argparse's own; one that is not caught
            return getattr(end, "code", None)


def contents(root):
    """Everything but the cache, which may keep what is sound."""
    kept = (path for path in root.rglob("*") if path.relative_to(root).parts[0] != "cache")
    return {path: path.read_bytes() if path.is_file() else None for path in kept}


@pytest.mark.parametrize(("met_by", "words", "plants"), each(REFUSED))
def test_refused(met_by, words, plants, root, capsys):
    sow(plants)
    before = contents(root)
    tracemalloc.start()
    code, peak = run(met_by), tracemalloc.get_traced_memory()[1]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    if lines and lines[0].startswith("usage:"):  # argparse says how a command is used, then what was wrong
        lines = lines[-1:]
    if met_by.startswith("data"):  # the check finds all problems, a line for each
        lines = [line for line in lines if words[0] in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in out + err and peak < 1e8, (out, err)
    assert not [word for word in words if word not in lines[0]], lines
    script = f"{COMMANDS[met_by.split()[0]][0].__name__}.py: "
    assert err.startswith("usage:") or lines[0].startswith(script) and lines[0].isprintable(), lines
    assert contents(root) == before


@pytest.mark.parametrize(("met_by", "words", "plants"), each(NOTED + TAKEN))
def test_taken(met_by, words, plants, root, capsys):
    """The data stay as they are; no scan is left out; a mask is named as its label is, and lies on its scan."""
    sow(plants)
    before, code = contents(root / "set"), run(met_by)
    out, err = capsys.readouterr()
    assert code == 0 and COMMANDS[met_by.split()[0]][2] in out and contents(root / "set") == before, err
    assert all(line.isprintable() for line in (out + err).splitlines())
    noted = "; ".join(words) in [row[1] for row in NOTED]
    assert err.startswith("note: ") and all(word in err for word in words) if noted else err == "", err
    if met_by in ("predict", "score"):
        scans, masks = data.by_name(data.nifti_files(Path("set/imagesTr"))), list(Path("out").glob("*.nii.gz"))
        assert {path.name.lower() for path in masks} == {name.lower() for name in os.listdir("set/labelsTr")
                                                         if not name.startswith(("._", "README"))}
        for path in masks:
            mask, source = nib.load(path), nib.load(scans[path.name[:-7]])
            assert mask.shape == source.shape and np.array_equal(mask.affine, source.affine) and not path.is_symlink()


def test_the_check_finds_every_problem_and_no_other(root, capsys):
    sow([put(SCANS[0], b"x" * 999), nifti(LABELS[1], MASK * 0), nifti(LABELS[2], MASK, shifted(1e-5)),
         nifti(SCANS[2], SCAN * 0), nifti("set/imagesTr/d.nii", SCAN), nifti("set/labelsTr/e.nii", MASK)])
    assert run("data") == 2
    table, problems = capsys.readouterr()
    assert table.endswith("3 pairs, 5 problems\n") and "6 x 12 x 16 voxels of" in table
    for word in ("imagesTr: d: no file", "labelsTr: e: no file", "imagesTr/a.nii.gz: not",
                 "labelsTr/b.nii.gz: no voxel", "labelsTr/c.nii.gz: the affine", "imagesTr/c.nii.gz: every voxel is 0"):
        assert sum(word in line for line in problems.splitlines()) == 1, word


@pytest.mark.parametrize("command", ["data", "score"])
def test_ctrl_c_ends_with_one_line(command, root, capsys, monkeypatch):
    """It was a traceback."""
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "read_voxels", interrupted)
    assert run(command) == 130 and capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize("command", ["data", "score", "train --fold 2"])
def test_an_output_that_cannot_print_a_name_ends_nothing(command, root, monkeypatch):
    """ASCII, and some code pages of Windows: a UnicodeEncodeError, in training before anything was saved."""
    sow(rename("心"))  # the last name, so that fold 2 validates on it
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert run(command) == 0
