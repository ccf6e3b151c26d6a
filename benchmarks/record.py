"""Train, predict the held-out scans from files, score the written masks, and keep all of it as one JSON.

    python benchmarks/record.py NAME --data DIR [any other argument of train.py]     # benchmarks/results/NAME.json

Every accuracy in the README is read from such a file. It names the command, commit, hardware, versions and date, and
holds the scores of each scan (of the last epoch, from the masks on disk, distances in mm) and the training log.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import predict  # noqa: E402
import train  # noqa: E402


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    model = names[0] if names else platform.processor()
    return f"CPU, {os.cpu_count()} cores, {model}, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    run = lambda *command: subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: E731
    return run("rev-parse", "--short", "HEAD") + ("+changes" if run("status", "--porcelain", "-uno") else "")


def main() -> int:
    name, arguments = sys.argv[1], sys.argv[2:]
    result = train.train(train.parse_args(arguments))
    args = train.parse_args([*arguments, "--out", result["out"]])
    source = str(Path(args.cache) / "phantom") if args.data == "phantom" else args.data
    labels = next(d for d in (Path(source) / "labelsTr", Path(source) / "labels") if d.is_dir())
    rows = predict.predict(
        argparse.Namespace(
            scans=[source], checkpoint=result["checkpoint"], out=f"{result['out']}/masks", labels=str(labels),
            held_out=True, probability=False, largest_component=False, flip=False, movie=False, batch_size=16,
            device=args.device, precision=args.precision,
        )
    )
    checkpoint = predict.load_checkpoint(result["checkpoint"])
    scores = [{key: row[key] for key in row if key != "mask"} for row in rows]
    mean = {key: float(np.mean([row[key] for row in scores])) for key in scores[0] if key != "name"}
    shown = [a if a != args.data else Path(args.data).name for a in arguments]  # no path of the machine it ran on
    shown = [a for i, a in enumerate(shown) if not {a, shown[i - 1]} & {"--out", "--cache", "--logs"}]
    record = {
        "command": f"python benchmarks/record.py {name} {shlex.join(shown)}",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "parameters": sum(v.numel() for k, v in checkpoint["model"].items() if "running" not in k and "num_b" not in k),
        "train_scans": len(checkpoint["split"]["train"]),
        "minutes": result["seconds"] / 60,
        "dice_in_training": result["dice"],
        "best_epoch_dice": result["best"],
        "mean": mean,
        "std": {key: float(np.std([row[key] for row in scores])) for key in mean},
        "worst_dice": min(row["dice"] for row in scores),
        "scores": scores,
        "log": checkpoint["log"],
    }
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path}\nfrom the masks on disk: {predict.summarise(scores)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
