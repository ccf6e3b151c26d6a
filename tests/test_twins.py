"""The hand-written loop beside Lightning, and one process beside two: the same losses, the same weights."""

import multiprocessing
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import same, weights, without_pictures

import predict
import train

# Three epochs with augmentation, schedule, clipping, validation and 2 workers.
TWIN = ["--epochs", "3", "--augment", "full", "--clip", "0.05", "--workers", "2", "--steps", "5"]
VOLUME = ["--dims", "3", "--size", "8", "24", "24", "--batch-size", "2", "--spacing", "6"]
pytestmark = pytest.mark.filterwarnings("ignore")
# A server that has imported train.py and forks: a process starts in milliseconds.
server = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
server.set_forkserver_preload(["train", "lightning", "torch._dynamo"])


def differ(one, other, names=("train/loss", "train/grad_norm", "train/lr", "val/dice")):
    """What of the weights and the numbers of every epoch two checkpoints do not share, to the bit."""
    one, other = predict.load_checkpoint(one / "last.pt"), predict.load_checkpoint(other / "last.pt")
    rows = [name for name in names if [row[name] for row in one["log"]] != [row[name] for row in other["log"]]]
    return rows + ["weights"] * (not same(one["model"], other["model"]))


def rank(number, size, port, jobs, shown):
    """Run the jobs one after the other as one process of several, with torchrun's variables."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    for stream in (1, 2):
        os.dup2(os.open(f"{shown}{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    without_pictures()
    sys.exit(max(train.main(job) for job in jobs))


def processes(size, jobs, shown):
    """The exit code of each of several processes that share the jobs; what they print is in files `shown`0, ..."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [server.Process(target=rank, args=(number, size, port, jobs, shown)) for number in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


@pytest.mark.parametrize("more", ["", "--norm instance --loss dice --attention", " ".join(VOLUME)])
def test_loop_and_lightning_are_twins_to_the_bit(quick, tmp_path, more):
    pytest.importorskip("lightning")
    for engine in ("loop", "lightning"):
        job = [*quick, *TWIN, *more.split(), "--engine", engine, "--out", str(tmp_path / engine)]
        assert len(train.train(train.parse_args(job))["log"]) == 3
    assert not differ(tmp_path / "loop", tmp_path / "lightning")
    assert same(weights(tmp_path / "loop" / "best.pt"), weights(tmp_path / "lightning" / "best.pt"))
    assert sorted(os.listdir(tmp_path / "loop")) == sorted(os.listdir(tmp_path / "lightning"))
    if not more:  # Can this test fail?
        job = [*quick, *TWIN, "--clip", "0", "--out", str(tmp_path / "other")]
        train.train(train.parse_args(job))
        assert {"train/loss", "weights"} <= set(differ(tmp_path / "loop", tmp_path / "other"))


def test_without_lightning_one_line_says_how_to_install_it(quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert train.main([*quick, "--engine", "lightning"]) == 2
    assert "pip install lightning" in capsys.readouterr().err


def test_two_processes_equal_one_and_their_engines_are_twins(quick, tmp_path):
    """The same batch, shared by two: same samples, same Dice over the batch, same logged loss, same weights."""
    common = [*quick, "--norm", "instance", "--steps", "5"]
    one = train.train(train.parse_args([*common, "--out", str(tmp_path / "one")]))
    jobs = [[*common, "--engine", engine, "--out", str(tmp_path / engine)] for engine in ("loop", "lightning")]
    assert processes(2, jobs, tmp_path / "shown") == [0, 0], (tmp_path / "shown1").read_text()
    assert not differ(tmp_path / "loop", tmp_path / "lightning")
    two = predict.load_checkpoint(tmp_path / "loop" / "last.pt")
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-3)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-2)
        assert b["val/foreground_truth"] == a["val/foreground_truth"]
    # Adam divides by the gradient's size: where that is near 0, rounding grows to a share of the learning rate, 4e-3.
    assert max((one["model"][name] - two["model"][name]).abs().max() for name in one["model"]) < 2e-3
    assert "epoch" not in (tmp_path / "shown1").read_text()  # the first process speaks for both


def test_torchrun_runs_the_real_command(quick, tmp_path):
    """A run of one epoch: the second process is done while the first still writes the checkpoint."""
    end = [*quick, "--norm", "instance", "--epochs", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", train.__file__]
    job = subprocess.run([*command, *end], capture_output=True, text=True, timeout=300)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("epoch  1/1") == 1 and len(torch.load(tmp_path / "run" / "last.pt")["scans"]) == 2


def test_more_processes_than_scans_to_validate(quick, tmp_path):
    # Batch norm: its buffers were once broadcast in Lightning's validation, where the others waited for ever.
    common = [*quick, "--folds", "6", "--epochs", "1"]
    jobs = [[*common, "--engine", engine, "--out", str(tmp_path / engine)] for engine in ("loop", "lightning")]
    assert processes(2, jobs, tmp_path / "shown") == [0, 0], (tmp_path / "shown1").read_text()
    assert not differ(tmp_path / "loop", tmp_path / "lightning")


def test_two_processes_validate_the_network_that_is_saved(quick, phantoms, tmp_path):
    """Batch norm's running means differ from process to process, and the checkpoint has those of the first."""
    jobs = [[*quick, "--epochs", "4", "--lr", "2e-2", "--engine", engine, "--out", str(tmp_path / engine)]
            for engine in ("loop", "lightning")]
    assert processes(2, jobs, tmp_path / "shown") == [0, 0], (tmp_path / "shown1").read_text()
    for engine in ("loop", "lightning"):
        saved = predict.load_checkpoint(tmp_path / engine / "last.pt")
        scans = train.load_data(train.parse_args(quick))[1]
        run = SimpleNamespace(net=predict.load_network(saved), recipe=saved, precision=torch.float32, rank=0,
                              args=train.parse_args(quick))
        rows = train.evaluate(run, scans)
        assert {row["name"]: pytest.approx(row["dice"]) for row in rows} == saved["scans"], engine


def test_a_batch_that_cannot_be_shared_is_refused(quick, tmp_path):
    assert processes(2, [[*quick, "--batch-size", "3"]], tmp_path / "shown") == [2, 2]
    told = [(tmp_path / f"shown{number}").read_text() for number in range(2)]
    assert "--batch-size 3" in told[0] and "Traceback" not in told[1]
