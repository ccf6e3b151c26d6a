"""docs/challenge.md: its lines of Python make a data set of the challenge's folders, and data.py finds no problem."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import data
import predict

TEXT = Path(__file__).resolve().parents[1].joinpath("docs", "challenge.md").read_text()
SNIPPET = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]


def test_the_snippet_turns_a_folder_a_patient_into_a_data_set(tmp_path, monkeypatch, capsys):
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

    assert len(SNIPPET.strip().splitlines()) <= 12
    exec(SNIPPET, {})
    assert data.main(["LA2018"]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("2 pairs, 0 problems\n") and told.err == ""
    (pair, _), scan = data.find_pairs("LA2018"), nib.load("LA2018/imagesTs/4URSJYI2QUH.nii.gz")
    assert pair.name == "0RZDK210BSMW" and nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    mask = data.read_mask(pair.label, data.read_scan(pair.image))
    assert mask.shape == (6, 12, 16) and mask.sum() == 4 * 5 * 5 and mask[1:5, 3:8, 4:9].all()
    assert list(predict.find_scans(["LA2018"])) == list(predict.find_scans(["LA2018/labelsTs"])) == ["4URSJYI2QUH"]
