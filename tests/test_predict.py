"""Prediction: masks on the scans' own grid, checkpoints that are safe, scores from files."""

import argparse
import csv
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import predict
from data import DataError
from unet import UNet

PREPROCESS = {"axis": 2, "label": None, "spacing": [None, 1.0, 1.0], "crop": 0, "normalise": "zscore", "smooth": 0.0,
              "size": [40, 24]}


def oblique(spacing, degrees=17):
    """Affine of a scan stored LPS, tilted about two axes, with an offset."""
    a = np.deg2rad(degrees)
    tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = tilt @ turn @ np.diag([-1, -1, 1]) @ np.diag(spacing)
    affine[:3, 3] = [31.5, -12.25, 7]
    return affine


class Ideal(UNet):
    """An ideal network: bright voxels are the organ."""

    def forward(self, x):
        return super().forward(x) * 0 + (x - 1) * 20


@pytest.fixture
def checkpoint(tmp_path):
    def save(how=PREPROCESS, **changes):
        network = {"in_channels": 1, "out_channels": 1, "dims": 2, "width": 2, "depth": 2, "norm": "none"}
        content = {"version": predict.VERSION, "model": UNet(**network).state_dict(), "network": network,
                   "preprocess": how, "split": {"train": ["seen"], "val": ["kept"]}, "doubt_below": 0.0}
        torch.save(content | changes, tmp_path / "checkpoint.pt")
        return tmp_path / "checkpoint.pt"

    return save


@pytest.fixture
def scan_and_truth(tmp_path):
    """An odd-sized, oblique, LPS, anisotropic scan with a bright box, int16 with a slope; codes and units set."""
    mask = np.zeros((31, 27, 11), np.uint8)
    mask[9:20, 5:16, 3:8] = 1
    image = mask * np.int16(300) + np.arange(31, dtype=np.int16)[:, None, None] % 5
    image = nib.Nifti1Image(image, oblique((1.0, 1.0, 2.7)))
    image.header.set_slope_inter(2.0, -30)
    image.header["cal_max"], image.header["descrip"], image.header["aux_file"] = 900, "LGE of a patient", "patient.txt"
    image.header.set_intent("vector")  # a viewer then takes the mask for arrows
    image.header.set_dim_info(freq=0, phase=1, slice=2)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of the patient"))
    image.set_sform(image.affine, code=4)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    truth = nib.Nifti1Image(mask, image.affine)
    for folder, file in (("scans", image), ("labels", truth)):
        (tmp_path / folder).mkdir()
        nib.save(file, tmp_path / folder / "kept.nii.gz")
    return tmp_path / "scans" / "kept.nii.gz", mask


@pytest.mark.parametrize("how", [{}, {"axis": 0, "spacing": [None, 2.7, 1.0]}, {"crop": 2}])
def test_an_ideal_network_gives_back_the_truth(scan_and_truth, checkpoint, tmp_path, monkeypatch, how):
    """Whatever way a scan is stored, its mask has the same shape, affine and codes, and lies on the organ exactly."""
    scan, truth = scan_and_truth
    monkeypatch.setattr(predict, "UNet", Ideal)
    file = checkpoint(PREPROCESS | how)
    run = [str(scan), "--checkpoint", str(file), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict.main([*run, "--precision", "fp32", "--batch-size", "4"]) == 0
    source, written = nib.load(scan), nib.load(tmp_path / "out" / "kept.nii.gz")
    assert np.array_equal(np.asarray(written.dataobj), truth)
    assert written.get_data_dtype() == np.uint8 and written.shape == source.shape
    header = nib.Nifti1Header(gzip.decompress((tmp_path / "out" / "kept.nii.gz").read_bytes())[:348])
    says = {"scl_slope": 1, "scl_inter": 0, "cal_min": 0, "cal_max": 1, "intent_code": 0, "aux_file": b"",
            "descrip": b"mask: 1 is the organ", "dim_info": 0, "vox_offset": 352}  # no extension
    assert {field: header[field] for field in says} == says
    assert np.array_equal(written.affine, source.affine)
    for field in ("qform_code", "sform_code", "xyzt_units", "pixdim"):
        assert np.array_equal(written.header[field], source.header[field]), field
    assert os.listdir(tmp_path / "out") == ["kept.nii.gz"]


def test_a_scan_of_another_spacing_is_resampled_and_comes_back(scan_and_truth, checkpoint, tmp_path, monkeypatch):
    scan, truth = scan_and_truth
    monkeypatch.setattr(predict, "UNet", Ideal)
    seen = []
    volume = predict.predict_volume
    monkeypatch.setattr(predict, "predict_volume", lambda net, v, **o: seen.append(v.shape) or volume(net, v, **o))
    file = checkpoint(PREPROCESS | {"spacing": [None, 0.5, 0.5]})
    assert predict.main([str(scan), "--checkpoint", str(file), "--out", str(tmp_path / "out")]) == 0
    assert seen == [(11, 54, 62)]  # twice the pixels: the network was trained on 0.5 mm
    mask = np.asarray(nib.load(tmp_path / "out" / "kept.nii.gz").dataobj)
    assert mask.shape == truth.shape and 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.95


def test_scores_from_files(scan_and_truth, checkpoint, tmp_path, monkeypatch, capsys):
    scan, truth = scan_and_truth
    monkeypatch.setattr(predict, "UNet", Ideal)
    run = [str(tmp_path / "scans"), "--checkpoint", str(checkpoint()), "--out", str(tmp_path / "out")]
    assert predict.main([*run, "--labels", str(tmp_path / "labels"), "--held-out"]) == 0
    assert "dice     1.0000 (SD 0.0000, 1.0000 to 1.0000)" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines())
    assert row["name"] == "kept" and float(row["dice"]) == 1 and float(row["hd95"]) == 0
    assert float(row["truth_ml"]) == pytest.approx(truth.sum() * 2.7 / 1000)


