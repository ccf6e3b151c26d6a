"""Runs that are ended from outside, and disks that are full: nothing is lost, and resume goes on to the bit."""

import csv
import errno
import functools
import gc
import importlib.util
import io
import itertools
import multiprocessing
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.summary.writer.record_writer import RecordWriter

import data
import predict
import train

ROOT = Path(train.__file__).parent
# A server that has imported train.py and forks: a process starts in milliseconds, and without this one's threads.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["train", "lightning", "torch._dynamo"])
TIMES = {"seconds", "validation_seconds", "slices_per_second", "waiting", "peak_memory_gb"}
TINY = ["--epochs", "3", "--limit-batches", "4", "--augment", "none"]


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
    assert kept[0] == kept[1] and len(kept[0]) == 3
    return True


def redirect(stream, path):
    """What this process and its children write to stdout (1) or stderr (2) goes into a file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that gives the folder of a run that nobody disturbs."""
    made = {}

    def run(run_args, *changes):
        if changes not in made:
            made[changes] = tmp_path_factory.mktemp("alone") / "run"
            assert train.main([*run_args, *TINY, *changes, "--out", str(made[changes])]) == 0
        return made[changes]

    return run


# -------------------------------------------------------------------------------------------------------------- SIGKILL


def life(arguments, fatal, delay):
    """A run that dies at its n-th event: half-way through a file, else some time after a scan, a step, a validation."""
    redirect(1, os.devnull)
    redirect(2, os.devnull)
    count = itertools.count()

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(function, *args, **kwargs):
        if next(count) == fatal:
            threading.Timer(delay, die).start()
        return function(*args, **kwargs)

    def write(write_atomically, path, fill):
        def half(file):
            fill(whole := io.BytesIO())
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()

        write_atomically(path, half if next(count) == fatal else fill)

    data.write_atomically = functools.partial(write, data.write_atomically)
    data.cache_scan = functools.partial(deadly, data.cache_scan)
    for name in ("clip_gradient", "evaluate", "log_row"):
        setattr(train, name, functools.partial(deadly, getattr(train, name)))
    sys.exit(train.main(arguments))


