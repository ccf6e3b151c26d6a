"""Runs that are ended from outside, or run out of disk: the checkpoint is whole at any moment, and resume goes on."""

import itertools
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import same, weights, without_pictures
from test_twins import differ, run, server

import data
import predict
import train

resource = pytest.importorskip("resource", reason="signals and limits as POSIX has them")
RUN = ["--epochs", "3", "--workers", "1"]  # with augmentation, schedule and clipping
ENGINES = ["loop", pytest.param("lightning", marks=pytest.mark.slow)]
pytestmark = pytest.mark.filterwarnings("ignore")


def life(arguments, shown, fatal, number, room):
    """A run that gets a signal at its n-th event: a scan, a step, a validation, or half-way through a file; or none of
    whose files, pictures too, may grow beyond so many bytes, as on a disk that is nearly full."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    os.setpgrp()  # so that workers get the signal, too, as from a terminal
    for stream in (1, 2):
        os.dup2(os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
    if room is None:
        without_pictures()
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    count, write = itertools.count(), Path.write_bytes

    def deadly(function):
        def call(*args, **kwargs):
            if next(count) == fatal:
                if function is write:
                    write(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.killpg(0, number)
            return function(*args, **kwargs)
        return call

    for owner, name in ((Path, "write_bytes"), (data, "cache_scan"), (torch.nn.utils, "clip_grad_norm_"),
                        (train, "evaluate"), (train, "log_row")):
        setattr(owner, name, deadly(getattr(owner, name)))
    sys.exit(train.main(arguments))


def live(arguments, shown, fatal=-1, number=0, room=None):
    """The exit code of a run in a process of its own, and what it printed."""
    process = server.Process(target=life, args=(arguments, shown, fatal, number, room))
    process.start()
    process.join(120)
    return process.exitcode, shown.read_text()


@pytest.mark.parametrize(("engine", "moments", "seed"), [
    ("loop", 2, 0), ("lightning", 1, 0), pytest.param("loop", 10, 1, marks=pytest.mark.slow),
    pytest.param("lightning", 5, 2, marks=pytest.mark.slow),
])
def test_killed_at_any_moment_a_run_ends_as_if_left_alone(quick, tmp_path, engine, moments, seed):
    """SIGKILL at seeded moments, the first half-way through a checkpoint; a run that ends is followed by a new one."""
    common, alone = [*quick, *RUN, "--engine", engine], tmp_path / "alone"
    run(*common, "--out", alone)
    rng, kills, runs, fatal, code = random.Random(seed), 0, 0, 23, None  # last.pt of the second epoch
    while kills < moments or code:
        out = tmp_path / f"killed{runs}"
        arguments = [*common, "--out", str(out), "--cache", str(out / "cache"), "--resume"]
        code, told = live(arguments, tmp_path / "shown", fatal if kills < moments else -1, signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), told
        assert all(1 <= len(predict.load_checkpoint(path)["log"]) <= 3 for path in out.glob("*.pt"))
        kills, runs, fatal = kills + (code != 0), runs + (code == 0), rng.randrange(25)
        if code == 0:
            assert not differ(alone, out) and same(weights(alone / "best.pt"), weights(out / "best.pt"))


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_ends_run_and_workers_in_one_line_that_says_how_to_go_on(quick, tmp_path, engine):
    arguments = [*quick, *RUN, "--engine", engine]
    code, told = live(arguments, tmp_path / "shown", 20, signal.SIGINT)
    assert code == 130 and "Traceback" not in told and "--resume" in told.splitlines()[-1], told
    assert len(predict.load_checkpoint(tmp_path / "run" / "last.pt")["log"]) < 3
    assert len(run(*arguments, "--resume")["log"]) == 3


def test_last_is_saved_after_best(quick, monkeypatch):
    """A run killed between the two goes on from the former last.pt, and saves both anew."""
    names, write = [], data.write_atomically
    monkeypatch.setattr(data, "write_atomically", lambda path, content: names.append(path.name) or write(path, content))
    run(*quick, "--epochs", 1)
    assert names.index("best.pt") < names.index("last.pt")


@pytest.mark.parametrize("engine", ENGINES)
def test_where_the_disk_is_full_weights_come_first_and_pictures_may_fail(quick, tmp_path, engine):
    """A picture that cannot be written is a note. A checkpoint that cannot ends the run, and the last one stays."""
    out = tmp_path / "run"

    def train_with(epochs, room):
        words = f"--width 2 --depth 1 --engine {engine} --schedule constant --resume --epochs {epochs}"
        return live([*quick, *words.split()], tmp_path / "shown", room=room)

    assert train_with(1, resource.RLIM_INFINITY)[0] == 0  # the cache is whole
    code, told = train_with(3, 60_000)  # more than a checkpoint, less than a picture
    # Lightning's own logger raises once more when it is closed, at the very end.
    assert code == (0 if engine == "loop" else 2) and "Traceback" not in told, told
    assert "File too large; the training goes on" in told
    before = (out / "last.pt").read_bytes()
    assert len(predict.load_checkpoint(out / "last.pt")["log"]) == 3
    code, told = train_with(4, 5_000)
    assert code == 2 and "Traceback" not in told and "File too large" in told.splitlines()[-1], told
    assert (out / "last.pt").read_bytes() == before and not list(out.glob(".*"))
    assert train_with(4, resource.RLIM_INFINITY)[0] == 0
