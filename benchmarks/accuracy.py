"""The ladder: recipes, one change a row, each to be measured with several seeds.

    python benchmarks/accuracy.py --data DIR                            # all rows, seeds 0, 1, 2: many hours
    python benchmarks/accuracy.py --data DIR --only default --seeds 0 --fold 0 1 2 3 4     # each scan is scored once
    python benchmarks/accuracy.py --data Task04_Hippocampus --only anterior posterior --seeds 0 --fold 0 1 2 3 4
    python benchmarks/accuracy.py --data DIR --limit-batches 2          # a dry run: 1 epoch of 2 batches, in runs/dry

A run is one JSON of record.py, results/ladder/ROW_seedN.json (of other folds ROW_foldK_seedN.json; of the second data
set in results/hippocampus). Runs that have theirs are passed over, and one that was stopped goes on where it was.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import record

# Row: (the row that it changes, what it changes there, arguments of train.py, arguments of predict.py).
ROWS = {
    "default": ("", "no flag: patches, of voxels like these", "", ""),
    "large": ("", "twice the width, half as many epochs again", "--width 32 --epochs 18", ""),
    "slices": ("", "slices, whatever the voxels", "--dims 2", ""),
    "short": ("", "the short run", "--dims 2 --epochs 10", ""),
    # Before slices were averaged and an epoch was 250 steps: a pass over the scans then, of 352 steps, in 3D of 71.
    "former_short": ("", "the former short run", "--dims 2 --epochs 8 --steps 352", ""),
    "depth2": ("former_short", "two poolings instead of three", "--depth 2", ""),
    "classical": ("former_short", "the classical U-Net: no stem", "--stem 1 --depth 4 --width 8 --epochs 3", ""),
    "zscore": ("former_short", "z-score without clipping", "--normalise zscore", ""),
    "geometry": ("former_short", "only the geometry augmented", "--augment geometry", ""),
    "attention": ("former_short", "attention gates", "--attention", ""),
    "former": ("", "the former default", "--dims 2 --epochs 20 --steps 352", ""),
    "width32": ("former", "twice the width, two poolings", "--width 32 --depth 2 --epochs 8", ""),
    "stem2": ("former", "blocks of 2 x 2 voxels instead of 4 x 4", "--stem 2 --epochs 6", ""),
    "former_volume": ("", "the former 3D", "--dims 3 --width 32 --epochs 64 --steps 71", ""),
    "volume_component": ("former_volume", "largest component only", "", "--largest-component"),
    "seed": ("", "the first recipe: no norm, Dice loss, Adam 1e-4",  # see train.py
             "--dims 2 --width 64 --depth 3 --stem 1 --norm none --loss dice --lr 0.0001 --schedule constant "
             "--weight-decay 0 --clip 0 --augment geometry --normalise minmax --crop 32 --epochs 1 --steps 352", ""),
    # A second data set: the Decathlon's Task04_Hippocampus, its two labels.
    "anterior": ("", "the anterior hippocampus", "--label 1", ""),
    "posterior": ("", "the posterior hippocampus", "--label 2", ""),
    "long_posterior": ("posterior", "half as many epochs again", "--epochs 18", ""),
    "instance_posterior": ("posterior", "instance norm", "--norm instance", ""),
    "former_anterior": ("", "by the former 3D", "--label 1 --width 32 --stem 2 --epochs 18", ""),
    "former_posterior": ("", "by the former 3D", "--label 2 --width 32 --stem 2 --epochs 18", ""),
}
HIPPOCAMPUS = tuple(row for row in ROWS if row.endswith("terior"))


def arguments(row: str) -> str:
    """All arguments of train.py of a row: those of the row that it changes, then its own, which win."""
    base, _, own, _ = ROWS[row]
    return f"{arguments(base)} {own}".strip() if base else own


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the runs of the ladder that have no result yet. What is not "
                                     "named here is handed on to train.py: --cache, --workers, --device.")
    add, ladder = parser.add_argument, [row for row in ROWS if row not in HIPPOCAMPUS]
    add("--data", required=True, metavar="DIR", help="as in train.py")
    add("--only", nargs="+", metavar="ROW", choices=ROWS, default=ladder, help=", ".join(ROWS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default 0 1 2")
    add("--fold", nargs="+", type=int, default=[0], metavar="K", help="the parts that are scored, 0 to 4")
    add("--limit-batches", type=int, metavar="N", help="a dry run: 1 epoch of N batches, in runs/dry")
    args, others = parser.parse_known_args(argv)
    results, runs = record.RESULTS, Path("runs/ladder")
    if args.limit_batches:
        results, runs = Path("runs/dry/results"), Path("runs/dry")
        others += ["--epochs", "1", "--limit-batches", str(args.limit_batches)]
    for seed, fold, row in itertools.product(args.seeds, args.fold, args.only):
        base, change, own, prediction = ROWS[row]
        tail = f"_fold{fold}_seed{seed}" if fold else f"_seed{seed}"
        folder = results / ("hippocampus" if row in HIPPOCAMPUS else "ladder")
        if (folder / f"{row}{tail}.json").exists():
            print(f"{row}{tail}: done")
            continue
        print(f"\n{row}{tail}: {change}", flush=True)
        out = runs / f"{row if own or not base else base}{tail}"  # without changes of its own: that of its base
        words = ["--data", args.data, *arguments(row).split(), "--fold", str(fold), "--seed", str(seed), *others]
        record.record(f"{row}{tail}", [*words, "--out", str(out)], prediction.split(), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
