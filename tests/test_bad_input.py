"""Bad input: whatever is planted, one line says which file or flag, what is wrong and what to do; nothing is written.

Refused: exit code 2, one line on stderr, no traceback, no memory taken. Noted: exit code 0, and a note of what was
changed or looks wrong. Taken: exit code 0, and not a word. The tables are also the list of what a data set may hold.
"""

import gzip
import io
import os
import shutil
import sys
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import nibabel as nib
import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  the optimiser does so, and traced it would take long
from conftest import TINY, checkpoint

import data
import predict
import train
import visualize

SCANS, LABELS = ([f"set/{folder}/{name}.nii.gz" for name in "abc"] for folder in ("imagesTr", "labelsTr"))
A, LABEL = SCANS[0], LABELS[0]
COMMANDS = {  # in the folder of the test; the last: what a command says of a sound set
    "train": (train, "--data set --cache cache --tensorboard logs --out out --dims 2 --width 2 --depth 1 --stem 1 "
                     "--epochs 1 --folds 3 --batch-size 2 --limit-batches 1 --workers 0 --augment none --device cpu "
                     "--precision fp32", "2 scans to train on, 1 to validate on"),
    "predict": (predict, "set/imagesTr --checkpoint last.pt --out out --device cpu", "3 masks in out"),
    "score": (predict, "set/imagesTr --checkpoint last.pt --out out --device cpu --labels set/labelsTr", "3 masks in"),
    "data": (data, "set", "3 pairs, 0 problems"),
    "overlay": (visualize, f"overlay {A} {LABEL} --out out/a.png", "out/a.png"),
    "layers": (visualize, f"layers last.pt {SCANS[1]} --out out/a.png", "out/a.png"),
    "show": (visualize, "overlay --out out/a.png", ""),
}
ALL, PAIRED = "train, predict, data, overlay", "train, score, data, overlay"  # what reads a scan, and its label,
SETS, NETS = "train, data, predict", "predict, layers"  # a folder of scans, a checkpoint

MASK = np.zeros((16, 12, 6), np.uint8)  # of a file's array; 6 axial slices
MASK[4:9, 3:8, 1:5] = 1
TWO = np.uint8([1, 1, 2, 2, 2, 2])  # by slice
SCAN = (np.random.default_rng(0).normal(100, 20, MASK.shape) + 80 * MASK).astype(np.int16)
# Of one organ a column is a third: many values, but most voxels are as their neighbour.
ATLAS = np.int16(np.arange(16)[:, None, None] // 6 + 3 * np.arange(72).reshape(12, 6))
FORMATS = "x.nrrd x.nhdr x.MHA x.mhd x.hdr x.img x.mgz x.mgh x.dcm x.nii.bz2 x.nii.xz x.nii.zip x.nii.zst"
FOREIGN = dict.fromkeys(FORMATS.split(), b"") | {"IM_01": bytes(128) + b"DICM"}
ZEROS = gzip.compress(bytes(2**24)) * 60  # 1 MB that unpacks to 1 GB


def sow(plants):
    """Names in the folder of a sound data set, and what is there then: bytes, an image or its array, a link (Path),
    what another name held (str), nothing (None). Headers say where they lie, so that no two are copies."""
    for name, content in plants.items():
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Path):
            path.symlink_to(content)
        elif isinstance(content, str):
            Path(content).rename(path)
        elif content is not None:
            file = image(content) if isinstance(content, np.ndarray) else content
            file.header["descrip"] = name
            nib.save(file, path)


def image(array, spacing=(1, 1, 1), shift=0, units=0):
    file = nib.Nifti1Image(array, nib.affines.from_matvec(np.diag(np.float64(spacing)), [shift, 0, 0]))
    file.header["xyzt_units"] = units
    return file


