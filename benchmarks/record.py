"""Train, predict the held-out scans from files, score the written masks, and keep all of it as one JSON.

    python benchmarks/record.py NAME --data DIR [others of train.py] [-- others of predict.py]   # results/NAME.json

Every accuracy in the README is read from such a file. It names the command, commit, hardware, versions and date, and
holds the scores of each scan (of the last epoch, from the masks on disk, distances in mm and in voxels) and the
training log. Stopped, the same command goes on where it was.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402
from metrics import score  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def hardware(device: str) -> str:
    """The GPU, or the CPU with its cores and instructions; `device` as --device has it."""
    if predict.pick_device(device).type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return f"CPU, {os.cpu_count()} cores, {model}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    run = lambda *command: subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    return run("rev-parse", "--short", "HEAD") + ("+changes" if run("status", "--porcelain", "-uno") else "")


def shown(arguments: Sequence[str]) -> str:
    """Arguments as one would type them elsewhere: no path of the machine they ran on."""
    words, hidden = [], ("--out", "--cache", "--tensorboard")
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word not in hidden and before not in hidden:
            words.append(Path(word).name if before == "--data" else word)
    return shlex.join(words)


def record(name: str, arguments: Sequence[str], prediction: Sequence[str] = (), results: Path = RESULTS) -> dict:
    """Train (or go on, or take the finished run), predict from files, write `results`/NAME.json.

    Args:
        arguments: of train.py, `--data` among them; with `--out` a run that was stopped goes on, one that ended stays.
        prediction: more arguments of predict.py, such as `--largest-component`.
    """
    args = train.parse_args([*arguments, "--resume"] if "--out" in arguments else arguments)
    checkpoint = train.train(args)
    last, labels = f"{checkpoint['out']}/last.pt", {pair.name: pair.label for pair in data.find_pairs(args.data)}
    rows = predict.predict(predict.parse_args([
        args.data, "--checkpoint", last, "--out", f"{checkpoint['out']}/masks", "--labels",
        str(next(iter(labels.values())).parent), "--held-out", "--device", args.device, "--precision", args.precision,
        *prediction]))
    for row in rows:
        masks = (np.asarray(nib.load(path).dataobj) for path in (row.pop("mask"), labels[row["name"]]))
        mask, truth = (np.isin(array, args.label) if args.label and i else array > 0 for i, array in enumerate(masks))
        row |= {f"{key}_voxels": score(mask, truth, (1, 1, 1))[key] for key in ("hd95", "assd")}
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0] if key != "name"}
    content = {
        "command": f"python benchmarks/record.py {name} {shown(arguments)}"
                   + (f" -- {shlex.join(prediction)}" if prediction else ""),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(args.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "parameters": sum(value.numel() for key, value in checkpoint["model"].items()
                          if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))),
        "train_scans": len(checkpoint["split"]["train"]),
        "minutes": sum(row["system/seconds"] + row["system/validation_seconds"] for row in checkpoint["log"]) / 60,
        "mean": mean,
        "worst_dice": min(row["dice"] for row in rows),
        "scores": rows,
        "log": checkpoint["log"],
    }
    path = results / f"{name}.json"
    data.write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
    print(f"{path}\nfrom the masks on disk: {predict.summarise(rows)}", flush=True)
    return content


if __name__ == "__main__":
    words = [*sys.argv[2:], "--"]
    end = words.index("--")
    record(sys.argv[1], words[:end], words[end + 1 : -1])
