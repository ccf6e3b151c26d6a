"""The loop: what a run leaves, that it learns, that it goes on to the bit, and what it refuses."""

import csv
import gc
import io
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
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import predict
import train

VOLUME = ["--dims", "3", "--size", "8", "24", "24", "--batch-size", "2", "--spacing", "6"]


def run(*argv):
    return train.train(train.parse_args([*map(str, argv)]))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_learning_rate_by_hand():
    """Ten steps: two up, the rest down along half a cosine."""
    rates = [train.lr_at(step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1, 1] and rates[6] == pytest.approx(0.5)
    assert rates[4] == pytest.approx(0.853553, abs=1e-6) and rates[9] == pytest.approx(0.038060, abs=1e-6)
    assert train.lr_at(0, 1) == 1 == train.lr_at(3, 7, "constant")


def test_what_a_run_leaves(run_args, tmp_path, capsys):
    """Files, log, TensorBoard and screen; and in this process nothing: no signal handler, no filter, no variable."""
    def here():
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        return handlers, warnings.filters[:], warnings.showwarning, sys.excepthook, dict(os.environ), os.getcwd()

    import torch._dynamo  # noqa: F401  the optimiser imports it, and with it sympy, which sets a filter

    before, seed_before = here(), np.random.get_state()[1].copy()
    result = run(*run_args, "--steps", 2, "--augment", "none")
    assert here() == before and (np.random.get_state()[1] == seed_before).all()
    shown, out = capsys.readouterr(), tmp_path / "run"
    assert shown.err == "" and shown.out.isascii()  # progress bars are for terminals
    files = "last.pt best.pt log.csv split.json args.json validation.png curves.png"
    assert {path.name for path in out.iterdir()} == set(files.split())

    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert same(checkpoint["model"], result["model"]) and result["out"] == str(out)
    assert checkpoint["network"] | {"width": 4, "depth": 2, "dims": 2, "stem": 2} == checkpoint["network"]
    assert checkpoint["preprocess"]["axis"] == 2 and len(checkpoint["preprocess"]["size"]) == 2
    start = json.loads((out / "args.json").read_text())
    assert start == checkpoint["args"] | {"machine": checkpoint["machine"]} and start["lr"] == 4e-3
    # Versions, hardware, how long, and how to go on: all that somebody who reads a pasted log asks for.
    assert all(line in shown.out for line in checkpoint["machine"].values())
    assert torch.__version__ in start["machine"]["versions"] and "GB" in start["machine"]["device"]
    assert "min left, until" in shown.out
    split = json.loads((out / "split.json").read_text())
    assert checkpoint["split"] == split
    assert split == {"train": ["la_001", "la_002", "la_004", "la_005"], "val": ["la_000", "la_003"]}

    log = [{name: float(value) for name, value in row.items()}
           for row in csv.DictReader((out / "log.csv").read_text().splitlines())]
    assert [row.pop("epoch") for row in log] == [1, 2]
    scores = list(result["scans"].values())
    assert set(result["scans"]) == {"la_000", "la_003"} and log[-1]["val/dice"] == pytest.approx(np.mean(scores))
    assert log[-1]["val/dice_worst"] == min(scores) and log[-1]["val/dice_std"] == pytest.approx(np.std(scores))
    # Against an all-black prediction: the share of organ in truth and prediction, also on the screen.
    masks = [data.read_mask(pair.label, data.read_scan(pair.image)) for pair in data.find_pairs(run_args[1])[::3]]
    truth = sum(mask.sum() for mask in masks) / sum(mask.size for mask in masks)
    assert log[0]["val/foreground_truth"] == pytest.approx(truth) and 0 <= log[0]["val/foreground_prediction"] <= 1
    called = 100 * log[1]["val/foreground_prediction"]
    assert f"called organ {called:.2f} % of the voxels (truth {100 * truth:.2f} %)" in shown.out

    (folder,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["scalars"]) == set(log[0])
    assert {name.split("/")[0] for name in log[0]} == {"train", "val", "system"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (n, pytest.approx(row["train/loss"])) for n, row in enumerate(log, start=1)]
    assert [image.step for image in events.Images("validation")] == [1, 2]


@pytest.mark.parametrize("dims", [2, 3])
def test_predict_finds_the_validation_dice_again_from_files(quick, phantoms, tmp_path, dims):
    result = run(*quick, *(VOLUME if dims == 3 else []), "--attention", "--lr", 2e-2, "--augment", "geometry")
    job = [str(phantoms), "--checkpoint", f"{result['out']}/last.pt", "--out", str(tmp_path / "masks")]
    job += ["--labels", str(phantoms / "labelsTr"), "--held-out", "--precision", "fp32", "--device", "cpu"]
    assert predict.main(job) == 0
    rows = csv.DictReader((tmp_path / "masks" / "scores.csv").read_text().splitlines())
    assert {row["name"]: float(row["dice"]) for row in rows} == result["scans"] and min(result["scans"].values()) > 0


@pytest.mark.parametrize("engine", ["loop", "lightning"])
def test_stopped_after_two_epochs_and_resumed_a_run_ends_as_if_left_alone(quick, tmp_path, monkeypatch, capsys, engine):
    """To the bit, with augmentation, schedule, clipping and 2 workers: weights, optimiser, log, best epoch."""
    if engine == "lightning":
        pytest.importorskip("lightning")
    common = [*quick, "--engine", engine, "--workers", "2", "--epochs", "4"]
    job = [*common, "--out", str(tmp_path / "parts")]
    alone, epochs, evaluate = run(*common, "--out", tmp_path / "alone"), [], train.evaluate

    def stop(run, scans):
        epochs.append(len(scans))
        if sum(epochs) > 4:  # two epochs of two scans are done
            raise KeyboardInterrupt
        return evaluate(run, scans)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "evaluate", stop)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `main` sets
    assert train.main(job) == 130 and "--resume" in capsys.readouterr().err.splitlines()[-1]
    signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    monkeypatch.setattr(train, "evaluate", evaluate)
    halfway = predict.load_checkpoint(tmp_path / "parts" / "last.pt")
    assert len(halfway["log"]) == 2 and not same(halfway["model"], alone["model"])

    resumed = run(*job, "--resume")
    assert same(alone["model"], resumed["model"]) and alone["scans"] == resumed["scans"]
    assert same(weights(tmp_path / "alone" / "best.pt"), weights(tmp_path / "parts" / "best.pt"))
    for name in ("train/loss", "train/grad_norm", "train/lr", "val/dice"):
        assert [row[name] for row in alone["log"]] == [row[name] for row in resumed["log"]]
    ends = [end["optimizer"] if engine == "loop" else end["optimizer_states"][0] for end in (alone, resumed)]
    states = [end["state"] for end in ends]
    assert states[0] and all(same(states[0][key], states[1][key]) for key in states[0])

    before = (tmp_path / "parts" / "last.pt").read_bytes()
    assert same(run(*job, "--resume")["model"], alone["model"])  # nothing is left to do
    assert (tmp_path / "parts" / "last.pt").read_bytes() == before


