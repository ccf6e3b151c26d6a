"""The loop: what a run leaves, that it learns, that it resumes to the bit, and that it survives bad steps."""

import csv
import json
import math
import re

import numpy as np
import pytest
import torch

import data
import predict
import train


def weights(path):
    return predict.load_checkpoint(path)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learning_rate_is_a_function_of_the_step():
    rates = [train.lr_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and rates[19] == 1 == max(rates)
    assert rates[:20] == sorted(rates[:20]) and rates[19:] == sorted(rates[19:], reverse=True)
    assert rates[60] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert {train.lr_at(step, 7, "constant") for step in range(7)} == {1}
    assert 0 < train.lr_at(0, 1) <= 1


def test_what_a_run_leaves(run_args, phantoms, tmp_path, capsys):
    args = train.parse_args([*run_args, "--augment", "seed"])
    result = train.train(args)
    out, shown = tmp_path / "run", capsys.readouterr().out
    left = {"last.pt", "best.pt", "log.csv", "split.json", "args.json", "validation.png", "curves.png", "worst.png"}
    assert {path.name for path in out.iterdir()} == left

    checkpoint = predict.load_checkpoint(out / "last.pt")
    assert checkpoint["epoch"] == 1 and checkpoint["version"] == predict.VERSION
    assert checkpoint["network"]["width"] == 4 and checkpoint["preprocess"]["axis"] == 2
    split = json.loads((out / "split.json").read_text())
    assert checkpoint["split"] == split and not set(split["train"]) & set(split["val"])
    assert len(split["val"]) == 2 and len(split["train"]) == 4
    assert json.loads((out / "args.json").read_text())["width"] == 4
    log = list(csv.DictReader((out / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in log] == ["0", "1"]
    assert all(math.isfinite(float(value)) for row in log for value in row.values())

    assert result["dice"] == pytest.approx(float(log[-1]["dice_mean"])) == np.mean(list(result["scans"].values()))
    assert set(result["scans"]) == set(split["val"]) and result["checkpoint"] == str(out / "last.pt")
    assert result["seconds"] > 0 and all(name in shown for name in split["val"])
    table = [line for line in shown.splitlines() if line.startswith("  ")]
    assert table[0].split() == ["scan", "Dice"] and len({len(line) for line in table}) == 1
    assert len(table) == 3 and table[1].split()[1] <= table[2].split()[1]  # the worst first
    assert f"predict.py {phantoms} --checkpoint {out}/last.pt" in shown
    events = list((tmp_path / "logs" / "run").glob("events*"))
    assert len(events) == 1 and b"dice/mean" in events[0].read_bytes() and b"validation" in events[0].read_bytes()


def test_predict_reproduces_the_validation_dice_from_files(run_args, phantoms, tmp_path):
    """The score printed by training is that of the masks on disk, read back: same scans, same grid, same threshold."""
    changes = ["--augment", "none", "--epochs", "3", "--batch-size", "2", "--width", "8"]
    result = train.train(train.parse_args([*run_args, *changes]))
    run = [str(phantoms), "--checkpoint", result["checkpoint"], "--out", str(tmp_path / "masks"), "--device", "cpu"]
    assert predict.main([*run, "--labels", str(phantoms / "labelsTr"), "--held-out", "--precision", "fp32"]) == 0
    rows = list(csv.DictReader((tmp_path / "masks" / "scores.csv").read_text().splitlines()))
    assert {row["name"]: float(row["dice"]) for row in rows} == result["scans"]
    assert max(result["scans"].values()) > 0


def test_two_epochs_and_two_more_equal_four_to_the_bit(run_args, tmp_path, monkeypatch):
    """With augmentation, schedule and 2 workers: stopped after 2 epochs and resumed, a run ends in the same weights."""
    arguments = [*run_args, "--augment", "full", "--workers", "2", "--epochs", "4"]
    train.train(train.parse_args([*arguments, "--out", str(tmp_path / "whole")]))

    calls, evaluate = [], train.evaluate

    def killed_in_the_third_epoch(*args):
        calls.append(args)
        if len(calls) == 3:
            raise SystemExit(130)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", killed_in_the_third_epoch)
    assert train.main([*arguments, "--out", str(tmp_path / "halves")]) == 130
    halfway = predict.load_checkpoint(tmp_path / "halves" / "last.pt")
    assert halfway["epoch"] == 1
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert train.main([*arguments, "--out", str(tmp_path / "halves"), "--resume"]) == 0

    whole, halves = (predict.load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "halves"))
    assert equal(whole["model"], halves["model"]) and not equal(whole["model"], halfway["model"])
    for key, state in whole["optimizer"]["state"].items():
        assert equal(state, halves["optimizer"]["state"][key])
    assert [row["train_loss"] for row in whole["log"]] == [row["train_loss"] for row in halves["log"]]
    assert equal(weights(tmp_path / "whole" / "best.pt"), weights(tmp_path / "halves" / "best.pt"))

    before = (tmp_path / "halves" / "last.pt").read_bytes()
    assert train.main([*arguments, "--out", str(tmp_path / "halves"), "--resume"]) == 0  # nothing is left to do
    assert (tmp_path / "halves" / "last.pt").read_bytes() == before


def test_seed_decides_and_workers_do_not(run_args, tmp_path):
    ends = []
    for i, changes in enumerate([[], ["--workers", "1"], ["--seed", "1"]]):
        run = [*run_args, "--augment", "full", "--epochs", "1", "--out", str(tmp_path / f"{i}"), *changes]
        ends.append(weights(train.train(train.parse_args(run))["checkpoint"]))
    assert equal(ends[0], ends[1]) and not equal(ends[0], ends[2])


def test_overfits_four_slices(run_args):
    """If four slices cannot be learnt by heart, nothing else can be."""
    run = [*run_args, "--overfit", "4", "--epochs", "8", "--width", "8"]
    result = train.train(train.parse_args(run))
    assert len(result["scans"]) == 4 and result["dice"] > 0.98


VOLUME = ["--dims", "3", "--patch", "12", "24", "24", "--batch-size", "2", "--spacing", "5"]


def test_volumes_are_the_same_run_with_dims_3(run_args, phantoms, tmp_path):
    """It learns, resumes to the bit, and predict.py finds the validation Dice again through the sliding window."""
    run = [*run_args, *VOLUME, "--augment", "seed", "--attention", "--epochs", "3", "--lr", "2e-2"]
    whole = train.train(train.parse_args([*run, "--out", str(tmp_path / "whole")]))
    assert whole["losses"][-1] < 0.8 * whole["losses"][0]
    checkpoint = predict.load_checkpoint(whole["checkpoint"])
    assert checkpoint["network"]["dims"] == 3 and checkpoint["preprocess"]["spacing"] == [5, 5, 5]
    masks = [str(phantoms), "--checkpoint", whole["checkpoint"], "--out", str(tmp_path / "masks"), "--device", "cpu"]
    assert predict.main([*masks, "--labels", str(phantoms / "labelsTr"), "--held-out", "--precision", "fp32"]) == 0
    rows = csv.DictReader((tmp_path / "masks" / "scores.csv").read_text().splitlines())
    assert {row["name"]: float(row["dice"]) for row in rows} == whole["scans"]


def test_neighbours_are_seen_in_training_and_in_prediction(run_args, phantoms, tmp_path):
    result = train.train(train.parse_args([*run_args, "--neighbours", "1", "--epochs", "1"]))
    assert predict.load_checkpoint(result["checkpoint"])["network"]["in_channels"] == 3
    run = [str(phantoms), "--checkpoint", result["checkpoint"], "--out", str(tmp_path / "masks")]
    assert predict.main([*run, "--held-out"]) == 0


def test_fold_all_trains_on_everything(run_args, tmp_path):
    result = train.train(train.parse_args([*run_args, "--fold", "all", "--limit-batches", "1"]))
    assert result["dice"] is None and result["scans"] == {}
    checkpoint = predict.load_checkpoint(tmp_path / "run" / "best.pt")
    assert len(checkpoint["split"]["train"]) == 6 and checkpoint["split"]["val"] == [] and checkpoint["epoch"] == 1


class Poisoned(data.SliceDataset):
    """Every fifth slice holds an infinite voxel."""

    def __getitem__(self, index):
        image, mask = super().__getitem__(index)
        if index % 5 == 0:
            image[0, 0, 0] = math.inf
        return image, mask


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(run_args, tmp_path, monkeypatch, capsys, precision):
    monkeypatch.setattr(data, "SliceDataset", Poisoned)
    run = [*run_args, "--norm", "none", "--batch-size", "2", "--epochs", "1", "--augment", "none"]
    train.train(train.parse_args([*run, "--precision", precision]))
    row = predict.load_checkpoint(tmp_path / "run" / "last.pt")["log"][0]
    steps = row["slices_per_second"] * row["seconds"] / 2
    assert 0 < row["skipped"] < steps and math.isfinite(row["train_loss"])
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run" / "last.pt").values())
    assert f"{row['skipped']} non-finite steps skipped" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["dice", "bce"])
@pytest.mark.parametrize("norm", ["none", "instance"])
def test_recipes_run(run_args, loss, norm):
    changes = ["--loss", loss, "--norm", norm, "--schedule", "constant", "--weight-decay", "0", "--clip", "0"]
    changes += ["--augment", "seed", "--normalise", "minmax", "--crop", "4", "--size", "40", "36", "--epochs", "1"]
    assert 0 <= train.train(train.parse_args([*run_args, *changes, "--limit-batches", "2"]))["dice"] <= 1


def test_a_folder_that_holds_a_run_is_not_overwritten(run_args, tmp_path, capsys):
    run = [*run_args, "--limit-batches", "1", "--augment", "none"]
    assert train.main(run) == 0
    before = (tmp_path / "run" / "last.pt").read_bytes()
    for changes, told in [([], "add --resume"), (["--resume", "--width", "8"], "--width 8: .* trained with 4")]:
        assert train.main([*run, *changes]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and re.search(told, error)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--epochs", "0"], "--epochs 0"),
        (["--fold", "first"], "--fold first"),
        (["--fold", "3"], "--fold 3: expected 0 to 2"),
        (["--folds", "9"], "--folds 9: expected 2 to 6"),
        (["--label", "7"], "no label file holds foreground"),
        (["--data", "/nowhere"], "/nowhere: not a folder"),
        (["--crop", "400"], "--crop 400"),
        (["--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_bad_arguments_end_in_one_line_and_exit_code_2(run_args, tmp_path, capsys, changes, told):
    try:
        code = train.main([*run_args, *changes])
    except SystemExit as end:  # argparse's own
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and told in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_phantom_is_a_data_set_of_its_own(run_args, tmp_path):
    run = [*run_args, "--data", "phantom", "--limit-batches", "1", "--epochs", "1", "--augment", "none"]
    assert train.train(train.parse_args(run))["dice"] is not None
    assert (tmp_path / "cache" / "phantom" / "dataset.json").exists()


@pytest.mark.slow
def test_compiled_network_saves_plain_names(run_args, tmp_path):
    train.train(train.parse_args([*run_args, "--compile", "--limit-batches", "2", "--epochs", "1"]))
    assert not [name for name in weights(tmp_path / "run" / "last.pt") if "_orig_mod" in name]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_learns_on_cuda(run_args, precision):
    changes = ["--device", "cuda", "--overfit", "4", "--epochs", "8", "--width", "8", "--precision", precision]
    assert train.train(train.parse_args([*run_args, *changes]))["dice"] > 0.95


def test_worst_shows_the_slice_with_the_most_wrong_pixels(run_args, tmp_path):
    """The fullest slice of a scan may be the one that went well."""
    run = train.prepare(train.parse_args(run_args))
    rows = train.evaluate(run.net, run.val_scans, run.recipe, run.precision, 8)
    for row, scan in zip(rows, run.val_scans, strict=True):
        wrong = (row["worst"][2] > 0.5) != row["worst"][1]
        assert wrong.sum() >= ((row["panel"][2] > 0.5) != row["panel"][1]).sum()
        assert row["panel"][1].sum() == max(scan.foreground)
