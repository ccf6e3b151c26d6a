"""Seconds per epoch of the hand-written loop over Lightning's, interleaved in one run; and of two processes over one.

    python benchmarks/engines.py [--rounds 5] [--device cuda]        # benchmarks/results/engines/*.json

Both engines train the same network on the same phantom scans with the same settings; each run is a process of its own,
and its first epoch, which starts workers and fills caches, is left out. The ratio of a round is that of its neighbours
in time, so that a machine that is shared slows both; the median over the rounds is reported, with all of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import ROOT, commit, hardware

sys.path.insert(0, str(ROOT))
import phantom  # noqa: E402
from predict import load_checkpoint  # noqa: E402


def epoch_seconds(launcher: list[str], arguments: list[str], out: Path) -> float:
    """Median seconds of an epoch's training batches, without the first epoch's."""
    subprocess.run([*launcher, str(ROOT / "train.py"), *arguments, "--out", str(out)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return statistics.median(row["seconds"] for row in load_checkpoint(out / "last.pt")["log"][1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scans", type=int, default=6)
    parser.add_argument("--batches", type=int, default=6, help="batches an epoch")
    parser.add_argument("--widths", type=int, nargs="+", default=(8, 64), help="a small and a large network")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "engines")
    args = parser.parse_args()
    python, torchrun = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scans = str(phantom.write_dataset(Path(folder, "data"), scans=args.scans, seed=0))
        common = ["--data", scans, "--cache", f"{folder}/cache", "--logs", f"{folder}/logs", "--device", args.device,
                  "--fold", "all", "--epochs", "3", "--workers", "1", "--limit-batches", str(args.batches)]
        pairs = [(f"loop / lightning, width {width}", (python, ["--width", str(width), "--engine", "loop"]),
                  (python, ["--width", str(width), "--engine", "lightning"])) for width in args.widths]
        pairs += [("2 processes / 1, width 8", ([*torchrun, "--nproc-per-node", "2", "--"], ["--width", "8"]),
                   (python, ["--width", "8"]))]
        for name, *sides in pairs:
            seconds = []
            for n in range(args.rounds):
                order = sides if n % 2 == 0 else sides[::-1]  # A B, B A, ...
                taken = [epoch_seconds(launcher, [*common, *extra], Path(folder, f"run-{len(rows)}-{n}-{i}"))
                         for i, (launcher, extra) in enumerate(order)]
                seconds.append(taken if n % 2 == 0 else taken[::-1])
            ratios = [a / b for a, b in seconds]
            rows.append({"row": name, "ratio": statistics.median(ratios), "ratios": ratios, "seconds": seconds})
            print(f"{name:36} {rows[-1]['ratio']:.3f}   ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    record = {"command": f"python benchmarks/engines.py --rounds {args.rounds} --batches {args.batches}",
              "commit": commit(), "date": datetime.date.today().isoformat(), "hardware": hardware(), "rows": rows}
    args.results.mkdir(parents=True, exist_ok=True)
    device = "cuda" if "CPU" not in record["hardware"] else "cpu"
    (args.results / f"engines_{device}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