@pytest.mark.parametrize(("changes", "stem"), [("", 4), ("--spacing 1.2", 2), ("--dims 3", 2), ("--stem 1", 1)])
def test_fine_voxels_enter_in_larger_blocks(write_nifti, tmp_path, changes, stem):
    """Voxels of 0.6 x 0.6 x 3 mm: in 3D the coarsest side counts."""
    squares = np.kron(np.eye(4), np.ones((10, 10)))[..., None].repeat(6, axis=2).astype(np.int16)
    for name, kind in product(("a", "b"), ("images", "labels")):
        write_nifti(tmp_path / kind / f"{name}.nii.gz", squares, np.diag([0.6, 0.6, 3, 1]))
    command = f"--data {tmp_path} --cache {tmp_path}/cache --folds 2 --depth 1 {changes}"
    args = train.parse_args(command.split())
    size = train.load_data(args)[2]["preprocess"]["size"]
    assert args.stem == stem and all(length % (2 * stem) == 0 for length in size)


@pytest.mark.parametrize(("cores", "slices", "patches", "cuda"), [
    (1, (0, 1), (0, 1), 0), (2, (1, 1), (2, 2), 1), (4, (2, 2), (4, 4), 3), (8, (4, 4), (8, 8), 7),
    (64, (32, 32), (8, 64), 32),
])
def test_threads_take_the_cores_that_workers_leave(monkeypatch, cores, slices, patches, cuda):
    """Workers and threads, for slices and for patches on a CPU, and workers beside a GPU; `--workers` wins."""
    threads = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(data, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def share(device, *more):
        return train.share_cores(train.parse_args(["--data", "x", *more]), torch.device(device)), threads[-1]

    assert share("cpu") == slices and share("cpu", "--dims", "3") == patches and share("cuda")[0] == cuda
    assert share("cpu", "--workers", "0") == (0, cores)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no taskset")
def test_cores_that_others_may_not_use_are_not_counted():
    code = "import os, data; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); assert data.cpu_count() == 1"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(train.__file__).parent)


