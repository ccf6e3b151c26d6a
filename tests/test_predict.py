"""Prediction: masks on the scans' own grid, checkpoints that are safe, scores from files."""

import csv
import gzip
import io
import os
import re
import sys
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import HOW, TINY, checkpoint
from scipy.spatial.transform import Rotation

import predict
from metrics import dice
from unet import UNet


class Ideal(UNet):
    """An ideal network, which sees one voxel at a time: bright ones are the organ."""

    def forward(self, x):
        return super().forward(x) * 0 + (x - 1) * 20


@pytest.fixture
def truth(tmp_path):
    """The mask of scans/kept.nii.gz: odd-sized, tilted about two axes, LPS, anisotropic, int16 with a slope, with a
    bright box, and codes and units set."""
    mask = np.zeros((31, 27, 11), np.uint8)
    mask[9:20, 5:16, 3:8] = 1
    mask[24:28, 20:24, 4:8] = 1  # apart from it, and kept: nobody asked for the largest component alone
    turned = Rotation.from_euler("xz", (17, 17), degrees=True).as_matrix()
    affine = nib.affines.from_matvec(turned @ np.diag([-1, -1, 2.7]), [31.5, -12.25, 7])
    image = nib.Nifti1Image(mask * np.int16(300) + np.arange(31, dtype=np.int16)[:, None, None] % 5, affine)
    image.header.set_slope_inter(2.0, -30)
    image.header["cal_max"], image.header["descrip"], image.header["aux_file"] = 900, "LGE of a patient", "patient.txt"
    image.header.set_intent("vector")  # a viewer then takes the mask for arrows
    image.header.set_dim_info(freq=0, phase=1, slice=2)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of the patient"))
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    for folder, file in (("scans", image), ("labels", nib.Nifti1Image(mask, affine))):
        (tmp_path / folder).mkdir()
        nib.save(file, tmp_path / folder / "kept.nii.gz")
    return mask


@pytest.fixture
def job(truth, tmp_path, monkeypatch):
    """The command for the folder of scans with an ideal network, other content of its checkpoint, and further words."""
    monkeypatch.setattr(predict, "UNet", Ideal)

    def command(*more, how=HOW, **changes):
        content = checkpoint(how=how | {"size": [40, 24]}, split={"train": ["seen"], "val": ["kept"]})
        torch.save(content | changes, file := tmp_path / "checkpoint.pt")
        words = [tmp_path / "scans", "--checkpoint", file, "--out", tmp_path / "out", "--device", "cpu", *more]
        return [*map(str, words), "--precision", "fp32"]

    return command


@pytest.mark.parametrize(("how", "least"), [
    ({}, 1), ({"axis": 0, "spacing": [None, 2.7, 1.0]}, 1), ({"crop": 2}, 1), ({"spacing": [None, 0.5, 0.5]}, 0.95),
])
def test_an_ideal_network_gives_back_the_truth(job, truth, tmp_path, how, least):
    """Whatever way a scan is stored, its mask has the same shape, affine and codes, and lies on the organ: exactly,
    where it was not resampled."""
    assert predict.main(job("--batch-size", 4, how=HOW | how)) == 0
    assert os.listdir(tmp_path / "out") == ["kept.nii.gz"]
    source, written = (nib.load(tmp_path / folder / "kept.nii.gz") for folder in ("scans", "out"))
    assert least <= dice(np.asarray(written.dataobj) == 1, truth == 1) and written.get_data_dtype() == np.uint8
    assert written.shape == source.shape and np.array_equal(written.affine, source.affine)
    for field in ("qform_code", "sform_code", "xyzt_units", "pixdim"):
        assert np.array_equal(written.header[field], source.header[field]), field
    header = nib.Nifti1Header(gzip.decompress((tmp_path / "out" / "kept.nii.gz").read_bytes())[:348])
    says = {"scl_slope": 1, "scl_inter": 0, "cal_min": 0, "cal_max": 1, "intent_code": 0, "aux_file": b"",
            "dim_info": 0, "vox_offset": 352}  # no extension
    assert {field: header[field] for field in says} == says
    assert header["descrip"].item().startswith(b"mask: 1 is the organ; ")


