"""Train, predict the held-out scans from files, score the written masks, and keep all of it as one JSON.

    python benchmarks/record.py NAME --data DIR [others of train.py] [-- others of predict.py]   # results/NAME.json

Every accuracy in the README is read from such a file: command, commit, hardware, date, the scores of each scan (of the
last epoch, from the masks on disk), the training log, and what it took. Stopped, the same command goes on where it was.
"""

import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import data  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def write(path: Path, content: dict) -> None:
    data.write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def provenance(command: str, device: str) -> dict:
    """What one must know of a measurement to repeat it; `device` as --device has it."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changes = git(["git", "status", "--porcelain", "-uno"]).stdout
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(": ")[1] for line in info.splitlines() if "model name" in line), platform.processor())
    hardware = f"CPU, {os.cpu_count()} cores, {model}, {torch.backends.cpu.get_cpu_capability()}"
    if predict.pick_device(device).type == "cuda":
        hardware = torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"command": command, "commit": commit + "+changes" * bool(changes), "hardware": hardware, "cores": cores,
            "threads": torch.get_num_threads(), "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}


def shown(arguments: Sequence[str]) -> str:
    """Arguments as one would type them elsewhere: no path of the machine they ran on."""
    words, hidden = [], ("--out", "--cache", "--tensorboard")
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word not in hidden and before not in hidden:
            words.append(Path(word).name if before == "--data" else word)
    return shlex.join(words)


@contextlib.contextmanager
def watch(every: float = 1.0) -> Iterator[dict]:
    """While the block runs: the most memory, and the seconds that the loop stood still for its next batch.

    Memory is PSS, in which a shared page counts once; Linux alone knows it. A GPU waits no longer than the loop does.
    """
    found, ended, plain = {"gb": 0.0, "waited": 0.0}, threading.Event(), DataLoader.__iter__

    def look() -> None:
        while not ended.wait(every):
            held = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it has ended
                    held += getattr(process.memory_full_info(), "pss", 0)
            found["gb"] = max(found["gb"], held / 1e9)

    def timed(loader: DataLoader) -> Iterator:
        begun = time.perf_counter()
        for batch in plain(loader):
            found["waited"] += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        with mock.patch.object(DataLoader, "__iter__", timed):
            yield found
    finally:
        ended.set()
        watcher.join()


def record(name: str, arguments: Sequence[str], prediction: Sequence[str] = (), results: Path = RESULTS) -> dict:
    """Train by `arguments`, predict from files with those of `prediction`, too, and write `results`/NAME.json.

    With `--out` among the arguments a run that was stopped goes on, and one that has ended is taken as it is.
    """
    args = train.parse_args([*arguments, "--resume"] if "--out" in arguments else arguments)
    command = f"python benchmarks/record.py {Path(name).name} {shown(arguments)}"
    content = provenance(command + (f" -- {shlex.join(prediction)}" if prediction else ""), args.device)
    begins = not (args.out and Path(args.out, "last.pt").exists())
    with watch() as found:
        checkpoint = train.train(args)
    last, labels = f"{checkpoint['out']}/last.pt", data.find_pairs(args.data)[0].label.parent
    rows = predict.predict(predict.parse_args([
        args.data, "--checkpoint", last, "--out", f"{checkpoint['out']}/masks", "--labels", str(labels), "--held-out",
        "--device", args.device, "--precision", checkpoint["args"]["precision"], *prediction]))
    log, numbers = checkpoint["log"], [key for key, value in rows[0].items() if isinstance(value, int | float)]
    minutes = np.cumsum([row["system/seconds"] + row["system/validation_seconds"] for row in log]) / 60
    content |= {
        "threads": torch.get_num_threads(),
        "parameters": sum(value.numel() for key, value in checkpoint["model"].items()
                          if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))),
        "train_scans": len(checkpoint["split"]["train"]),
        "minutes": minutes[-1],
        "minutes_to": {f"{goal:.2f}": next((m for m, row in zip(minutes, log, strict=True) if row["val/dice"] >= goal),
                                           None) for goal in (0.90, 0.91, 0.92)},  # of validation Dice
        "mean": {key: float(np.mean([row[key] for row in rows])) for key in numbers},
        "worst_dice": min(row["dice"] for row in rows),
        "scores": [{key: row[key] for key in ("name", *numbers)} for row in rows],
        "log": log,
    }
    if begins:  # else only a part of the training was watched, or none
        content["memory"] = {"processes_gb": found["gb"], "gpu_gb": max(row["system/gpu_memory_gb"] for row in log)}
        content["waited_for_data"] = found["waited"] / sum(row["system/seconds"] for row in log)  # a share, at most
    write(results / f"{name}.json", content)
    print(f"{results / name}.json\nfrom the masks on disk: {predict.summarise(rows)}", flush=True)
    return content


if __name__ == "__main__":
    words = [*sys.argv[2:], "--"]
    end = words.index("--")
    record(sys.argv[1], words[:end], words[end + 1 : -1])
