"""What the Markdown files say is true: their commands run, one after the other, as a newcomer types them.

In short form, on small phantoms laid out like Task02_Heart: scans to predict in imagesTs, hidden `._*` files, and
numbers that begin anywhere. Commands run in this process; those of torchrun are slow tests.
"""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data
import phantom
import predict
import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
SHORT = {
    "train": ["--limit-batches", "1", "--width", "4", "--depth", "2", "--epochs", "1", "--workers", "0"],
    "phantom": ["--scans", "5", "--size", "0.5"],
}


def commands(text):
    """The lines of the blocks of bash, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text.replace("\\\n", " "), re.S)
    return [" ".join(line.partition(" #")[0].split()) for block in blocks for line in block.splitlines()]


def python(text):
    """The one block of Python."""
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return block


@pytest.fixture(scope="module")
def heart(tmp_path_factory):
    """Five phantoms in the layout of the real data set, and with voxels as its: about cubes."""
    root = phantom.write_dataset(tmp_path_factory.mktemp("heart") / "Task02_Heart", scans=5, test=1, size=0.5)
    (root / "imagesTs" / "la_005.nii.gz").rename(root / "imagesTs" / "la_001.nii.gz")
    for folder in ("imagesTr", "labelsTr"):
        (root / folder / "la_001.nii.gz").rename(root / folder / "la_029.nii.gz")
        for path in (root / folder).iterdir():
            nib.save(nib.Nifti1Image(np.asanyarray(nib.load(path).dataobj), np.diag([2, 2, 2.5, 1])), path)
        (root / folder / "._la_003.nii.gz").write_bytes(b"Mac OS X")
    return root


def run(command, monkeypatch):
    """One command of a Markdown file, shortened, in this process and this folder."""
    python, script, *arguments = shlex.split(command)
    assert python == "python" and (ROOT / script).is_file(), command
    name = script.removesuffix(".py")
    with monkeypatch.context() as patch:
        patch.setattr("warnings.showwarning", None)  # main sets it
        try:
            code = importlib.import_module(name).main([*arguments, *SHORT.get(name, [])])
        except SystemExit as stop:
            code = stop.code
    assert not code, command


def test_commands_of_the_readme_run(heart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.raiseExceptions", False)  # Lightning's handler may hold an earlier test's stderr
    os.symlink(heart, "Task02_Heart")
    paths = {"SCAN": "Task02_Heart/imagesTr/la_000.nii.gz", "MASK": "masks/scored/la_000.nii.gz",
             "TRUTH": "Task02_Heart/labelsTr/la_000.nii.gz"}
    pictures = re.findall(r"^\| `(python visualize.py [^`]*)`", README, re.M)  # the table of them
    found = commands(README) + [re.sub("|".join(paths), lambda word: paths[word[0]], command) for command in pictures]
    assert len(found) >= 15
    for command in found:
        run(command, monkeypatch)
        told = capsys.readouterr()
        assert "Traceback" not in told.err and told.out, command
        if out := re.search(r"--out (\S+)", command):
            assert Path(out[1]).exists(), command
    exec(python(README), {})


@pytest.mark.slow
def test_commands_for_clusters_run(heart, tmp_path):
    for command in commands((ROOT / "docs" / "cluster.md").read_text()):
        words = command.replace("train.py", str(ROOT / "train.py")).replace("DATA", str(heart)).split()
        run = subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:], *SHORT["train"]],
                             cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stderr)


@pytest.mark.parametrize("path", ["README.md", "docs/cluster.md", "docs/challenge.md", "benchmarks/README.md"])
def test_every_flag_and_file_that_is_named_exists(path, capsys):
    text = (ROOT / path).read_text()
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    known = capsys.readouterr().out
    for words in re.findall(r"train\.py((?:[^\n`\\#]|\\\n)*)", text):
        assert not [flag for flag in re.findall(r"--[\w-]+", words) if flag not in known], words
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / path).parent.joinpath(link).exists(), link


def test_the_snippet_turns_a_folder_a_patient_into_a_data_set(tmp_path, monkeypatch, capsys):
    """docs/challenge.md, for the challenge's own layout: data.py finds no problem in what its Python makes."""
    sitk = pytest.importorskip("SimpleITK", reason="pip install SimpleITK")
    monkeypatch.chdir(tmp_path)
    rng, atrium = np.random.default_rng(0), np.zeros((6, 12, 16), np.uint8)
    atrium[1:5, 3:8, 4:9] = 255
    patients = ("Training Set/0RZDK210BSMW", "Training Set/1D7CUD1955YZ", "Testing Set/4URSJYI2QUH")
    for n, patient in enumerate(patients):
        Path(patient).mkdir(parents=True)
        for name, array in (("lgemri", np.uint8(rng.integers(0, 99, atrium.shape) + atrium // 2)), ("laendo", atrium)):
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((0.625, 0.625, 1.25))
            image.SetOrigin((-30.0 + n, 20.0, 5.0))
            sitk.WriteImage(image, f"{patient}/{name}.nrrd")
    Path("Training Set/desktop.ini").write_text("")  # is in the download
    assert data.main(["Training Set"]) == 2 and "docs/challenge.md" in capsys.readouterr().err

    exec(python((ROOT / "docs" / "challenge.md").read_text()), {})
    assert data.main(["LA2018"]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("2 pairs, 0 problems\n") and told.err == ""
    (pair, _), scan = data.find_pairs("LA2018"), nib.load("LA2018/imagesTs/4URSJYI2QUH.nii.gz")
    assert pair.name == "0RZDK210BSMW" and nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    mask = data.read_mask(pair.label, data.read_scan(pair.image))
    assert mask.shape == (6, 12, 16) and mask.sum() == 4 * 5 * 5 and mask[1:5, 3:8, 4:9].all()
    assert list(predict.find_scans(["LA2018"])) == list(predict.find_scans(["LA2018/labelsTs"])) == ["4URSJYI2QUH"]