def test_scores_a_bar_and_a_note_where_scans_were_trained_on(job, truth, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    (tmp_path / "labels" / "other.nii.gz").write_bytes(b"damaged, but of no scan here")
    assert predict.main(job("--labels", tmp_path / "labels", "--held-out")) == 0
    assert "dice     1.0000 (SD 0.0000, 1.0000 to 1.0000)" in capsys.readouterr().out
    assert re.search(r"predicting 1 of 1 scans, 00:00 left \|.*\|", terminal.getvalue())
    (row,) = csv.DictReader((tmp_path / "out" / "scores.csv").open())
    assert row["name"] == "kept" and float(row["dice"]) == 1 and float(row["hd95"]) == 0
    assert float(row["truth_ml"]) == pytest.approx(truth.sum() * 2.7 / 1000)
    note = "the network was trained on 1 of these 1 scans: "
    assert note not in terminal.getvalue()
    # By its name; and numbered anew, by its content: held out, the name said.
    sums = {"seen": [zlib.crc32((tmp_path / "scans/kept.nii.gz").read_bytes()), 0]}
    for n, changes in enumerate(({"split": {"train": ["kept"], "val": []}}, {"files": sums}), start=1):
        assert predict.main(job("--labels", tmp_path / "labels", *["--held-out"][: n - 1], **changes)) == 0
        assert terminal.getvalue().count(note) == n
    assert predict.main(job("--held-out", split={"train": [], "val": ["kept", "gone"]})) == 0
    assert "note: 1 of the 2 scans that the run kept are here" in terminal.getvalue()
    path = tmp_path / "labels" / "kept.nii.gz"  # what breaks off leaves no scores beside other masks than theirs
    path.write_bytes(path.read_bytes()[:-4])
    assert predict.main(job("--labels", tmp_path / "labels", "--held-out")) == 2
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_a_mask_that_was_corrected_by_hand_or_is_of_another_patient_is_not_replaced(job, tmp_path, capsys):
    """A program that keeps the header made it pass for ours; and scans of two patients may have one name."""
    scan, path = tmp_path / "scans" / "kept.nii.gz", tmp_path / "out" / "kept.nii.gz"
    for _ in range(2):
        assert predict.main(job()) == 0
    mask = nib.load(path)
    for edited, output in ((mask, path), (nib.load(scan), scan)):
        before, voxels = output.read_bytes(), np.asarray(edited.dataobj).copy()
        voxels[0, 0, 0] = 1
        nib.save(nib.Nifti1Image(voxels, edited.affine, edited.header), output)
        there = path.read_bytes()
        assert predict.main(job()) == 2 and f"did not write it so of {scan}" in capsys.readouterr().err
        assert path.read_bytes() == there
        output.write_bytes(before)


@pytest.mark.parametrize("below", [0.0, 1.1, np.nan])
def test_a_mask_is_called_doubtful_where_its_confidence_is_lower_than_in_validation(job, tmp_path, capsys, below,
                                                                                  monkeypatch):
    """After a validation that could not say how sure it was, none is. A row has these keys."""
    (row,) = predict.predict(predict.parse_args(job("--largest-component", doubt_below=below)))
    assert ("kept: doubtful, confidence" in capsys.readouterr().out) == (below == 1.1)
    assert row == {"name": "kept", "mask": str(tmp_path / "out" / "kept.nii.gz"), "confidence": row["confidence"]}
    assert 0 <= row["confidence"] <= 1 and Path(row["mask"]).exists()
    monkeypatch.setattr(Ideal, "forward", lambda self, x: x * 0 - 20)
    predict.predict(predict.parse_args(job(doubt_below=below)))
    assert "kept: empty" in capsys.readouterr().out


def test_the_root_of_a_data_set_gives_new_scans_or_those_with_labels(tmp_path, write_nifti):
    """With labels to score against, the scans of `imagesTs`, which have none, are not meant."""
    for name in ("imagesTs/new.nii.gz", "imagesTr/old.nii.gz", "single.NII"):
        write_nifti(tmp_path / name, np.zeros((2, 2, 2), np.uint8))
    with pytest.warns(UserWarning, match="its own scans are left out, those of imagesTs/ are taken"):
        assert list(predict.find_scans([str(tmp_path / "single.NII"), str(tmp_path)])) == ["single", "new"]
    (tmp_path / "single.NII").unlink()
    assert list(predict.find_scans([str(tmp_path)], labelled=True)) == ["old"]
    # A patient numbered 0000, alone, was taken for nnU-Net's channel of that number.
    path = str(write_nifti(tmp_path / "p_0000.nii", np.zeros((2, 2, 2), np.uint8)))
    assert [list(predict.find_scans([path], known=known)) for known in ((), ["p_0000"])] == [["p"], ["p_0000"]]


def test_precision():
    assert predict.pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert predict.pick_precision("auto", torch.device("mps")) == torch.float32


def volume_of(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_network_is_given_slices_of_the_size_of_its_training_alone(monkeypatch):
    """Small ones are padded, over large ones a window moves: with other borders it lost a point of Dice."""
    torch.manual_seed(0)
    net, volume = UNet(width=2, depth=1, norm="none").eval(), volume_of(7, 6, 9)
    expected = predict.predict_volume(net, np.pad(volume, ((0, 0), (2, 2), (0, 0))))[:, 2:-2]
    assert np.array_equal(predict.predict_volume(net, volume, size=(10, 9)), expected)
    whole = predict.predict_volume(net, volume)
    assert not np.allclose(whole, expected)
    assert np.allclose(whole, predict.predict_volume(net, volume, batch_size=3), atol=1e-6)  # which is about memory
    seen, batch = set(), predict.predict_batch
    monkeypatch.setattr(predict, "predict_batch", lambda net, x, *more: seen.add(x.shape) or batch(net, x, *more))
    assert predict.predict_volume(net, volume, size=(4, 5), batch_size=3).shape == volume.shape
    assert {shape[1:] for shape in seen} == {(4, 5)} and max(shape[0] for shape in seen) == 3


def test_networks_of_one_checkpoint_share_nothing_and_a_second_mask_is_not_dropped():
    """Trained on, one changed the other, and the checkpoint."""
    kept = checkpoint(TINY | {"out_channels": 2})
    places = [{tensor.data_ptr() for tensor in weights.values()} for weights in (
        kept["model"], *(predict.load_network(kept).state_dict() for _ in range(2)))]
    assert len(set.union(*places)) == sum(map(len, places))
    with pytest.raises(ValueError, match="reshape"):
        predict.predict_volume(predict.load_network(kept), volume_of(3, 8, 8))


def test_windows_leave_no_trace_where_a_network_sees_one_voxel_at_a_time():
    net, volume = Ideal(width=1, depth=0, dims=3, norm="none"), volume_of(9, 14, 11)
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


@pytest.mark.parametrize("between", [1.5, 3.0])
def test_slices_are_averaged_over_mm_whatever_lies_between_them(write_nifti, tmp_path, between):
    """One is bright: from slice to slice its probability falls as a Gaussian of 1.5 mm does. Equal ones stay."""
    array, net = np.zeros((8, 6, 11), np.float32), Ideal(width=2, depth=1, norm="none")
    array[..., 5] = 1
    scan = write_nifti(tmp_path / "a.nii.gz", array, np.diag([1, 1, between, 1]))
    how = HOW | {"smooth": 1.5, "size": [6, 8]}
    _, probability = predict.predict_scan(scan, net, how, torch.float32, 16)
    assert np.allclose(probability[[4, 6]] / probability[5], np.exp(-0.5 * (between / 1.5) ** 2), rtol=1e-4)
    assert np.allclose(predict.predict_volume(net, np.ones((4, 6, 8)), smooth=1.5), 0.5)


def test_largest_component_and_confidence_by_hand():
    mask = np.zeros((4, 6, 6), bool)
    mask[0, 0, :2] = mask[2:, 2:4, 2:4] = True
    kept = predict.largest_component(mask)
    assert kept.sum() == 8 and not kept[0].any() and kept.dtype == bool
    assert not predict.largest_component(np.zeros((2, 2, 2), bool)).any()
    probability = np.float32([[0.2, 0.6], [0.8, 0.5]])
    assert predict.confidence(probability) == pytest.approx(0.7) and predict.confidence(probability * 0.1) == 0


def test_summary_begins_with_the_worst_and_counts_failures_apart():
    rows = [{"name": "good", "dice": 0.9, "jaccard": 0.8, "hd95": 2.0, "assd": 1.0},
            {"name": "a_long_name", "dice": 0.0, "jaccard": 0.0, "hd95": np.inf, "assd": np.inf}]
    lines = predict.summarise(rows).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["scan", "a_long_name", "good"]
    assert len({len(line) for line in lines[:3]}) == 1 and all(line.isascii() for line in lines)
    assert "dice     0.4500 (SD 0.4500, 0.0000 to 0.9000)" in lines
    assert "hd95     2.0000 (SD 0.0000, 2.0000 to 2.0000)" in lines
    assert lines[-1] == "1 scans with one mask empty are left out of the distances"
