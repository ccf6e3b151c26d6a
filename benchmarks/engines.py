"""Seconds per epoch of the hand-written loop over Lightning's, interleaved in one run; and of two processes over one.

    python benchmarks/engines.py [--rounds 5] [--device cuda]        # benchmarks/results/engines/engines_cpu.json

Both sides train the same network on the same phantom scans with the same settings; each run is a process of its own. An
epoch lasts from the line that its predecessor printed to the line that it prints: batches, log, checkpoint, and the
start of the next. The first, which starts workers and fills caches, is left out. The ratio of a round is that of its
neighbours in time, so that a machine that is shared slows both; the median over the rounds is reported, with all of
them, and the largest difference between the weights that the two engines end with: on a CPU, in float32, it should be
0. The JSON is written after each row, and a run that was stopped goes on with the rows that are not in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from record import RESULTS, ROOT, commit, hardware

import phantom
import predict

PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
# Sizes that keep the whole run near ten minutes on two cores: few batches, and small slices for the large network.
SMALL = ["--width", "8", "--size", "128", "96", "--limit-batches", "30", "--epochs", "4"]
LARGE = ["--width", "64", "--size", "64", "64", "--limit-batches", "5", "--epochs", "3"]
QUICK = ["--width", "2", "--depth", "1", "--size", "16", "16", "--limit-batches", "2", "--epochs", "2"]


def epoch_seconds(launcher: list[str], arguments: list[str], out: Path) -> float:
    """Median seconds of an epoch, without the first."""
    # One thread for each core and process: torchrun's own choice would be a single one, ours all cores for each.
    threads = max(torch.get_num_threads() // (2 if launcher is TORCHRUN else 1), 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [*launcher, str(ROOT / "train.py"), *arguments, "--out", str(out)]
    stamps, told = [], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        for line in run.stdout:
            told.append(line)
            if line.startswith("epoch "):
                stamps.append(time.perf_counter())
    if run.returncode:
        raise RuntimeError("".join(told))
    return statistics.median(b - a for a, b in zip(stamps[:-1], stamps[1:], strict=True))


def difference(one: Path, other: Path) -> float:
    """The largest absolute difference between the weights that two runs ended with."""
    a, b = (predict.load_checkpoint(out / "last.pt")["model"] for out in (one, other))
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a tiny network, one row: does it run at all?")
    parser.add_argument("--results", type=Path, default=RESULTS / "engines", metavar="DIR")
    args = parser.parse_args(argv)
    pairs = {}
    for width, size in ((8, SMALL), (64, LARGE)):
        pairs[f"loop / Lightning, width {width}"] = (PYTHON, size), (PYTHON, [*size, "--engine", "lightning"])
        pairs[f"2 processes / 1, width {width}"] = (TORCHRUN, size), (PYTHON, size)
    if args.quick:
        pairs = {"loop / Lightning": ((PYTHON, QUICK), (PYTHON, [*QUICK, "--engine", "lightning"]))}
    version, path = commit(), args.results / f"engines_{args.device}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        scans = phantom.write_dataset(Path(folder, "data"), scans=3 if args.quick else 20, seed=0)
        common = ["--data", str(scans), "--cache", f"{folder}/cache", "--tensorboard", f"{folder}/logs",
                  "--fold", "all", "--device", args.device, "--workers", "0" if args.quick else "1"]
        common += ["--precision", "fp32"] if args.device == "cpu" else []
        for number, (name, sides) in enumerate(pairs.items()):
            if name in [row["row"] for row in rows]:
                continue
            seconds, outs = [], []
            for n in range(args.rounds):
                outs = [Path(folder, f"{number}-{n}-{side}") for side in (0, 1)]
                taken = {}
                for side in (0, 1) if n % 2 == 0 else (1, 0):  # A B, B A, ...
                    launcher, words = sides[side]
                    taken[side] = epoch_seconds(launcher, [*common, *words], outs[side])
                seconds.append([taken[0], taken[1]])
            ratios = [a / b for a, b in seconds]
            row = {"row": name, "ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds,
                   "arguments": sides[1][1], "commit": version, "date": datetime.date.today().isoformat()}
            # Not of two processes: each normalises by its own half of a batch, so that theirs is another network.
            if "Lightning" in name:
                row["difference"] = difference(*outs)
            print(f"{name:30} {row['ratio']:.3f}   ({min(ratios):.3f} to {max(ratios):.3f})   "
                  f"difference of the weights {row.get('difference', '')}", flush=True)
            rows.append(row)
            content = {"command": f"python benchmarks/engines.py --rounds {args.rounds} --device {args.device}",
                       "hardware": hardware(args.device), "rows": rows}
            args.results.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
