"""Seconds per epoch of the hand-written loop over Lightning's, interleaved in one run; and of two processes over one.

    python benchmarks/engines.py [--rounds 5] [--device cuda]        # benchmarks/results/engines/engines_cpu.json

Both engines train the same network on the same phantom scans with the same settings; each run is a process of its own.
An epoch lasts from the line that its predecessor printed to the line that it prints: batches, log, checkpoint and the
start of the next. The first, which starts workers and fills caches, is left out. The ratio of a round is that of its
neighbours in time, so that a machine that is shared slows both; the median over the rounds is reported, with all of
them. The JSON is written after each row, and a run that was stopped goes on with the rows that are not in it.
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
from pathlib import Path

from record import ROOT, commit, hardware

sys.path.insert(0, str(ROOT))
import phantom  # noqa: E402


def epoch_seconds(launcher: list[str], arguments: list[str], out: Path) -> float:
    """Median seconds of an epoch, without the first."""
    # One thread for each core and process: torchrun's own choice would be a single one, ours all cores for each.
    processes = int(launcher[-2]) if "torch.distributed.run" in launcher else 1
    environment = os.environ | {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))}
    command = [*launcher, str(ROOT / "train.py"), *arguments, "--out", str(out)]
    stamps = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        for line in run.stdout:
            if line.startswith("epoch "):
                stamps.append(time.perf_counter())
        errors = run.stderr.read()
    if run.returncode:
        raise RuntimeError(errors)
    return statistics.median(b - a for a, b in zip(stamps[:-1], stamps[1:], strict=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny networks, one round: does it run at all?")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "engines")
    args = parser.parse_args(argv)
    version, path = commit(), args.results / f"engines_{args.device}.json"
    python = [sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    # Sizes that keep the whole run near ten minutes on two cores: few batches, and small slices for the large network.
    small = ["--width", "8", "--size", "128", "96", "--limit-batches", "30", "--epochs", "4"]
    large = ["--width", "64", "--size", "64", "64", "--limit-batches", "5", "--epochs", "3"]
    if args.quick:
        small = large = ["--width", "2", "--depth", "1", "--size", "16", "16", "--limit-batches", "2", "--epochs", "2"]
    pairs = {
        "loop / Lightning, width 8": ((python, [*small]), (python, [*small, "--engine", "lightning"])),
        "loop / Lightning, width 64": ((python, [*large]), (python, [*large, "--engine", "lightning"])),
        "2 processes / 1, width 8": ((torchrun, [*small]), (python, [*small])),
        "2 processes / 1, width 64": ((torchrun, [*large]), (python, [*large])),
    }
    record = json.loads(path.read_text()) if path.exists() else {"rows": []}
    done = [row["row"] for row in record["rows"]]
    with tempfile.TemporaryDirectory() as folder:
        scans = phantom.write_dataset(Path(folder, "data"), scans=20, seed=0)
        common = ["--data", str(scans), "--cache", f"{folder}/cache", "--logs", f"{folder}/logs", "--device",
                  args.device, "--fold", "all", "--workers", "1"]
        for name, sides in pairs.items():
            if name in done:
                continue
            seconds = []
            for n in range(args.rounds):
                order = sides if n % 2 == 0 else sides[::-1]  # A B, B A, ...
                taken = [epoch_seconds(launcher, [*common, *extra], Path(folder, f"{name.replace('/', '')}-{n}-{i}"))
                         for i, (launcher, extra) in enumerate(order)]
                seconds.append(taken if n % 2 == 0 else taken[::-1])
            ratios = [a / b for a, b in seconds]
            row = {"row": name, "ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds,
                   "arguments": sides[1][1], "commit": version, "date": datetime.date.today().isoformat()}
            print(f"{name:36} {row['ratio']:.3f}   ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
            record = {"command": f"python benchmarks/engines.py --rounds {args.rounds} --device {args.device}",
                      "hardware": hardware(), "rows": [*record["rows"], row]}
            args.results.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