def header(*shape, more=b"", **fields):
    """A scan whose header says what its voxels are not: the bytes are changed, since nibabel would not write it."""
    head = nib.Nifti1Header(PLAIN[:348])
    for field, value in (fields | {"dim": [3, *(shape or MASK.shape), 1, 1, 1, 1]}).items():
        head[field] = value
    return gzip.compress(head.binaryblock + PLAIN[348:]) + more


def rename(*names, ending=".nii.gz"):
    """Scans and labels a, b, c, called otherwise."""
    return {f"set/{kind}/{new}{ending}": f"set/{kind}/{old}.nii.gz" for kind in ("imagesTr", "labelsTr")
            for old, new in zip("abc", names, strict=False)}


def saved(content=None, **changes):
    torch.save(content or checkpoint() | changes, file := io.BytesIO())
    return file.getvalue()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


NUMBERS = {"label": "0", "spacing": "0 nan inf", "depth": "-1 30", "seed": f"-1 {2**64}", "lr": "-1 nan", "size": "0"}
PLAIN = image(SCAN).to_bytes()
SOUND, OTHER_SUM = gzip.compress(PLAIN), gzip.compress(PLAIN)[:-8] + b"1234" + gzip.compress(PLAIN)[-4:]
# The commands that meet it; pieces of the line; what is planted, each alone: where no names are given, in place of the
# file with which the line begins.
REFUSED = [
    # -- folders and names
    ("train, data", "set: not a folder; imagesTr/ and labelsTr/", {"set": None}, {"set": b""}),
    ("predict", "set/imagesTr: No such file", {"set": None}),
    (SETS, "imagesTr: holds no .nii or .nii.gz file, but nothing", dict.fromkeys(SCANS)),
    (SETS, "imagesTr: holds no .nii or; but a.nrrd; convert", dict.fromkeys(SCANS) | {"set/imagesTr/a.nrrd": b""}),
    ("train, data", "set: holds imagesTr; expected; labelsTr/", {"set/labelsTr": None}),
    ("score", "set/labelsTr: No such file", {"set/labelsTr": None}),
    ("train", "imagesTr: b, c: no file of; in labelsTr/; add it; labelsTr: a: no file of; in imagesTr/",
     {A: None, LABELS[1]: None, LABELS[2]: None}),
    ("score", "labelsTr: no label for b", {LABELS[1]: None}),
    (SETS, "a.nii.gz; same name; rename", {"set/imagesTr/a.nii": SCAN}),
    ("train, data", "set/imagesTr: x_0000, x_0001: several channels of a patient; of one number only",
     {f"set/{name}.nii.gz": SCAN for name in ("imagesTr/x_0000", "imagesTr/x_0001", "labelsTr/x")}),
    # -- files that are damaged, or no scan; each is read to its end, wherever it is read
    (ALL, f"{A}: damaged (CRC check failed); copy it again", OTHER_SUM),
    (ALL, f"{A}: damaged (; copy it again", SOUND[:900] + bytes([SOUND[900] ^ 4]) + SOUND[901:], SOUND[:-1] + b"1",
     SOUND + b"1", SOUND[:700], SOUND + gzip.compress(b"")[:-6], gzip.compress(PLAIN + b"1"), header(16, 12, 60)),
    (ALL, f"{A}: not a readable NIfTI file; export it", gzip.compress(b"garbage" * 999), b"", Path("../../last.pt")),
    (ALL, f"{A}: ", Path("."), Path("../annex/a"), header(-16, 12, 6), header(vox_offset=-1e18)),
    (ALL, f"{A}: its header claims", header(32767, 32767, 32767), header(2000, 2000, 2000, more=ZEROS),
     header(vox_offset=2e9), header(vox_offset=2e9, more=ZEROS)),
    (ALL, f"{A}: shape is (16, 12; one volume", SCAN[..., 0], np.stack([SCAN, SCAN], -1)),
    (ALL, f"{A}: voxels are; integers or floats", SCAN * 1j, np.zeros((4, 4, 4), [(c, "u1") for c in "RGB"])),
    (ALL, f"{A}: a voxel is; mm; correct the affine (metres? microns? two axes alike?)", header(srow_x=0, srow_y=0),
     header(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), header(srow_x=np.nan),
     image(SCAN, [1e-3, 1e-3, 3e-3], units=1), image(SCAN, [1e3, 1e3, 3e3], units=3)),
    (ALL, f"{A}: voxels are 2.4e; scale them to", header(scl_slope=1e38), SCAN * 1e300, SCAN * 1e-50),
    (ALL, f"{A}: no voxel is finite; export it again", SCAN * np.float32(np.nan)),
    (SETS, "a.nii: its header claims; copy it", {A: None, A[:-3]: PLAIN + b"1"}),
    (SETS, f"{A}: every voxel is 7; scan", SCAN * 0 + 7),
    (SETS, f"{SCANS[2]}: shape is (16, 12, 6, 2); one volume", np.stack([SCAN, SCAN], -1)),
    ("show set", "set: a folder; docs/challenge.md"),
    ("show x.gii", "x.gii: it is a GiftiImage; export it as NIfTI", {"x.gii": nib.gifti.GiftiImage().to_bytes()}),
    ("show x.nrrd, show x.nhdr, show x.MHA, show x.mhd", "NRRD or MetaImage; 3D Slicer or SimpleITK", FOREIGN),
    ("show x.hdr, show x.img, show x.mgz, show x.mgh", "Analyze or FreeSurfer's; mri_convert", FOREIGN),
    ("show x.dcm, show IM_01", "DICOM; dcm2niix", FOREIGN),
    ("show x.nii.bz2, show x.nii.xz, show x.nii.zip, show x.nii.zst", "compressed; bunzip2, unxz, unzip or", FOREIGN),
    # -- labels
    (PAIRED, f"{LABEL}: damaged (CRC check failed); copy it again", OTHER_SUM),
    (PAIRED, f"{LABEL}: shape is (15, 12, 6); must be equal", MASK[:-1]),
    (PAIRED, f"{LABEL}: the affine differs; mm; resample", *(image(MASK, shift=shift) for shift in (5, 0.1, np.nan))),
    (PAIRED, f"{LABEL}: values are 0; between 0 and 1: a probability map; threshold it", MASK * 0.5, 0.1 + MASK * 0.7),
    (PAIRED, f"{LABEL}: values are; whole numbers from 0", np.where(MASK, 1, np.nan),  # NaN became 1: all was organ
     *(np.where(MASK, value, 0) for value in (-1.0, 1.02, np.inf, -np.inf))),
    (PAIRED, f"{LABEL}: ; different values: this is no mask; --label", SCAN, ATLAS, np.uint8(ATLAS.clip(max=200))),
    ("train --label 99, data --label 99", f"{LABEL}: ; different values: this is no mask", SCAN),
    ("train, data", f"{LABEL}: every voxel is organ", MASK * 0 + 1, MASK * 0 + 3),
    ("train --label 7", "set; foreground; --label [7]; nothing to learn", {}, dict.fromkeys(LABELS, MASK * 0)),
    ("train", "slices are 12 x 1 voxels; --axis", dict.fromkeys(SCANS, SCAN[5:6]) | dict.fromkeys(LABELS, MASK[5:6])),
    ("data --label 7", "labelsTr/a.nii.gz: no voxel is foreground; --label", {}, {SCANS[1]: b"x" * 999}),
    # -- arguments
    ("train --fold 3, train --fold -1, train --fold x", "--fold; expected 0 to 2"),
    ("train --folds 4, train --folds 1", "--folds; expected 2 to 3"),
    *((f"train --{flag} {value}", f"argument --{flag}; {value}: expected a number from")
      for flag, values in NUMBERS.items() for value in values.split()),
    ("train", "--folds 3: expected", dict.fromkeys(SCANS[1:] + LABELS[1:])),  # one scan is left
    ("train --size 7, train --dims 3 --size 7 7", "--size: expected two numbers, H W, or in 3D three"),
    ("train --size 7 7 --depth 3, train --size 4 4 --depth 2, train --depth 8 --width 1000 --size 32 32",
     "--size; lower --depth"),
    ("train --crop 6", "a.nii.gz; 12; 16; --crop 6"),
    ("predict --batch-size 0", "--batch-size 0: expected at least 1"),
    ("train --device cuda:9, predict --device nonsense", "--device; use --device auto or cpu"),
    ("train --augment full, train --augment geometry", "--augment none; apt-get install libgl1"),
    ("train --resume --out=", "--resume; --out"),
    ("train, predict, overlay", "out", {"out": b""}),
    ("train", "cache", {"cache": b""}),
    ("score --out set/labelsTr, predict --out set/imagesTr, score --out ./set/../set/labelsTr, score --out link",
     "overwrite a scan or a label; another --out", {"link": Path("set/labelsTr")}),
    ("predict", "out/a.nii.gz: not a readable", {"out/mine": b"", "out/a.nii.gz": Path("mine")}),  # a link
    ("predict --out set/labelsTr", "labelsTr/a.nii.gz: was there before; another --out"),  # of labels drawn by hand
    ("score", "out/scores.csv: was there before, and predict.py did not write it", {"out/scores.csv": b"name,dice"}),
    ("overlay --label 0", "--label 0: expected values from 1"),
    ("score --held-out", "--held-out; x", {"last.pt": saved(split={"train": ["a"], "val": ["x"]})}),
    # -- runs and checkpoints
    ("train", "out: holds a run; --resume; another --out", {"out/args.json": b""}, {"out/log.csv": b"mine"}),
    (NETS, "last.pt: no such file", None),
    (NETS, "last.pt: ; checkpoint; train.py", b"garbage" * 99, saved()[:999], saved({"state_dict": {}})),
    (NETS, "last.pt: checkpoint version is; train it anew", saved(version=1), saved(version=99, split=None)),
    (NETS, "last.pt: ; do not fit", saved(network=TINY | {"width": 3}), saved(network=TINY | {"width": 10**6})),
    (NETS, "last.pt: holds code, posix.mkdir, which was not run: no", saved(model=Payload()), saved(note=Payload())),
]
NOTED = [  # the commands that meet it; pieces of the note; what is planted
    ("data --label 1 9, train --label 1 9", "1 of 3 scans hold no voxel of label 1 or 9: a; --label 1 9: 9 is in no",
     {LABEL: MASK * 7}),
    ("score", "a: its label holds no voxel of the organ", {LABEL: MASK * 0}),
    ("data, train, score, overlay", "labels hold the values 1, 2: taken for one organ; --label", {LABEL: MASK * TWO}),
    ("overlay --label 9", "labelsTr/a.nii.gz: holds no voxel of label 9"),
    ("predict", "note: out holds masks that were there before: ~.nii.gz", {"out/~.nii.gz": MASK}),
    ("score, data", "labelsTr/a.nii.gz; 1.0e-05 mm", {LABEL: image(MASK, shift=1e-5)}),
    ("predict", f"{A}: its header gives no orientation; a guess", header(sform_code=0, qform_code=0)),
    ("predict", f"{A}: its header says voxels of 1 x 1 x 1 mm, its affine 1.4 x 1.11803 x 1; the affine is taken; "
     "not at right angles; mm and ml", header(srow_x=[1.4, 0.5, 0, 0])),
    ("predict", "out/scores.csv was there before: it is not of these masks", {"out/scores.csv": b""}),
    ("predict --held-out", "another file than the run's, but for the name: a", {"last.pt": saved(
        split={"train": [], "val": ["a", "b", "c"]}, files={"a": [1, 1]})}),
    ("train, predict, score", f"{A}: a voxel is 3 x 3 x 3 mm (D H W); times the usual one; is its header wrong?",
     dict.fromkeys((A, LABEL), None) | {A: image(SCAN, [3] * 3), LABEL: image(MASK, [3] * 3)}),
    ("train --crop 5, train --crop 3", "--crop; the organ reaches the border of what is left of a, b, c",
     dict.fromkeys(LABELS, MASK[::-1])),
    ("predict", "x_0001: if these are second channels of a patient; leave them out", rename("x_0000", "x_0001")),
    ("train --resume", "out: holds no last.pt to go on from; the run begins anew", {"out/log.csv": b""}),
    (SETS, "set/imagesTr: 15 left out; no NIfTI files: IM_01: DICOM; dcm2niix",
     {f"set/imagesTr/{name}": content for name, content in FOREIGN.items()} | {"set/imagesTr/x": Path(".")}),
    ("train, data", "copies of one another: a, b;", dict.fromkeys(SCANS[:2], SOUND)),
    ("train, data", "patients with several scans: p1_x, p1_y; keep one", rename("p1_x", "p1_y", "p2_x")),
    ("data", "copies of one another: b, c;", dict.fromkeys(LABELS[1:], gzip.compress(image(MASK).to_bytes()))),
]
TAKEN = [  # the commands; what it is; what is planted
    ("train, predict, score, data, overlay, layers", "a sound set"),
    ("data, score", "hidden and other files", {f"set/{kind}Tr/{name}": b"" for kind in ("images", "labels")
     for name in ("._a.nii.gz", "README.txt")} | {"set/dataset.json": b'{"training": ["/etc/passwd"]}'}),
    ("score, data, train", "capital endings", rename("a", ending=".NII.GZ")),
    ("score, data", "nnU-Net's channel", {path.replace(".", "_0000.", 1): path for path in SCANS}),
    ("predict", "a name that the run knew", rename("a_0000", "b_0000", "c_0000")
     | {"last.pt": saved(files={"a_0000": [0, 0]})}),
    ("score, data", "no channel, but a number", rename("x_0000", "x_0001", "x_0002")),
    ("data, score", "one volume in 4D", {A: SCAN[..., None], LABEL: MASK[..., None]}),
    ("data, score", "in parts, zeros at the end", {A: gzip.compress(PLAIN[:9]) + gzip.compress(PLAIN[9:]) + bytes(99)}),
    ("score, data", "NIfTI-2 of 64 bits, big-endian", {A: nib.Nifti2Image(SCAN, np.eye(4), dtype=np.int64)},
     {A: nib.Nifti1Image(SCAN, np.eye(4), nib.Nifti1Header(endianness=">"))}),
    ("train --label 5, data --label 5 6", "an atlas", dict.fromkeys(LABELS, ATLAS)),
    ("train, score", "one slice", dict.fromkeys(SCANS, SCAN[..., 2:3]) | dict.fromkeys(LABELS, MASK[..., 2:3])),
]
NAMES = [("left atrium", "心" * 80, "l" * 248), ("-x", "100%s", "a.b")]
if sys.platform == "linux":  # names that other systems do not allow
    NAMES.append(("'\"`$(x);&", "two\n\33[2Jlines", "\udcff"))
    REFUSED += [(SETS, "A.nii.gz; a.nii.gz; same name", {"set/imagesTr/A.nii.gz": SCAN}),
                (SETS, "a\\nb.nii.gz: not a readable", rename("a\nb") | {A: None, "set/imagesTr/a\nb.nii.gz": b""})]