@pytest.mark.parametrize(("moments", "seed"), [(6, 2), pytest.param(20, 0, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_ends_as_if_left_alone(run_args, tmp_path, alone, moments, seed):
    """SIGKILL at seeded moments, about half of them in the middle of a file: of the cache, a log, a checkpoint.

    A run that comes to its end is compared, and the next kills are of a new one, with a cold cache.
    """
    undisturbed, rng, kills, runs = alone(run_args), random.Random(seed), [], 0
    while len(kills) < moments or kills[-1][0] == runs:  # the last run, too, is taken to its end
        out = tmp_path / f"killed{runs}"
        arguments = [*run_args, *TINY, "--out", str(out), "--cache", str(out / "cache"), "--resume"]
        fatal = rng.randrange(45) if len(kills) < moments else -1  # a run on a cold cache has about 50 events
        process = server.Process(target=life, args=(arguments, fatal, rng.uniform(0, 0.05)))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            assert same_end(undisturbed, out) and not list(out.glob(".*.tmp"))
            runs += 1
        else:
            assert process.exitcode == -signal.SIGKILL
            last = out / "last.pt"
            kills.append((runs, fatal, predict.load_checkpoint(last)["epoch"] if last.exists() else None))
    print(f"{len(kills)} kills (run, event, epoch in last.pt), {runs} runs to the end: {kills}")


# --------------------------------------------------------------------------------------------------- SIGTERM and SIGINT


def signalled(arguments, number, moment, stderr, env=()):
    """A run that signals itself, and its workers with it, at a moment: (function of train.py or data.py, n-th call)."""
    os.environ.update(env)
    os.setpgrp()  # so that the signal reaches the workers, too, as Ctrl-C in a terminal does
    redirect(1, os.devnull)
    redirect(2, stderr)
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
        (signal.SIGINT, ("clip_gradient", 5), ["--workers", "2", "--augment", "seed"], (6, 2)),
        (signal.SIGTERM, ("clip_gradient", 4), ["--workers", "2", "--accumulate", "2"], (5, 2)),
        (signal.SIGINT, ("clip_gradient", 7), [], (8, 4)),  # in the last step of an epoch
        (signal.SIGTERM, ("evaluate", 1), ["--workers", "1"], (8, 4)),  # in validation
        (signal.SIGTERM, ("log_row", 1), [], (9, 1)),  # after it: the next epoch has begun
        (signal.SIGINT, ("cache_scan", 2), [], None),  # before all training
    ],
)
def test_a_signal_stops_the_run_after_its_step_and_resume_ends_as_if_left_alone(
    run_args, tmp_path, alone, number, moment, changes, saved
):
    """Exit code 143 or 130, one line on stderr with the command that goes on, no word from the workers."""
    told, last = tmp_path / "stderr", tmp_path / "run" / "last.pt"
    arguments = [*run_args, *TINY, *changes, "--cache", str(tmp_path / "cold")]
    assert run_signalled(arguments, number, moment, told) == 128 + number
    assert last.exists() == bool(saved)
    if saved:
        checkpoint = predict.load_checkpoint(last)
        assert (checkpoint["step"], len(checkpoint["part"]["losses"])) == saved
    assert resume_as_told(told.read_text()) == number.name
    assert same_end(alone(run_args, *changes[2:]), tmp_path / "run")  # the number of workers changes nothing


def test_processes_stop_after_the_same_step_whichever_got_the_signal(run_args, tmp_path):
    """One that went on alone would wait for the others for ever."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}

    def run(out, moment, *changes):
        arguments = [*run_args, *TINY, "--norm", "instance", "--out", str(tmp_path / out), *changes]
        ranks = [server.Process(target=signalled, args=(
            arguments, signal.SIGTERM, moment if rank == 1 else ("evaluate", -1), tmp_path / f"stderr{rank}",
            cluster | {"RANK": str(rank), "LOCAL_RANK": str(rank)})) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        return [rank.exitcode for rank in ranks]

    assert run("whole", ("evaluate", -1)) == [0, 0]
    assert run("parts", ("clip_gradient", 5)) == [143, 143]
    assert predict.load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 6
    told = [(tmp_path / f"stderr{rank}").read_text() for rank in range(2)]
    assert "to go on: torchrun --nproc-per-node 2 -- train.py" in told[0] and "stopped" not in told[1]
    assert run("parts", ("evaluate", 1), "--resume") == [143, 143]  # in validation
    assert predict.load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 12
    assert run("parts", ("evaluate", -1), "--resume") == [0, 0]
    assert same_end(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="pip install -r requirements-dev.txt")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, ("clip_gradient", 5)), pytest.param(signal.SIGTERM, ("evaluate", 2), marks=pytest.mark.slow)],
)
def test_lightning_stops_and_goes_on_from_its_last_epoch(run_args, tmp_path, number, moment):
    arguments = [*run_args, *TINY, "--engine", "lightning", "--workers", "1"]
    assert run_signalled(arguments, number, moment, tmp_path / "stderr") == 128 + number
    assert predict.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 0
    told = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert told.startswith(f"stopped by {number.name}; to go on: python train.py")
    assert train.main([*arguments, "--resume"]) == 0
    assert train.main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    ends = [predict.load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("run", "whole")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    """But not within a second of the first: `timeout`, for one, signals the process and then its whole group."""
    codes, run = [], types.SimpleNamespace(stop=0, stop_time=0.0)
    monkeypatch.setattr(os, "_exit", codes.append)
    train.note(run, signal.SIGTERM)
    train.note(run, signal.SIGTERM)
    assert run.stop == signal.SIGTERM and codes == []
    run.stop_time -= 2
    train.note(run, signal.SIGINT)
    assert codes == [130] and run.stop == signal.SIGTERM


def worker(ready):
    train.outlive_signals(0)
    ready.set()
    time.sleep(60)


def test_workers_outlive_the_signals_that_the_main_process_answers(run_args):
    ready = server.Event()
    process = server.Process(target=worker, args=(ready,))
    process.start()
    assert ready.wait(60)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
    process.join(0.3)
    assert process.is_alive()
    process.kill()
    assert train.prepare(train.parse_args([*run_args, "--workers", "1"])).loader.worker_init_fn is train.outlive_signals


def test_last_is_saved_after_best(run_args, monkeypatch):
    """A run killed between the two resumes from the former last.pt, and saves both anew."""
    names, write_atomically = [], data.write_atomically

    def write(path, fill):
        names.append(path.name)
        write_atomically(path, fill)

    monkeypatch.setattr(data, "write_atomically", write)
    assert train.main([*run_args, *TINY]) == 0
    assert names.index("best.pt") < names.index("last.pt")


def test_leftovers_of_the_killed_are_removed_and_those_of_the_living_are_not(tmp_path):
    for name, age in (("old", 3700), ("young", 10)):
        (tmp_path / f".{name}.tmp").touch()
        os.utime(tmp_path / f".{name}.tmp", (time.time() - age,) * 2)
    (tmp_path / "scan.npy").touch()
    data.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".young.tmp", "scan.npy"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_real_command_stops_at_ctrl_c(run_args, tmp_path, processes):
    """As a terminal does it: the signal goes to the whole process group, workers and launcher too."""
    arguments = [*run_args, *TINY, "--epochs", "100", "--workers", "2", "--norm", "instance"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"] if processes > 1 else []
    job = subprocess.Popen([sys.executable, *torchrun, str(ROOT / "train.py"), *arguments], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    for line in job.stdout:
        if line.startswith("epoch   2"):
            os.killpg(job.pid, signal.SIGINT)
            break
    told = job.communicate(timeout=60)[1]
    assert "stopped by SIGINT; to go on: " in told
    assert processes > 1 or job.returncode == 130 and "Traceback" not in told  # torchrun's code and words are its own
    assert predict.load_checkpoint(tmp_path / "run" / "last.pt")["part"]


# ----------------------------------------------------------------------------------------------------------- full disks


class Full:
    """A file on a disk that is full after 100 bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        self.file.write(bytes(content)[: max(100 - self.file.tell(), 0)])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk(monkeypatch, ending, spare=0):
    """The disk is full for files whose name ends so, after `spare` of them."""
    write_atomically, count = data.write_atomically, itertools.count()

    def write(path, fill):
        full = path.name.endswith(ending) and next(count) >= spare
        write_atomically(path, lambda file: fill(Full(file) if full and not isinstance(file, io.BytesIO) else file))

    for module in (data, predict):
        monkeypatch.setattr(module, "write_atomically", write)


def said(capsys, name):
    """One line on stderr: the file, the reason, the bytes."""
    (line,) = capsys.readouterr().err.splitlines()
    found = re.fullmatch(rf".*{name}: No space left on device; ([\d,]+) bytes to write, ([\d,]+) bytes free", line)
    assert found, line
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize("ending", [".image.npy", ".json", "split.json"])
def test_full_disk_before_training(run_args, tmp_path, monkeypatch, capsys, ending):
    with monkeypatch.context() as patch:
        fill_disk(patch, ending)
        assert train.main([*run_args, *TINY]) == 2
    assert said(capsys, re.escape(ending)) > 100 or ending == ".json"
    assert not list(tmp_path.rglob(".*.tmp")) and not (tmp_path / "run" / "last.pt").exists()
    assert train.main([*run_args, *TINY, "--resume"]) == 0


@pytest.mark.parametrize(("name", "spare"), [("last.pt", 1), ("best.pt", 0), ("log.csv", 2)])
def test_full_disk_in_training(run_args, tmp_path, monkeypatch, capsys, alone, name, spare):
    """The former checkpoint survives, and with room again the run goes on as if nothing had been."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_disk(patch, name, spare)
        assert train.main([*run_args, *TINY]) == 2
    needed = said(capsys, name)
    assert not list(out.glob(".*.tmp")) and (out / name).exists() == (spare > 0)
    if spare:
        assert predict.load_checkpoint(out / "last.pt")["epoch"] == spare - 1
    assert train.main([*run_args, *TINY, "--resume"]) == 0
    assert same_end(alone(run_args), out)
    assert abs((out / name).stat().st_size - needed) < 2000  # an epoch more in the log


def test_full_disk_in_prediction(run_args, phantoms, tmp_path, monkeypatch, capsys, alone):
    command = [str(phantoms), "--checkpoint", str(alone(run_args) / "last.pt"), "--out", str(tmp_path / "masks")]
    command += ["--held-out", "--labels", str(phantoms / "labelsTr")]
    for ending, left in (("la_003.nii.gz", 1), ("scores.csv", 2)):
        capsys.readouterr()
        with monkeypatch.context() as patch:
            fill_disk(patch, ending)
            assert predict.main(command) == 2
        assert said(capsys, ending) > 100 and len(os.listdir(tmp_path / "masks")) == left


def limited(arguments, limit, stderr):
    redirect(1, os.devnull)
    redirect(2, stderr)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(train.main(arguments))


def test_full_disk_under_a_large_tensor(tmp_path):
    """Small pieces still fit into the buffer, so torch.save raises a RuntimeError, about positions in a zip file."""

    class Buffered(Full):
        def write(self, content):
            return self.file.write(content) if len(content) < 4096 else super().write(content)

    def fill(file):
        torch.save(torch.zeros(200_000), file if isinstance(file, io.BytesIO) else Buffered(file))

    with pytest.raises(data.DataError, match="No space left on device; 80.,... bytes to write"):
        data.write_atomically(tmp_path / "last.pt", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "limit"), [(".npy", 60_000), ("best.pt", 90_000)])
def test_no_file_may_grow_beyond_a_limit(run_args, tmp_path, name, limit):
    """The same by the system itself: the words are its own, or NumPy's."""
    told = tmp_path / "stderr"
    process = server.Process(target=limited, args=([*run_args, *TINY, "--fold", "all"], limit, told))
    process.start()
    process.join(120)
    assert process.exitcode == 2
    line = re.fullmatch(r"(.*): (.*); ([\d,]+) bytes to write, [\d,]+ bytes free\n", told.read_text())
    assert line and line[1].endswith(name) and int(line[3].replace(",", "")) > limit
    assert not list(tmp_path.rglob(".*.tmp"))


def test_tensorboard_on_a_full_disk_does_not_spoil_the_run(run_args, tmp_path, monkeypatch, capsys, alone):
    """Its writer fails in a thread of its own: nothing hangs, the log and the weights are those of every other run."""
    write, count = RecordWriter.write, itertools.count()

    def full(writer, content):
        if next(count) > 20:  # in the second epoch
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(writer, content)

    monkeypatch.setattr(RecordWriter, "write", full)
    assert train.main([*run_args, *TINY]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("logs/run: No space left on device; TensorBoard does not" in line for line in told)
    assert same_end(alone(run_args), tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ long runs


@pytest.mark.parametrize(("epochs", "steps"), [(8, 2), pytest.param(400, 5, marks=pytest.mark.slow)])
def test_memory_figures_and_open_files_stay_flat(run_args, monkeypatch, epochs, steps):
    """Pictures at every epoch: nothing of an epoch stays. The last three quarters of the run are looked at."""
    samples, write_log = [], train.write_log

    def sample(*args):
        write_log(*args)
        gc.collect()
        figures = sum(type(thing) is Figure for thing in gc.get_objects())
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
        samples.append((resident, figures, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(train, "write_log", sample)
    changes = ["--epochs", str(epochs), "--limit-batches", str(steps), "--batch-size", "2", "--augment", "seed"]
    train.train(train.parse_args([*run_args, *changes]))
    memory, figures, files = (list(values) for values in zip(*samples[epochs // 4 :], strict=True))
    print(f"{epochs * steps} steps: {memory[0]:.1f} to {memory[-1]:.1f} MB, at most {max(memory):.1f}; "
          f"{max(figures)} figures, {files[0]} to {files[-1]} open files")
    assert len(samples) == epochs and max(memory) - memory[0] < 8
    assert max(figures) == min(figures) <= 1 and max(files) == min(files)