def test_scores_of_training_scans_are_flagged(scan_and_truth, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "UNet", Ideal)
    file = checkpoint(split={"train": ["kept"], "val": []})
    run = [str(tmp_path / "scans"), "--checkpoint", str(file), "--out", str(tmp_path / "out")]
    assert predict.main([*run, "--labels", str(tmp_path / "labels")]) == 0
    assert "1 of 1 scans have names that the network was trained on" in capsys.readouterr().err
    assert predict.main([*run, "--held-out"]) == 2


def test_a_network_is_given_slices_of_the_size_of_its_training_alone(monkeypatch):
    """Small ones are padded, over large ones a window moves: with other borders it lost a point of Dice."""
    torch.manual_seed(0)
    net, volume = UNet(width=2, depth=1, norm="none").eval(), np.random.default_rng(0).normal(size=(3, 6, 9))
    padded = np.pad(volume, ((0, 0), (2, 2), (0, 0))).astype(np.float32)
    expected = predict.predict_volume(net, padded)[:, 2:-2]
    assert np.array_equal(predict.predict_volume(net, volume, size=(10, 9)), expected)
    assert not np.allclose(predict.predict_volume(net, volume), expected)
    seen, batch = set(), predict.predict_batch
    monkeypatch.setattr(predict, "predict_batch", lambda net, x, *more: seen.add(x.shape[1:]) or batch(net, x, *more))
    assert predict.predict_volume(net, volume, size=(4, 5)).shape == volume.shape and seen == {(4, 5)}


class Pointwise(torch.nn.Conv3d):
    """A network that sees one voxel at a time: whatever the window, its answer is the same."""

    dims, in_channels, memory_format = 3, 1, torch.channels_last_3d

    def predict(self, x):
        return torch.sigmoid(self(x))


def test_windows_leave_no_trace_in_a_pointwise_network():
    torch.manual_seed(0)
    net, volume = Pointwise(1, 1, 1), np.random.default_rng(0).normal(size=(9, 14, 11)).astype(np.float32)
    whole = predict.predict_volume(net, volume, size=volume.shape)
    assert np.array_equal(predict.predict_volume(net, volume), whole)  # without a size: one window
    for size in ((4, 4, 4), (9, 5, 3), (2, 14, 16), (12, 20, 20)):
        assert np.allclose(predict.predict_volume(net, volume, size=size), whole, atol=1e-6), size


def test_windows_overlap_by_half_and_the_middle_counts_most():
    starts, volume = [], np.arange(12, dtype=np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)

    def first_voxel(windows):  # the window's number, everywhere in the window
        starts.extend(windows[:, 0, 0, 0])
        return np.broadcast_to(windows[:, :1, :1, :1], windows.shape)

    told = predict.sliding_window(first_voxel, volume, (4, 2, 2))
    assert starts == [0, 2, 4, 6, 8]
    assert told[0, 0, 0] == 0 and told[11, 0, 0] == 8  # seen by one window
    assert abs(told[5, 0, 0] - 4) < 0.1  # voxel 5 is second in the window of 4 and last in that of 2


def test_batch_size_changes_memory_not_the_result():
    net, volume = UNet(width=2, depth=1).eval(), np.random.default_rng(0).normal(size=(7, 6, 8)).astype(np.float32)
    assert np.allclose(*(predict.predict_volume(net, volume, batch_size=n) for n in (1, 3)), atol=1e-6)


def test_largest_component():
    mask = np.zeros((4, 6, 6), bool)
    mask[0, 0, :2] = mask[2:, 2:4, 2:4] = True
    kept = predict.largest_component(mask)
    assert kept.sum() == 8 and not kept[0].any() and kept.dtype == bool
    assert not predict.largest_component(np.zeros((2, 2, 2), bool)).any()


