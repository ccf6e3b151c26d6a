"""The ladder: from the recipe that this project started from to what it is now, one change a row, each row measured.

    python benchmarks/accuracy.py --data DIR --budget cpu                    # 2 cores: hours in the background
    python benchmarks/accuracy.py --data DIR --budget gpu                    # one H200: 25 minutes, by estimate
    python benchmarks/accuracy.py --data DIR --budget gpu --limit-batches 2  # two epochs of 2 batches, results in runs/
    python benchmarks/accuracy.py --data DIR --budget cpu --only seed norm   # some rows

Rows that have a JSON under benchmarks/results/ladder/ are done and are passed over; a row that was stopped goes on
where it was. Every row trains on the same scans of fold 0 (`--fold` for another), and is scored from the masks on disk,
after its last epoch. `python benchmarks/table.py --write` puts the rows into the README.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import record

SEED = {"depth": "3", "norm": "none", "loss": "dice", "lr": "1e-4", "schedule": "constant", "weight-decay": "0",
        "clip": "0", "augment": "seed", "normalise": "minmax"}
# Row: (the row that it changes, what it changes there, arguments of train.py, more arguments of predict.py).
ROWS = {
    "seed": (None, "the recipe at the start: no norm, Dice loss, Adam 1e-4", SEED, []),
    "norm": ("seed", "batch norm", {"norm": "batch"}, []),
    "optimiser": ("norm", "AdamW to 4e-3 in one cycle, clipped",
                  {"lr": "4e-3", "schedule": "onecycle", "weight-decay": "1e-2", "clip": "1"}, []),
    "loss": ("optimiser", "cross-entropy beside Dice", {"loss": "bce_dice"}, []),
    "augment": ("loss", "intensities augmented, too", {"augment": "full"}, []),
    "normalise": ("augment", "percentile instead of min-max", {"normalise": "percentile"}, []),
    "default": ("normalise", "four poolings: the default", {"depth": "4"}, []),
    "zscore": ("default", "z-score instead of percentile", {"normalise": "zscore"}, []),
    "geometry": ("default", "only the geometry augmented", {"augment": "seed"}, []),
    "batch": ("default", "8 slices a batch instead of 16: twice the steps", {"batch-size": "8"}, []),
    "attention": ("default", "attention gates", {"attention": ""}, []),
    "neighbours": ("default", "the slices above and below as channels (2.5D)", {"neighbours": "1"}, []),
    "volume": ("default", "3D: patches instead of slices", {"dims": "3"}, []),
    "component": ("default", "largest component only", {}, ["--largest-component"]),
}
BUDGETS = {  # for slices, and for patches, where an epoch is shorter
    "cpu": ({"width": "8", "epochs": "3"}, {"width": "16", "epochs": "20", "spacing": "1.25"}),
    # A GPU trains on more slices a second than train.py's few workers augment.
    "gpu": ({"width": "32", "epochs": "16", "workers": "12"}, {"width": "32", "epochs": "50", "workers": "12"}),
}


def arguments(name: str) -> dict[str, str]:
    """All arguments of train.py of a row: those of the row that it changes, and its own."""
    base, _, change, _ = ROWS[name]
    return (arguments(base) if base else {}) | change


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the rows of the ladder that have no result yet.")
    parser.add_argument("--data", required=True, metavar="DIR", help="as in train.py")
    parser.add_argument("--budget", required=True, choices=tuple(BUDGETS), help="how wide and how long")
    parser.add_argument("--only", nargs="+", metavar="ROW", choices=tuple(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--fold", default="0", metavar="K", help="the part that is scored, 0 to 4")
    parser.add_argument("--limit-batches", metavar="N", help="a dry run: 2 epochs of N batches, results in runs/dry")
    args = parser.parse_args()
    results, runs = record.RESULTS / "ladder", "runs/ladder"
    if args.limit_batches:
        results, runs = Path("runs/dry/results"), "runs/dry"
    for name in args.only or ROWS:
        _, change, own, prediction = ROWS[name]
        row = f"{args.budget}_{name}" + (f"_fold{args.fold}" if args.fold != "0" else "")
        if (results / f"{row}.json").exists():
            print(f"{row}: done")
            continue
        # A row that only predicts otherwise takes the run of the row that it changes.
        run = row if own else row.replace(name, ROWS[name][0])
        flags = arguments(name) | ({"fold": args.fold} if args.fold != "0" else {})
        flags |= BUDGETS[args.budget]["dims" in flags] | ({"epochs": "2"} if args.limit_batches else {})
        command = ["--data", args.data, *shlex.split(" ".join(f"--{flag} {value}" for flag, value in flags.items()))]
        command += ["--limit-batches", args.limit_batches] if args.limit_batches else []
        print(f"\n{row}: {change}", flush=True)
        record.record(row, [*command, "--out", f"{runs}/{run}"], prediction, results, change)


if __name__ == "__main__":
    sys.exit(main())
