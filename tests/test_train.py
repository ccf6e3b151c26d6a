"""The loop: what a run leaves, that it learns, that it goes on to the bit, and what it refuses."""

import csv
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import same, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_twins import VOLUME, check_validation, for_each_engine, run

import data
import predict
import train
from losses import BCEDiceLoss, DiceLoss


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_learning_rate_by_hand():
    """Ten steps: two up, the rest down along half a cosine."""
    rates = [train.lr_at(step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1, 1] and rates[6] == pytest.approx(0.5)
    assert rates[4] == pytest.approx(0.853553, abs=1e-6) and rates[9] == pytest.approx(0.038060, abs=1e-6)
    assert train.lr_at(0, 1) == train.lr_at(3, 20) == train.lr_at(3, 7, "constant") == 1
    with pytest.raises(ValueError, match="Constant.*choose"):  # was taken for "onecycle"
        train.lr_at(3, 7, "Constant")


@pytest.mark.parametrize(("confidences", "below"), [
    ([0.9, 0.8, 0.7], 0.636701), ([0.9, 0, 0.8, 0.7, 0], 0.636701), ([0.9, 0, 0.8], np.nan), ([], np.nan),
])
def test_doubt_begins_two_deviations_below_the_scans_in_which_something_was_found(confidences, below):
    """Of an empty mask the confidence is 0, and three scans are the least: with fewer nothing is called doubtful."""
    rows = [{"name": f"{i}", "dice": 0.5, "confidence": value} for i, value in enumerate(confidences)]
    assert train.scores_to_keep(rows)["doubt_below"] == pytest.approx(below, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_have_names(processes):
    kinds = {"dice": DiceLoss, "bce": torch.nn.BCEWithLogitsLoss, "bce_dice": BCEDiceLoss}
    assert {name: type(train.make_loss(name, processes)) for name in train.LOSSES} == kinds


@pytest.mark.parametrize(("apart", "slices", "changes", "dims", "stem"), [
    (3, 16, "", 2, 4), (3, 6, "--spacing 1.2", 2, 2), (3, 6, "--dims 3", 3, 2), (3, 6, "--stem 1", 2, 1),
    (0.92, 16, "", 2, 4), (0.88, 16, "", 3, 4), (0.88, 15, "", 2, 4), (0.88, 16, "--dims 2", 2, 4),
    (0.88, 16, "--spacing 1.2", 3, 2), (3, 6, "--crop 40", 2, 1), (0.88, 16, "--size 32 32", 2, 4),
    (3, 6, "--size 16 32 32", 3, 2),
])
def test_what_the_voxels_decide(write_nifti, tmp_path, monkeypatch, apart, slices, changes, dims, stem):
    """Of 0.6 x 0.6 mm, and `apart` from slice to slice: slices, or patches where voxels are about cubes, and not few.
    Fine ones enter in larger blocks, where there are 64 of them; in 3D the coarsest side counts. Slices are averaged
    over mm, whatever --spacing makes of pixels. A batch is one that all processes can share."""
    monkeypatch.setenv("WORLD_SIZE", "7")
    squares = np.kron(np.eye(14), np.ones((10, 10)))[..., None].repeat(slices, axis=2).astype(np.int16)
    for name, kind in product(("a", "b"), ("images", "labels")):
        write_nifti(tmp_path / kind / f"{name}.nii.gz", squares, np.diag([0.6, 0.6, apart, 1]))
    command = f"--data {tmp_path} --cache {tmp_path}/cache --folds 2 --depth 1 {changes}"
    args = train.parse_args(command.split())
    *_, kept = train.load_data(args)
    how, again = kept["preprocess"], train.parse_args(command.split())
    assert (args.dims, args.stem) == (dims, stem) and all(length % (2 * stem) == 0 for length in how["size"])
    assert how["smooth"] == (0 if dims == 3 else 1.5) and len(how["size"]) == dims
    assert args.batch_size % 7 == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.load_data(again, kept | {"args": vars(args)})  # when it goes on
    assert vars(again) == vars(args)


def test_validation_takes_a_bounded_time(quick, monkeypatch):
    """Of scans that are too large to score them all after each epoch, every second; the split keeps them all."""
    args = train.parse_args([*quick, "--folds", "2"])
    _, scans, kept = train.load_data(args)
    voxels = sum(scan.open("mask").size for scan in scans)
    monkeypatch.setattr(train, "VALIDATED", voxels // 2 + 1)
    with pytest.warns(UserWarning, match="one scan in 2 of 3.*--held-out scores them all"):
        assert train.load_data(args)[1:] == (scans[::2], kept)


@pytest.mark.parametrize(("changes", "chosen"), [
    ("--size 8 24 24 --stem 1 --depth 2", "fp32"),  # depths 8, 4, 2
    ("--size 7 24 24 --stem 2 --depth 1", "fp32"),  # padded to 8: 4, 2
    ("--size 9 24 24 --stem 2 --depth 2", "fp32"),  # padded to 16: 8, 4, 2
    ("--size 12 24 24 --stem 1 --depth 2", "bf16"),  # 12, 6, 3
])
def test_on_a_cpu_no_level_of_depth_two_is_trained_in_bfloat16(quick, monkeypatch, capsys, changes, chosen):
    """PyTorch's gradient of a 3D convolution is wrong there. The choice is told, and kept with the arguments."""
    monkeypatch.setattr(predict, "pick_precision", lambda *_: torch.bfloat16)
    prepared = train.prepare(train.parse_args([*quick, *VOLUME, *changes.split(), "--precision", "auto"]))
    name = {"fp32": "float32", "bf16": "bfloat16"}[chosen]
    assert prepared.args.precision == chosen and prepared.precision == getattr(torch, name)
    assert f"parameters, {name}" in capsys.readouterr().out


@pytest.mark.parametrize(("cores", "cpu", "cuda"), [(1, 0, 0), (2, 2, 1), (4, 4, 3), (8, 8, 7), (64, 8, 32)])
def test_workers_and_threads_share_the_cores(monkeypatch, cores, cpu, cuda):
    """The threads take all cores, beside a GPU one; `--workers` wins."""
    threads = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(data, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    cases = [("cpu", [], (cpu, cores)), ("cpu", ["--workers", "0"], (0, cores)), ("cuda", [], (cuda, 1))]
    for device, flags, expected in cases:
        workers = train.share_cores(train.parse_args(["--data", "", *flags]), torch.device(device))
        assert (workers, threads[-1]) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no taskset")
def test_cores_that_others_may_not_use_are_not_counted():
    code = "import os, data; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); assert data.cpu_count() == 1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(train.__file__).parent)


def test_what_a_run_leaves(run_args, tmp_path, capsys):
    """Files, log, TensorBoard and screen; and in this process nothing: no signal handler, no filter, no variable."""
    def here():
        handlers, seed = list(map(signal.getsignal, signal.valid_signals())), np.random.get_state()[1].tolist()
        return handlers, warnings.filters[:], warnings.showwarning, sys.excepthook, dict(os.environ), os.getcwd(), seed

    import torch._dynamo  # noqa: F401  the optimiser imports it, and with it sympy, which sets a filter

    before = here()
    result = run(*run_args, "--steps", 2, "--augment", "none")
    assert here() == before
    (shown, errors), out = capsys.readouterr(), tmp_path / "run"
    assert errors == "" and shown.isascii() and result["out"] == str(out)  # progress bars are for terminals
    assert sorted(os.listdir(out)) == ["args.json", "best.pt", "curves.png", "last.pt", "log.csv", "split.json",
                                       "validation.png"]
    start = json.loads((out / "args.json").read_text())
    assert start == result["args"] | {"machine": result["machine"]} and start["lr"] == 4e-3
    # Versions, hardware, how long, and how to go on: all that somebody who reads a pasted log asks for.
    assert all(line in shown for line in (*result["machine"].values(), "min left, until", "--held-out"))
    assert torch.__version__ in start["machine"]["versions"] and "GB" in start["machine"]["device"]
    split = {"train": ["la_001", "la_002", "la_004", "la_005"], "val": ["la_000", "la_003"]}
    assert result["split"] == json.loads((out / "split.json").read_text()) == split

    log, scores, last = result["log"], list(result["scans"].values()), result["log"][-1]
    assert list(result["scans"]) == split["val"] and last["val/dice_worst"] == min(scores)
    assert [last["val/dice"], last["val/dice_std"]] == pytest.approx([np.mean(scores), np.std(scores)])
    # Against an all-black prediction: the share of organ in truth and prediction, also on the screen.
    masks = [data.read_mask(pair.label, data.read_scan(pair.image)) for pair in data.find_pairs(run_args[1])[::3]]
    truth = sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
    called = last["val/foreground_prediction"]
    assert last["val/foreground_truth"] == pytest.approx(truth) and 0 <= called <= 1
    assert f"called organ {100 * called:.2f} % of the voxels (truth {100 * truth:.2f} %)" in shown

    for n, (row, told) in enumerate(zip(log, csv.DictReader((out / "log.csv").open()), strict=True), start=1):
        assert {name: float(value) for name, value in told.items()} == pytest.approx({"epoch": n} | row, nan_ok=True)
    (folder,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == set(last)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (n, pytest.approx(row["train/loss"])) for n, row in enumerate(log, start=1)]
    assert [image.step for image in events.Images("validation")] == [1, 2]


def test_arguments_serve_for_another_data_set(quick):
    """What is chosen by the voxels was filled in, and held for the next data set, too."""
    args = train.parse_args([*quick, "--precision", "auto"])
    before = dict(vars(args))
    assert train.train(args)["args"] != before == vars(args)


@pytest.mark.parametrize("more", [[], VOLUME])
def test_predict_finds_the_validation_dice_again_from_files(quick, phantoms, tmp_path, more):
    run(*quick, *more, "--attention", "--lr", 2e-2, "--augment", "geometry")
    check_validation(tmp_path / "run", phantoms, tmp_path / "masks")


def test_seed_decides_and_workers_do_not(quick, tmp_path):
    one, workers, seed = (run(*quick, "--epochs", 1, "--out", tmp_path / f"{change}", *change)["model"]
                          for change in ([], ["--workers", 1], ["--seed", 1]))
    assert same(one, workers) and not same(one, seed)


def test_it_overfits_one_scan(quick, capsys):
    """If one scan cannot be learnt by heart, nothing else can be. It is not held out, and no command says so."""
    changes = "--steps 7 --overfit 1 --fold all --epochs 32 --width 8 --batch-size 2 --lr 1e-2 --label 1"
    result = run(*quick, *changes.split())
    first, *_, last = result["log"]
    assert {type(value) for value in last.values()} == {int, float}  # a numpy number made last.pt unreadable
    assert last["val/dice"] > 0.8 and last["train/loss"] < 0.4 * first["train/loss"]
    assert result["split"] == {"train": ["la_000"], "val": []}  # predict.py said that it had learnt the others, too
    shown = capsys.readouterr().out
    assert "\nla_000 " in shown and "predict.py" in shown and "--held-out" not in shown
    assert ".html --label 1\n" in shown  # else the movie would score all labels


@pytest.mark.parametrize("loss", sorted(train.LOSSES.keys() - {"bce"}))
def test_it_learns_the_phantom(quick, loss):
    """A floor for scans that were never seen; what is called organ is about as much as there is. Cross-entropy alone is
    left out: few voxels are organ, and after so few steps it still calls none so (Dice 0)."""
    changes = "--steps 14 --epochs 12 --width 8 --batch-size 4 --lr 1e-2 --augment none --loss"
    row = run(*quick, *changes.split(), loss)["log"][-1]
    assert row["val/dice"] > 0.6 and 0.5 < row["val/foreground_prediction"] / row["val/foreground_truth"] < 2


def test_every_scan_can_be_trained_on_with_the_first_recipe(quick, tmp_path):
    """Without validation the last epoch is the best."""
    old = "--stem 1 --norm none --loss bce --schedule constant --weight-decay 0 --clip 0 --normalise minmax --crop 4"
    for job in for_each_engine([*quick, *old.split(), "--fold", "all", "--augment", "geometry"], tmp_path):
        result = run(*job)
        assert len(result["split"]["train"]) == 6 and result["split"]["val"] == [] == list(result["scans"])
        assert same(weights(Path(result["out"], "best.pt")), result["model"])


def test_best_is_the_first_epoch_of_the_highest_dice_for_both_engines(quick, tmp_path, monkeypatch):
    scores, gather_rows = [0.2, 0.4, 0.4, 0.3], train.gather_rows
    for job in for_each_engine([*quick, "--epochs", "4"], tmp_path):
        told = iter(scores)
        monkeypatch.setattr(train, "gather_rows", lambda rows, told=told: [gather_rows(rows)[0] | {"dice": next(told)}])
        best = predict.load_checkpoint(Path(run(*job)["out"], "best.pt"))
        assert [row["val/dice"] for row in best["log"]] == scores[:2]


@pytest.mark.parametrize(("steps", "rounds"), [(3, 1), (20, 3)])
def test_an_epoch_has_its_steps_however_many_slices_there_are(quick, steps, rounds):
    """58 slices, 8 a step: where they do not suffice each comes as often as the others, augmented otherwise."""
    prepared = train.prepare(train.parse_args([*quick, "--steps", str(steps), "--epochs", "1"]))
    train.fit_loop(prepared)
    (taken,) = {int(state["step"]) for state in prepared.optimizer.state.values()}
    dataset, seen = prepared.loader.dataset, set(list(prepared.loader.sampler)[: 8 * steps])
    assert taken == steps and len(seen) == 8 * steps and len(dataset) == rounds * len(dataset.table)
    again = 5 + (rounds - 1) * len(dataset.table)
    assert torch.equal(dataset[5][0], dataset[again][0]) == (rounds == 1)
    dataset.augment = data.augmenter("none")
    assert torch.equal(dataset[5][0], dataset[again][0])


@pytest.mark.slow
def test_compiled_network_saves_plain_names(quick):
    result = run(*quick, "--compile")
    assert not [name for name in result["model"] if "_orig_mod" in name] and result["log"][1]["train/skipped"] == 0


@pytest.mark.slow
def test_memory_and_open_files_stay_flat(quick, monkeypatch):
    """Pictures at every epoch: nothing of one stays. The last three quarters of the run are looked at."""
    monkeypatch.undo()
    samples, write_log = [], train.write_log

    def sample(*args):
        write_log(*args)
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
        samples.append((resident, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(train, "write_log", sample)
    run(*quick, "--epochs", 40)
    memory, files = zip(*samples[10:], strict=True)
    assert max(memory) - memory[0] < 8 and max(files) == min(files)


def refuse(capsys, job, told):
    """Exit code 2 and one line on stderr, which holds `told`."""
    capsys.readouterr()
    assert train.main([*map(str, job)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error, error


def test_resume_is_refused_where_arguments_or_data_are_others(quick, tmp_path, monkeypatch, capsys):
    """And then nothing in the folder has changed; but epochs may grow, and device, workers and paths may differ."""
    run(*quick)
    out = tmp_path / "run"
    before = snapshot(out)
    refuse(capsys, quick, "add --resume")
    for name, value in ("width", 8), ("lr", 1e-3), ("seed", 7), ("fold", 1), ("engine", "lightning"), ("steps", 5):
        refuse(capsys, [*quick, "--resume", f"--{name}", value], name)
    with monkeypatch.context() as patch:  # the same names, another spacing
        survey = data.survey
        patch.setattr(data, "survey", lambda pairs: ([mm * 1.3 for mm in survey(pairs)[0]], 16))
        refuse(capsys, [*quick, "--resume"], "was trained with preprocess")
    with monkeypatch.context() as patch:  # another machine, on which another arithmetic is chosen
        patch.setattr(predict, "pick_precision", lambda *_: torch.bfloat16)
        refuse(capsys, [*quick, "--resume", "--precision", "auto"], "was trained with precision fp32, not bf16")
    (out / "last.pt").write_bytes(before["last.pt"][:1000])
    refuse(capsys, [*quick, "--resume"], "run/last.pt: ")
    (out / "last.pt").write_bytes(before["last.pt"])
    assert snapshot(out) == before
    moved = out.rename(tmp_path / "moved")
    longer = run(*quick, "--resume", "--out", moved, "--epochs", 3, "--workers", 1, "--cache", tmp_path / "other")
    assert longer["log"][2]["train/lr"] == pytest.approx(4e-3 * train.lr_at(11, 12))


def test_what_differs_when_a_run_goes_on_is_told_in_a_line_each(quick, phantoms, tmp_path, monkeypatch, capsys):
    """More epochs, a label that was redrawn, a scan that was added, other code: told. A scan that is gone: refused."""
    copy = shutil.copytree(phantoms, tmp_path / "copy")
    job = [*quick, "--data", str(copy), "--epochs", "1"]
    assert train.main(job) == 0
    label, before = nib.load(copy / "labelsTr" / "la_001.nii.gz"), snapshot(tmp_path / "run")
    nib.save(type(label)(np.roll(label.dataobj, 1, axis=0), label.affine, label.header), label.get_filename())
    for kind in ("imagesTr", "labelsTr"):
        shutil.copy(copy / kind / "la_003.nii.gz", copy / kind / "la_0000.nii.gz")
    capsys.readouterr()
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del saved["log"][0]["train/grad_norm"]  # as if the code of today had one column more: the run ended
    torch.save(saved, tmp_path / "run" / "last.pt")
    with monkeypatch.context() as patch:  # a comment more: of a checkout that was edited before, git says the same
        for path in Path(train.__file__).parent.glob("*.py"):
            (tmp_path / path.name).write_text(f"{path.read_text()}# {tmp_path}")
        patch.setattr(train, "__file__", str(tmp_path / "train.py"))
        assert train.main([*job, "--resume", "--epochs", "3"]) == 0
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [bool(row["train/grad_norm"]) for row in rows] == [False, True, True]
    told = capsys.readouterr().err
    assert "added since the run began, left out: la_0000" in told and "goes on with what is there: la_001" in told
    assert "--epochs was 1, is 3: the learning rate goes on at" in told and told.count("note:") == 4
    assert "the run began with code" in told
    after = snapshot(tmp_path / "run")
    assert after["split.json"] == before["split.json"]
    starts = [json.loads(after[name])["epochs"] for name in ("args.json", "args-2.json")]
    assert starts == [1, 3]
    (tmp_path / "run" / "best.pt").unlink()
    assert train.main([*job, "--resume", "--epochs", "2"]) == 0
    shown = capsys.readouterr()
    assert "nothing is left to do" in shown.err and "best.pt is gone" in shown.out
    assert snapshot(tmp_path / "run")["last.pt"] == after["last.pt"]
    for kind in ("imagesTr", "labelsTr"):
        (copy / kind / "la_004.nii.gz").unlink()
    refuse(capsys, [*job, "--resume"], "the run began with la_004: put it back")


def test_each_run_folder_has_its_own_place_in_tensorboard(quick, tmp_path, monkeypatch):
    """`--out a/run`, `b/run`, `.`: three, all below --tensorboard; a run that goes on finds its own again."""
    monkeypatch.chdir(tmp_path)
    for out in ("a/run", "b/run", ".", "a/../a/run"):
        run(*quick, "--epochs", 1 + out.count(".."), "--out", out, "--resume", "--tensorboard", "events")
    assert len(list(Path("events").iterdir())) == 3 and not Path("logs").exists()
    assert all(path.is_dir() for path in Path("events").iterdir())


@pytest.mark.parametrize(("flag", "value", "told"), [
    ("--tensorboard", "file/logs", "file is no folder that can be written to"), ("--precision", "fp16", "needs a CUDA"),
])
def test_what_cannot_be_is_told_before_the_work(quick, tmp_path, monkeypatch, capsys, flag, value, told):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "cache_scans", lambda *_: pytest.fail("the work has begun"))
    refuse(capsys, [*quick, flag, value], told)
    assert os.listdir(tmp_path) == ["file"]


def test_of_two_runs_at_once_one_gets_the_folder_and_without_out_each_its_own(quick, tmp_path, monkeypatch):
    """The first has claimed the folder before its first epoch ends."""
    train.prepare(train.parse_args(quick))
    before = snapshot(tmp_path / "run")
    with pytest.raises(data.DataError, match="holds a run"):
        train.prepare(train.parse_args([*quick, "--seed", "2"]))
    assert snapshot(tmp_path / "run") == before

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda text, *_: text.replace("%Y%m%d-%H%M%S", "now"))
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        train.claim_folder(train.parse_args(["--data", ""]), {})
    assert len(list(Path("runs").glob("*/args.json"))) == 2