def test_seed_decides_and_workers_do_not(quick, tmp_path):
    changes = [[], ["--workers", 1], ["--seed", 1]]
    ends = [run(*quick, "--epochs", 1, "--out", tmp_path / f"{i}", *change) for i, change in enumerate(changes)]
    assert same(ends[0]["model"], ends[1]["model"]) and not same(ends[0]["model"], ends[2]["model"])


def test_it_overfits_one_scan(quick):
    """If one scan cannot be learnt by heart, nothing else can be."""
    changes = "--steps 7 --overfit 1 --epochs 32 --width 8 --batch-size 2 --lr 1e-2"
    result = run(*quick, *changes.split())
    assert list(result["scans"]) == ["la_001"] and result["log"][-1]["val/dice"] > 0.8
    assert result["log"][-1]["train/loss"] < 0.4 * result["log"][0]["train/loss"]


@pytest.mark.parametrize("loss", ["dice", "bce_dice"])
def test_it_learns_the_phantom(quick, loss):
    """A floor for scans that were never seen; what is called organ is about as much as there is."""
    changes = "--steps 14 --epochs 12 --width 8 --batch-size 4 --lr 1e-2 --augment none --loss"
    row = run(*quick, *changes.split(), loss)["log"][-1]
    assert row["val/dice"] > 0.6 and 0.5 < row["val/foreground_prediction"] / row["val/foreground_truth"] < 2


def test_every_scan_can_be_trained_on_with_the_first_recipe(quick, tmp_path):
    old = "--stem 1 --norm none --loss bce --schedule constant --weight-decay 0 --clip 0 --normalise minmax --crop 4"
    for engine in ("loop", "lightning"):
        out = tmp_path / engine
        result = run(*quick, *old.split(), "--fold", "all", "--engine", engine, "--out", out, "--augment", "geometry")
        assert len(result["split"]["train"]) == 6 and result["split"]["val"] == [] == list(result["scans"])
        assert same(weights(out / "best.pt"), result["model"])  # without validation the last is the best


