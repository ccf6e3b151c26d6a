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
from test_twins import differ, server

import data
import predict
import train

resource = pytest.importorskip("resource", reason="signals and limits as POSIX has them")
RUN = ["--epochs", "3", "--augment", "none"]
pytestmark = pytest.mark.filterwarnings("ignore")


def life(arguments, fatal, number, shown):
    """A run that gets a signal at its n-th event: a scan, a step, a validation, or half-way through a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored
    os.setpgrp()  # so that workers get the signal, too, as from a terminal
    os.dup2(os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    without_pictures()
    count, write = itertools.count(), Path.write_bytes

    def deadly(function):
        def call(*args, **kwargs):
            if next(count) == fatal:
                os.killpg(0, number)
            return function(*args, **kwargs)
        return call

    def half(path, content):
        if next(count) == fatal:
            write(path, bytes(content)[: len(content) // 2])
            os.killpg(0, number)
        return write(path, content)

    Path.write_bytes = half
    steps = (data, "cache_scan"), (torch.nn.utils, "clip_grad_norm_"), (train, "evaluate"), (train, "log_row")
    for module, name in steps:
        setattr(module, name, deadly(getattr(module, name)))
    sys.exit(train.main(arguments))


def live(*args):
    process = server.Process(target=life, args=args)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(("engine", "moments", "seed"), [
    ("loop", 2, 0), pytest.param("loop", 10, 1, marks=pytest.mark.slow),
    pytest.param("lightning", 5, 2, marks=pytest.mark.slow),
])
def test_killed_at_any_moment_a_run_ends_as_if_left_alone(quick, tmp_path, engine, moments, seed):
    """SIGKILL at seeded moments, the first in the middle of a checkpoint; a run that ends is followed by a new one."""
    common = [*quick, *RUN, "--engine", engine]
    train.train(train.parse_args([*common, "--out", str(tmp_path / "alone")]))
    rng, kills, runs, fatal = random.Random(seed), 0, 0, 24  # last.pt of the second epoch
    while True:
        out = tmp_path / f"killed{runs}"
        arguments = [*common, "--out", str(out), "--cache", str(out / "cache"), "--resume"]
        code = live(arguments, fatal if kills < moments else -1, signal.SIGKILL, tmp_path / "shown")
        assert code in (0, -signal.SIGKILL), (tmp_path / "shown").read_text()
        for path in out.glob("*.pt"):
            assert 1 <= len(predict.load_checkpoint(path)["log"]) <= 3
        kills, fatal = kills + (code != 0), rng.randrange(25)
        if code == 0:
            assert not differ(tmp_path / "alone", out)
            assert same(weights(tmp_path / "alone" / "best.pt"), weights(out / "best.pt"))
            runs += 1
            if kills >= moments:
                break


@pytest.mark.parametrize("engine", ["loop", pytest.param("lightning", marks=pytest.mark.slow)])
def test_ctrl_c_ends_run_and_workers_in_one_line_that_says_how_to_go_on(quick, tmp_path, engine):
    arguments = [*quick, *RUN, "--workers", "2", "--engine", engine]
    code = live(arguments, 20, signal.SIGINT, tmp_path / "shown")
    told = (tmp_path / "shown").read_text()
    assert code == 130 and "Traceback" not in told and "--resume" in told.splitlines()[-1], told
    done = len(predict.load_checkpoint(tmp_path / "run" / "last.pt")["log"])
    assert done < 3 and len(train.train(train.parse_args([*arguments, "--resume"]))["log"]) == 3


def test_last_is_saved_after_best(quick, monkeypatch):
    """A run killed between the two goes on from the former last.pt, and saves both anew."""
    names, write = [], data.write_atomically
    monkeypatch.setattr(data, "write_atomically", lambda path, content: names.append(path.name) or write(path, content))
    train.train(train.parse_args([*quick, "--epochs", "1"]))
    assert names.index("best.pt") < names.index("last.pt")


def short_of_disk(arguments, bytes_left, shown):
    """A run none of whose files may grow beyond so many bytes, as on a disk that is nearly full."""
    for stream in (1, 2):
        os.dup2(os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
    sys.exit(train.main(arguments))


@pytest.mark.parametrize("engine", ["loop", pytest.param("lightning", marks=pytest.mark.slow)])
def test_where_the_disk_is_full_weights_come_first_and_pictures_may_fail(quick, tmp_path, engine):
    """A picture that cannot be written is a note. A checkpoint that cannot ends the run, and the last one stays."""
    job, shown = [*quick, "--width", "2", "--depth", "1", "--engine", engine], tmp_path / "shown"

    def live(epochs, room):
        shown.unlink(missing_ok=True)
        arguments = [*job, "--epochs", str(epochs), "--schedule", "constant", "--resume"]
        process = server.Process(target=short_of_disk, args=(arguments, room, shown))
        process.start()
        process.join(120)
        return process.exitcode, shown.read_text()

    assert live(1, resource.RLIM_INFINITY)[0] == 0  # the cache is whole
    code, told = live(3, 60_000)  # more than a checkpoint, less than a picture
    # Lightning's own logger raises once more when it is closed, at the very end.
    assert code == (0 if engine == "loop" else 2) and "Traceback" not in told, told
    assert told.count("File too large; the training goes on") >= 2
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert len(predict.load_checkpoint(tmp_path / "run" / "last.pt")["log"]) == 3
    code, told = live(4, 5_000)
    assert code == 2 and "Traceback" not in told and "File too large" in told.splitlines()[-1], told
    assert (tmp_path / "run" / "last.pt").read_bytes() == before and not list((tmp_path / "run").glob(".*"))
    assert live(4, resource.RLIM_INFINITY)[0] == 0
