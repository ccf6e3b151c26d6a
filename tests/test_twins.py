"""The hand-written loop against Lightning, and one process against two: the same losses, the same weights."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
import train
from data import DataError
from losses import DiceLoss

ROOT = Path(train.__file__).parent
needs_lightning = pytest.mark.skipif(
    not any((Path(p) / "lightning").is_dir() for p in sys.path), reason="pip install -r requirements-dev.txt"
)
# Three epochs with augmentation, schedule, clipping, validation and 2 workers.
VOLUME = ["--dims", "3", "--patch", "12", "24", "24", "--spacing", "5"]
TWIN = ["--epochs", "3", "--augment", "full", "--workers", "2", "--clip", "0.5", "--weight-decay", "0.01"]


def largest_difference(*paths):
    one, other = (predict.load_checkpoint(path)["model"] for path in paths)
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def torchrun(processes, arguments, **options):
    # `--`: torchrun would take our --logs for its own --logs-specs.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]
    command = [*command, str(ROOT / "train.py"), *arguments]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, **options)


@needs_lightning
@pytest.mark.parametrize("more", [[], ["--accumulate", "2"], VOLUME])
@pytest.mark.filterwarnings("ignore")
def test_loop_and_lightning_are_twins_to_the_bit(run_args, tmp_path, more):
    results = {}
    for engine in ("loop", "lightning"):
        arguments = [*run_args, *TWIN, *more, "--engine", engine, "--out", str(tmp_path / engine)]
        results[engine] = train.train(train.parse_args(arguments))
    assert len(results["loop"]["losses"]) >= 3 * 2
    assert results["loop"]["losses"] == results["lightning"]["losses"]
    assert results["loop"]["scans"] == results["lightning"]["scans"]
    assert largest_difference(*(tmp_path / engine / "last.pt" for engine in results)) == 0
    left = [sorted(os.listdir(tmp_path / engine)) for engine in results]
    assert left[0] == left[1]


@needs_lightning
@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_to_the_bit_and_predicts(run_args, phantoms, tmp_path, monkeypatch):
    arguments = [*run_args, *TWIN, "--engine", "lightning"]
    train.train(train.parse_args([*arguments, "--out", str(tmp_path / "whole")]))
    log_row = train.log_row

    def killed_in_the_second_epoch(args, run, epoch, *rest):
        if epoch == 1:
            raise RuntimeError("killed")
        return log_row(args, run, epoch, *rest)

    monkeypatch.setattr(train, "log_row", killed_in_the_second_epoch)
    with pytest.raises(RuntimeError, match="killed"):
        train.train(train.parse_args([*arguments, "--out", str(tmp_path / "parts")]))
    monkeypatch.setattr(train, "log_row", log_row)
    assert predict.load_checkpoint(tmp_path / "parts" / "last.pt")["epoch"] == 0
    train.train(train.parse_args([*arguments, "--out", str(tmp_path / "parts"), "--resume"]))
    assert largest_difference(tmp_path / "whole" / "last.pt", tmp_path / "parts" / "last.pt") == 0
    run = [str(phantoms), "--checkpoint", str(tmp_path / "parts" / "last.pt"), "--out", str(tmp_path / "masks")]
    assert predict.main([*run, "--held-out"]) == 0 and len(os.listdir(tmp_path / "masks")) == 2


def test_without_lightning_one_line_says_how_to_install_it(run_args, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert train.main([*run_args, "--engine", "lightning"]) == 2
    assert "pip install lightning" in capsys.readouterr().err


def test_two_processes_equal_one(run_args, tmp_path):
    """The same global batch, shared by two processes: same samples, same Dice over the batch, same weights."""
    common = [*run_args, "--norm", "instance", "--augment", "seed", "--epochs", "2", "--clip", "1"]
    one = train.train(train.parse_args([*common, "--out", str(tmp_path / "one")]))
    two = torchrun(2, [*common, "--out", str(tmp_path / "two")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    assert shown.count("epoch   1/2") == 1  # only rank 0 speaks
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))
    assert json.loads((tmp_path / "one" / "split.json").read_text()) == json.loads(
        (tmp_path / "two" / "split.json").read_text()
    )
    # Adam divides by the gradient's size: where that is near 0, rounding grows to a share of the learning rate, 4e-3.
    assert largest_difference(tmp_path / "one" / "last.pt", tmp_path / "two" / "last.pt") < 1e-3
    logs = [predict.load_checkpoint(tmp_path / name / "last.pt")["log"] for name in ("one", "two")]
    for a, b in zip(*logs, strict=True):
        assert a["dice_mean"] == pytest.approx(b["dice_mean"], abs=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert one["dice"] == logs[0][-1]["dice_mean"]


def test_dice_loss_of_shares_is_that_of_the_whole():
    """With the other share's sums added, the loss of half a batch is the loss of the batch, not of the half."""
    torch.manual_seed(0)
    logits, target = torch.randn(4, 1, 5, 5), (torch.rand(4, 1, 5, 5) > 0.7).float()
    other = torch.stack([(torch.sigmoid(logits[2:]) * target[2:]).sum(),
                         torch.sigmoid(logits[2:]).sum() + target[2:].sum()])
    half = DiceLoss(reduce=lambda sums: sums + other)(logits[:2], target[:2])
    assert half.item() == pytest.approx(DiceLoss()(logits, target).item(), rel=1e-6)


def test_a_killed_process_ends_the_job_and_resume_goes_on_exactly(run_args, tmp_path):
    common = [*run_args, "--norm", "instance", "--epochs", "10", "--augment", "seed"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    whole, parts = ([*common, "--out", str(tmp_path / name)] for name in ("whole", "parts"))
    job, last = torchrun(2, parts, **quiet), tmp_path / "parts" / "last.pt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    assert last.exists() and len(children) == 2, job.communicate()[1]
    os.kill(int(children[-1]), 9)
    killed = time.monotonic()
    job.communicate(timeout=60)
    assert job.returncode != 0 and time.monotonic() - killed < 60
    assert predict.load_checkpoint(last)["epoch"] < 9
    for arguments in ([*parts, "--resume"], whole):
        job = torchrun(2, arguments, **quiet)
        errors = job.communicate(timeout=180)[1]
        assert job.returncode == 0, errors
    assert largest_difference(last, tmp_path / "whole" / "last.pt") == 0


def test_batch_that_cannot_be_shared(run_args, monkeypatch):
    monkeypatch.setattr(train, "processes", lambda args: (0, 3))
    with pytest.raises(DataError, match="choose a multiple of 3"):
        train.prepare(train.parse_args([*run_args, "--engine", "lightning"]))


def test_accumulated_batches_are_one_step(run_args, tmp_path):
    """Two batches of 4 and one of 8 take the same step where the loss is a mean over samples."""
    common = [*run_args, "--loss", "bce", "--norm", "instance", "--augment", "none", "--epochs", "1", "--clip", "0"]
    ends = []
    for name, changes in (("one", ["--batch-size", "8"]), ("two", ["--batch-size", "4", "--accumulate", "2"])):
        run = [*common, *changes, "--limit-batches", "6" if name == "two" else "3", "--out", str(tmp_path / name)]
        ends.append(train.train(train.parse_args(run)))
    assert np.mean(ends[0]["losses"]) == pytest.approx(np.mean(ends[1]["losses"]), rel=1e-4)
    assert largest_difference(tmp_path / "one" / "last.pt", tmp_path / "two" / "last.pt") < 1e-3