def test_best_is_the_first_epoch_of_the_highest_dice_for_both_engines(quick, tmp_path, monkeypatch):
    evaluate, told = train.evaluate, []
    scores = [0.2, 0.4, 0.4, 0.3]

    def judged(*args):
        rows = evaluate(*args)
        told.extend(rows)
        return [row | {"dice": scores[(len(told) - 1) // 2]} for row in rows]

    monkeypatch.setattr(train, "evaluate", judged)
    for engine in ("loop", "lightning"):
        told.clear()
        run(*quick, "--epochs", 4, "--engine", engine, "--out", tmp_path / engine)
        best = predict.load_checkpoint(tmp_path / engine / "best.pt")
        assert [row["val/dice"] for row in best["log"]] == pytest.approx(scores[:2])


@pytest.mark.parametrize("steps", [3, 20])
def test_an_epoch_has_its_steps_however_many_slices_there_are(quick, tmp_path, monkeypatch, steps):
    """58 slices, 8 a step: where they do not suffice each comes as often as the others, augmented otherwise."""
    clip, count = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: count.append(1) or clip(*args))
    run = train.prepare(train.parse_args([*quick, "--steps", str(steps), "--epochs", "1"]))
    train.fit_loop(run)
    dataset, seen = run.loader.dataset, list(run.loader.sampler)[: 8 * steps]
    assert len(count) == steps and len(set(seen)) == 8 * steps and len(dataset) % len(dataset.table) == 0
    assert len(dataset) - 8 * steps < len(dataset.table)
    if steps == 20:
        one, again = dataset[5], dataset[5 + len(dataset.table)]
        assert not torch.equal(one[0], again[0])
        dataset.augment = data.augmenter("none")
        assert torch.equal(dataset[5][0], dataset[5 + len(dataset.table)][0])


# ------------------------------------------------------------------------------------------------------------- refusals


def refuse(capsys, job, told):
    """Exit code 2 and one line on stderr, which holds `told`."""
    capsys.readouterr()
    assert train.main([*map(str, job)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and told in error, error


def test_resume_is_refused_where_arguments_or_data_are_others(quick, phantoms, tmp_path, monkeypatch, capsys):
    """And then nothing in the folder has changed; but epochs may grow, and device, workers and paths may differ."""
    run(*quick)
    out = tmp_path / "run"
    before = snapshot(out)
    refuse(capsys, quick, "add --resume")
    for name, value in (("--width", 8), ("--lr", 1e-3), ("--seed", 7), ("--fold", 1), ("--engine", "lightning"),
                        ("--augment", "none"), ("--steps", 5), ("--batch-size", 4)):
        refuse(capsys, [*quick, "--resume", name, value], name.strip("-").replace("-", "_"))
    with monkeypatch.context() as patch:  # the same names, another spacing
        survey = data.survey
        patch.setattr(data, "survey", lambda pairs: [mm * 1.3 for mm in survey(pairs)])
        refuse(capsys, [*quick, "--resume"], "preprocess")
    (out / "last.pt").write_bytes(before["last.pt"][:1000])
    refuse(capsys, [*quick, "--resume"], "run/last.pt: ")
    (out / "last.pt").write_bytes(before["last.pt"])
    assert snapshot(out) == before
    moved = out.rename(tmp_path / "moved")
    longer = run(*quick, "--resume", "--out", moved, "--epochs", 3, "--workers", 1, "--cache", tmp_path / "other")
    assert longer["log"][2]["train/lr"] == pytest.approx(4e-3 * train.lr_at(11, 12))


def test_what_differs_when_a_run_goes_on_is_told_in_a_line_each(quick, phantoms, tmp_path, capsys, monkeypatch):
    """More epochs, a label that was redrawn, a scan that was added: told. A scan that is gone: refused."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `main` sets
    copy = shutil.copytree(phantoms, tmp_path / "copy")
    job = [*quick, "--data", str(copy), "--epochs", "1"]
    assert train.main(job) == 0
    split = (tmp_path / "run" / "split.json").read_text()
    label = copy / "labelsTr" / "la_001.nii.gz"
    image = nib.load(label)
    nib.save(type(image)(np.roll(np.asarray(image.dataobj), 1, axis=0), image.affine, image.header), label)
    for kind in ("imagesTr", "labelsTr"):
        shutil.copy(copy / kind / "la_003.nii.gz", copy / kind / "la_0000.nii.gz")
    capsys.readouterr()
    assert train.main([*job, "--resume", "--epochs", "3"]) == 0
    told = capsys.readouterr().err
    assert "added since the run began, left out: la_0000" in told and "goes on with what is there: la_001" in told
    assert "--epochs was 1, is 3: the learning rate goes on at" in told and told.count("note:") == 3
    assert (tmp_path / "run" / "split.json").read_text() == split
    starts = [json.loads((tmp_path / "run" / name).read_text()) for name in ("args.json", "args-2.json")]
    assert [start["epochs"] for start in starts] == [1, 3]
    assert train.main([*job, "--resume", "--epochs", "2"]) == 0 and "nothing is left to do" in capsys.readouterr().err
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


@pytest.mark.parametrize("flag", ["--tensorboard", "--out"])
def test_a_place_that_cannot_be_made_is_told_before_the_work(quick, tmp_path, capsys, monkeypatch, flag):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "cache_scans", lambda *_: pytest.fail("the work has begun"))
    refuse(capsys, [*quick, flag, tmp_path / "file" / "logs"], "file is no folder that can be written to")


def test_a_checkpoint_alone_is_not_overwritten(quick, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_bytes(b"mine")
    refuse(capsys, quick, "run: holds a run")
    assert snapshot(tmp_path / "run") == {"best.pt": b"mine"}


def test_of_two_runs_at_once_one_gets_the_folder_and_without_out_each_its_own(quick, tmp_path, monkeypatch):
    """The first has claimed the folder before its first epoch ends."""
    train.prepare(train.parse_args(quick))
    before = snapshot(tmp_path / "run")
    with pytest.raises(data.DataError, match="holds a run"):
        train.prepare(train.parse_args([*quick, "--seed", "2"]))
    assert snapshot(tmp_path / "run") == before

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda text, *_: text.replace("%Y%m%d-%H%M%S", "20250101-000000"))
    where = quick.index("--out")
    folders = []
    for pid in (11, 12):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        folders.append(train.claim_folder(train.parse_args(quick[:where] + quick[where + 2 :]), {}))
    assert folders[0] != folders[1] and all((folder / "args.json").exists() for folder in folders)


def test_float16_on_a_cpu_is_refused(quick, tmp_path, capsys):
    for engine in ("loop", "lightning"):
        refuse(capsys, [*quick, "--engine", engine, "--precision", "fp16"], "--precision fp16")
    assert not (tmp_path / "run").exists()


def test_a_screen_that_knows_ascii_only_does_not_end_a_run(quick, tmp_path, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "ascii", write_through=True))  # PYTHONIOENCODING=ascii
    assert train.main([*quick, "--out", str(tmp_path / "Übung"), "--epochs", "1"]) == 0
    assert b"epoch  1/1" in screen.getvalue() and (tmp_path / "Übung" / "last.pt").exists()


# ------------------------------------------------------------------------------------------------- precision and CUDA


@pytest.mark.parametrize(("changes", "chosen"), [
    ("--size 8 24 24 --stem 1 --depth 2", "float32"),  # depths 8, 4, 2
    ("--size 7 24 24 --stem 2 --depth 1", "float32"),  # padded to 8: 4, 2
    ("--size 9 24 24 --stem 2 --depth 2", "float32"),  # padded to 16: 8, 4, 2
    ("--size 12 24 24 --stem 1 --depth 2", "bfloat16"),  # 12, 6, 3
])
def test_on_a_cpu_no_level_of_depth_two_is_trained_in_bfloat16(quick, monkeypatch, capsys, changes, chosen):
    """PyTorch's gradient of a 3D convolution is wrong there."""
    monkeypatch.setattr(predict, "pick_precision", lambda *_: torch.bfloat16)
    prepared = train.prepare(train.parse_args([*quick, *VOLUME, *changes.split()]))
    assert str(prepared.precision) == f"torch.{chosen}" and f"parameters, {chosen}" in capsys.readouterr().out


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
        figures = sum(type(thing) is Figure for thing in gc.get_objects())
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
        samples.append((resident, figures, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(train, "write_log", sample)
    run(*quick, "--epochs", 40)
    memory, figures, files = zip(*samples[10:], strict=True)
    assert max(memory) - memory[0] < 8 and max(figures) == min(figures) and max(files) == min(files)