TAKEN += [("train, train --fold 1, train --fold 2, score, data", ascii(names)[:20], rename(*names)) for names in NAMES]


def each(table):
    """A case for each command, and for each of the things that are planted, of each row."""
    for commands, words, *planted in table:
        for met_by, plants in product(commands.split(", "), planted or [{}]):
            plants = plants if isinstance(plants, dict) else {words.partition(":")[0]: plants}
            yield pytest.param(met_by, words.split("; "), plants, id=f"{met_by}: {words}")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A command in a folder with a sound data set and a checkpoint: exit code, and what is printed on a screen that
    knows ASCII alone. Other names ended a run, and it was lost."""
    def command(met_by):
        name, *flags = met_by.split()
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")
        try:
            code = COMMANDS[name][0].main([*COMMANDS[name][1].split(), *flags])
        except SystemExit as end:  # argparse's own
            code = end.code
        return code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visualize, "png", lambda figure: b"")  # pictures have tests of their own, and take time
    monkeypatch.setattr(visualize, "rgb", lambda figure: np.zeros((2, 2, 3), np.uint8))
    monkeypatch.setitem(sys.modules, "cv2", None)  # as on a server without libGL.so.1: only to augment is it needed
    data.pipeline.cache_clear()
    sow({**dict.fromkeys(SCANS, SCAN), **dict.fromkeys(LABELS, MASK), "last.pt": saved()})
    return command


def contents(folder):
    """Everything but the cache, which may keep what is sound."""
    return {path: path.is_file() and path.read_bytes() for path in Path(folder).rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize(("met_by", "words", "plants"), list(each(REFUSED)))
def test_refused(met_by, words, plants, run, traced):
    sow(plants)
    before = contents(".")
    (code, out, err), peak = run(met_by), traced()
    usage = err.startswith("usage:")  # argparse says how a command is used, then what was wrong
    lines = err.splitlines()[-1:] if usage else err.splitlines()
    if met_by.startswith("data"):  # the check finds all problems, a line for each
        lines = [line for line in lines if words[0] in line]
    assert code == 2 and len(lines) == 1 and "Traceback" not in out + err and peak < 1e8, (out, err)
    assert not [word for word in words if word not in lines[0]], lines
    script = COMMANDS[met_by.split()[0]][0].__name__
    assert usage or lines[0].startswith(f"{script}.py: ") and lines[0].isprintable(), lines
    assert contents(".") == before


@pytest.mark.parametrize(("met_by", "words", "plants"), list(each(NOTED + TAKEN)))
def test_taken(met_by, words, plants, run):
    """The data stay as they are; no scan is left out; a mask is named as its label is, and lies on its scan."""
    sow(plants)
    before = contents("set")
    code, out, err = run(met_by)
    assert code == 0 and COMMANDS[met_by.split()[0]][2] in out and contents("set") == before, err
    assert all(line.isprintable() for line in (out + err).splitlines())
    if "; ".join(words) in [row[1] for row in NOTED]:
        assert err.startswith("note: ") and all(word in out + err for word in words), err
    else:
        assert err == ""
    if met_by in ("predict", "score"):
        files = [sorted(Path(name).glob("[!.~]*.[gG][zZ]")) for name in ("out", "set/labelsTr", "set/imagesTr")]
        for mask, label, scan in zip(*files, strict=True):
            written, source = nib.load(mask), nib.load(scan)
            assert mask.name.lower() == label.name.lower()
            assert written.shape == source.shape and np.array_equal(written.affine, source.affine)


def test_the_check_finds_every_problem_and_no_other(run):
    sow({A: b"x" * 999, LABELS[1]: MASK * 0, LABELS[2]: image(MASK, shift=1e-5), SCANS[2]: SCAN * 0,
         "set/imagesTr/d.nii": SCAN, "set/labelsTr/e.nii": MASK})
    code, table, problems = run("data")
    assert code == 2 and table.endswith("3 pairs, 5 problems\n") and "6 x 12 x 16 voxels of" in table
    for word in ("imagesTr: d: no file", "labelsTr: e: no file", "imagesTr/a.nii.gz: not",
                 "labelsTr/b.nii.gz: no voxel", "labelsTr/c.nii.gz: the affine", "imagesTr/c.nii.gz: every voxel is 0"):
        assert sum(word in line for line in problems.splitlines()) == 1, word


def test_ctrl_c_ends_with_one_line(run, monkeypatch):
    monkeypatch.setattr(data, "read_voxels", Mock(side_effect=KeyboardInterrupt))
    for command in ("data", "score"):
        code, _, err = run(command)
        assert code == 130 and err.strip().count("\n") == 0