def test_summary_begins_with_the_worst_and_counts_failures_apart():
    rows = [{"name": "good", "dice": 0.9, "jaccard": 0.8, "hd95": 2.0, "assd": 1.0},
            {"name": "a_long_name", "dice": 0.0, "jaccard": 0.0, "hd95": np.inf, "assd": np.inf}]
    lines = predict.summarise(rows).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["scan", "a_long_name", "good"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "dice     0.4500 (SD 0.4500, 0.0000 to 0.9000)" in lines
    assert "hd95     2.0000 (SD 0.0000, 2.0000 to 2.0000)" in lines
    assert lines[-1] == "1 scans with one mask empty are left out of the distances"
    predict.summarise(rows).encode("ascii")  # some terminals can print no more


def test_the_bar_says_how_many_scans_and_how_long(scan_and_truth, checkpoint, tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    scan, out = scan_and_truth[0], str(tmp_path / "out")
    for name in "ab":
        shutil.copy(scan, scan.with_name(f"{name}.nii.gz"))
    assert predict.main([str(scan.parent), "--checkpoint", str(checkpoint()), "--out", out, "--device", "cpu"]) == 0
    assert re.search(r"predicting 3 of 3 scans, 00:00 left \|.*\|", terminal.getvalue())


def test_precision_of_a_gpu_on_a_cpu_is_refused(scan_and_truth, checkpoint, tmp_path, capsys):
    run = [str(scan_and_truth[0]), "--checkpoint", str(checkpoint()), "--out", str(tmp_path / "out")]
    assert predict.main([*run, "--precision", "fp16", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("predict.py: --precision fp16: needs a CUDA GPU")


def test_runs_without_imgaug_and_opencv(scan_and_truth, checkpoint, tmp_path):
    """A clinic's server needs neither: importing either here would raise."""
    blocked = "raise ImportError('not installed')"
    for name in ("imgaug", "cv2"):
        (tmp_path / f"{name}.py").write_text(blocked)
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(Path(predict.__file__)), str(scan_and_truth[0]), "--checkpoint", str(checkpoint()),
               "--out", str(tmp_path / "out"), "--labels", str(tmp_path / "labels")]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "scores.csv").exists()


def test_the_root_of_a_data_set_gives_new_scans_or_those_with_labels(tmp_path, write_nifti):
    """With labels to score against, the scans of `imagesTs`, which have none, are not meant."""
    for name in ("imagesTs/new", "imagesTr/old"):
        write_nifti(tmp_path / f"{name}.nii.gz", np.zeros((2, 2, 2), np.uint8))
    single = write_nifti(tmp_path / "single.NII", np.zeros((2, 2, 2), np.uint8))
    assert list(predict.find_scans([str(single), str(tmp_path)])) == ["single", "new"]
    assert list(predict.find_scans([str(tmp_path)], labelled=True)) == ["old"]


def test_devices_and_precision():
    assert predict.pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert predict.pick_precision("auto", torch.device("mps")) == torch.float32
    assert predict.pick_device("cpu").type == "cpu"
    with pytest.raises(DataError, match="--device nonsense"):
        predict.pick_device("nonsense")


@pytest.mark.parametrize(("below", "doubtful"), [(0.0, False), (1.1, True)])
def test_a_mask_is_called_doubtful_where_its_confidence_is_lower_than_in_validation(
        checkpoint, write_nifti, tmp_path, capsys, below, doubtful):
    scan = write_nifti(tmp_path / "set" / "a.nii.gz", np.kron(np.eye(4), np.ones((10, 10)))[..., None].repeat(4, 2))
    (row,) = predict.predict(predict.parse_args([
        str(scan), "--checkpoint", str(checkpoint(doubt_below=below)), "--out", str(tmp_path / "masks"), "--device",
        "cpu", "--precision", "fp32"]))
    assert ("a: doubtful, confidence" in capsys.readouterr().out) == doubtful and 0 <= row["confidence"] <= 1


def test_confidence_by_hand():
    probability = np.float32([[0.2, 0.6], [0.8, 0.5]])
    assert predict.confidence(probability) == pytest.approx(0.7) and predict.confidence(probability * 0.1) == 0


def test_neighbouring_slices_speak_for_one_that_was_spoilt():
    """Six equal slices and one of noise: averaged over the neighbours its mask comes near theirs, and theirs stay."""
    torch.manual_seed(0)
    rng, net = np.random.default_rng(0), UNet(width=4, depth=1)
    volume = np.repeat(rng.normal(size=(1, 16, 16)), 7, axis=0).astype(np.float32)
    volume[3] = rng.normal(size=(16, 16))
    alone, averaged = (predict.predict_volume(net, volume, smooth=smooth) for smooth in (0, 1.5))
    spoilt, mended, beside = (np.abs(slice_ - alone[0]).mean() for slice_ in (alone[3], averaged[3], averaged[0]))
    assert np.allclose(alone[0], alone[6]) and mended < spoilt / 2 and beside < spoilt / 4



def test_namespace_of_the_command_is_enough(scan_and_truth, checkpoint, tmp_path):
    """`predict(args)` can be called from other code with what the parser gives."""
    args = argparse.Namespace(scans=[str(scan_and_truth[0])], checkpoint=str(checkpoint()), out=str(tmp_path / "o"),
                              labels=None, held_out=False, largest_component=True, batch_size=2, device="cpu",
                              precision="fp32")
    (row,) = predict.predict(args)
    assert row["name"] == "kept" and row["mask"] == str(tmp_path / "o" / "kept.nii.gz") and row.keys() == {
        "name", "mask", "confidence"}
    assert isinstance(data.read_scan(tmp_path / "o" / "kept.nii.gz"), data.Scan)
