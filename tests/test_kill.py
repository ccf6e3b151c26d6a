"""Runs that are ended from outside, and disks that are full: nothing is lost, and resume goes on to the bit."""

import csv
import io
import itertools
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import predict
import train

ROOT = Path(train.__file__).parent
# A server that has imported train.py and forks: a process starts in milliseconds, and without this one's threads.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train"])
TIMES = {"seconds", "validation_seconds", "slices_per_second", "waiting", "peak_memory_gb"}
TINY = ["--epochs", "4", "--limit-batches", "4", "--augment", "seed"]


def same_end(one, other):
    """Weights, optimiser and log of two run folders are equal to the bit, but for the timings."""
    for name in ("last.pt", "best.pt"):
        a, b = (predict.load_checkpoint(run / name) for run in (one, other))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        for key, state in a["optimizer"]["state"].items():
            assert all(torch.equal(state[part], b["optimizer"]["state"][key][part]) for part in state)
        assert a["epoch"] == b["epoch"] and a["step"] == b["step"] and torch.equal(a["rng"], b["rng"])
    logs = [list(csv.DictReader((run / "log.csv").read_text().splitlines())) for run in (one, other)]
    kept = [[{key: value for key, value in row.items() if key not in TIMES} for row in log] for log in logs]
    assert kept[0] == kept[1] and len(kept[0]) == 4
    return True


def alone(run_args, tmp_path, changes=()):
    """The run that nobody disturbs, in this process."""
    assert train.main([*run_args, *TINY, *changes, "--out", str(tmp_path / "alone")]) == 0
    return tmp_path / "alone"


# --------------------------------------------------------------------------------------------------------------- SIGKILL


def life(arguments, fatal_write):
    """A run in a process of its own that dies, if it lives that long, in the middle of its n-th file."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    count, write_atomically = itertools.count(), data.write_atomically

    def write(path, fill):
        def half(file):
            whole = io.BytesIO()
            fill(whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        write_atomically(path, half if next(count) == fatal_write else fill)

    data.write_atomically = write
    sys.exit(train.main(arguments))


def test_killed_at_twenty_moments_a_run_ends_as_if_left_alone(run_args, tmp_path):
    """SIGKILL at seeded moments, half of them in the middle of a file: of the cache, a log, a checkpoint.

    A run that reaches its end is compared, and the next kills are of a new one, with a cold cache.
    """
    undisturbed, rng, kills, runs = alone(run_args, tmp_path), random.Random(0), [], 0
    while len(kills) < 20 or runs < 1:
        out = tmp_path / f"killed{runs}"
        arguments = [*run_args, *TINY, "--out", str(out), "--cache", str(out / "cache"), "--resume"]
        # The cache makes about 20 files in the first life, an epoch 3 or 4.
        seconds, fatal = (rng.uniform(0.05, 1), -1) if rng.random() < 0.5 else (60, rng.randrange(24))
        if len(kills) >= 20:
            seconds, fatal = 60, -1
        process = server.Process(target=life, args=(arguments, fatal))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert same_end(undisturbed, out) and not list(out.glob(".*.tmp"))
            runs += 1
        else:
            assert process.exitcode == -signal.SIGKILL
            epoch = predict.load_checkpoint(out / "last.pt")["epoch"] if (out / "last.pt").exists() else None
            kills.append((f"file {fatal}" if fatal >= 0 else f"{seconds:.2f} s", f"epoch {epoch}"))
    print(f"{len(kills)} kills, {runs} runs to the end:", *kills, sep="\n")
    assert len(kills) >= 20


# ----------------------------------------------------------------------------------------------------- SIGTERM and SIGINT


def signalled(arguments, number, moment, stderr, env=()):
    """A run that signals itself, and its workers with it, at a moment: (function of train.py or data.py, n-th call)."""
    os.environ.update(env)
    os.setpgrp()  # so that the signal reaches the workers, too, as Ctrl-C in a terminal does
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(stderr, "w")
    os.dup2(sys.stderr.fileno(), 2)  # of the workers
    name, fatal = moment
    module = data if hasattr(data, name) else train
    function, count = getattr(module, name), itertools.count()

    def signal_first(*args, **kwargs):
        if next(count) == fatal:
            os.killpg(0, number)
        return function(*args, **kwargs)

    setattr(module, name, signal_first)
    sys.exit(train.main(arguments))


def run_signalled(*args):
    process = server.Process(target=signalled, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def resume_as_told(told):
    """Run the command that the last line of stderr names, in this process."""
    assert "Traceback" not in told and len(told.splitlines()) <= 2, told
    name, command = re.fullmatch(r"stopped by (SIG\w+); to go on: (.*)", told.splitlines()[-1]).groups()
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "train.py") and arguments.count("--resume") == 1
    assert train.main(arguments) == 0
    return name


@pytest.mark.parametrize(
    ("number", "moment", "changes", "saved"),  # saved: steps of the optimiser, batches of the epoch
    [
        (signal.SIGTERM, ("clip_gradient", 0), [], (1, 1)),  # in the very first step
        (signal.SIGINT, ("clip_gradient", 5), ["--workers", "2"], (6, 2)),
        (signal.SIGTERM, ("clip_gradient", 4), ["--workers", "2", "--accumulate", "2"], (5, 2)),
        (signal.SIGINT, ("clip_gradient", 7), [], (8, 4)),  # in the last step of an epoch
        (signal.SIGTERM, ("evaluate", 1), ["--workers", "1"], (8, 4)),  # in validation
        (signal.SIGTERM, ("log_row", 1), [], (9, 1)),  # after it: the next epoch has begun
        (signal.SIGINT, ("cache_scan", 2), [], None),  # before all training
    ],
)
def test_a_signal_stops_the_run_after_its_step_and_resume_ends_as_if_left_alone(
    run_args, tmp_path, number, moment, changes, saved
):
    """Exit code 143 or 130, one line on stderr with the command that goes on, no word from the workers."""
    told, last = tmp_path / "stderr", tmp_path / "run" / "last.pt"
    arguments = [*run_args, *TINY, *changes, "--cache", str(tmp_path / "cold")]
    assert run_signalled(arguments, number, moment, told) == 128 + number
    checkpoint = predict.load_checkpoint(last) if saved else None
    assert saved == (checkpoint and (checkpoint["step"], len(checkpoint["part"]["losses"]))) and last.exists() == bool(saved)
    assert resume_as_told(told.read_text()) == number.name
    assert same_end(alone(run_args, tmp_path, changes), tmp_path / "run")
