"""The tables of the README: results, ladder and timings from the JSON under benchmarks/results/, files from the code.

    python benchmarks/table.py            # print them
    python benchmarks/table.py --write    # put them into README.md, between their marks
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import sys
import tokenize
from pathlib import Path

import accuracy
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("unet", "losses", "metrics", "data", "train", "predict", "visualize", "phantom")


def markdown(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text, to the left, and whose others are numbers, to the right."""
    lines = [head, ["---"] * text_columns + ["---:"] * (len(head) - text_columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def distance(mean: float, std: float) -> str:
    """Infinite where a mask was empty: there is no distance to average."""
    return f"{mean:.2f} ± {std:.2f}" if math.isfinite(mean) else "∞"


def minutes_to(dice: float, log: list[dict]) -> str:
    """Minutes of training and validation until the mean Dice first stood at `dice` after an epoch; empty if never, or
    in a record from before the seconds of validation were kept."""
    passed = 0.0
    for row in log:
        passed += row["seconds"] + row.get("validation_seconds", math.nan)
        if row["dice_mean"] >= dice and not math.isnan(passed):
            return f"{passed / 60:.0f}"
    return ""


def long_runs() -> list[Path]:
    """Their JSON, the records and the 3D rows of the ladder, the highest Dice first."""
    paths = [*RESULTS.glob("*.json"), *(RESULTS / "ladder").glob("*_volume.json")]
    return sorted(paths, key=lambda path: -json.loads(path.read_text())["mean"]["dice"])


def results() -> str:
    """The long runs, and how soon they were how good."""
    rows, levels = [], (0.90, 0.91, 0.92, 0.93)
    for path in long_runs():
        record = json.loads(path.read_text())
        mean, std = record["mean"], record["std"]
        rows.append([
            f"[`{path.stem}`]({path.relative_to(ROOT)})", f"{mean['dice']:.4f} ± {std['dice']:.4f}",
            f"{record['worst_dice']:.4f}", f"{mean['jaccard']:.4f}", distance(mean["hd95"], std["hd95"]),
            distance(mean["assd"], std["assd"]), f"{len(record['log'])}", f"{record['minutes']:.0f}",
            *(minutes_to(level, record["log"]) for level in levels),
        ])
    head = ["run", "Dice", "worst", "Jaccard", "HD95 mm", "ASSD mm", "epochs", "minutes"]
    return markdown([*head, *(f"to {level:.2f}" for level in levels)], rows)


def ladder() -> str:
    """A row for each measured row of benchmarks/accuracy.py, in its order."""
    rows = []
    for budget in accuracy.BUDGETS:
        for path in (RESULTS / "ladder" / f"{budget}_{name}.json" for name in accuracy.ROWS):
            if path.exists():
                record = json.loads(path.read_text())
                mean, std = record["mean"], record["std"]
                rows.append([
                    f"[`{path.stem}`](benchmarks/results/ladder/{path.name})", record["change"],
                    f"{mean['dice']:.4f} ± {std['dice']:.4f}", f"{record['worst_dice']:.4f}", f"{mean['jaccard']:.4f}",
                    distance(mean["hd95_voxels"], std["hd95_voxels"]),
                    distance(mean["assd_voxels"], std["assd_voxels"]),
                    f"{record['parameters'] / 1e6:.2f}", f"{record['minutes']:.0f}",
                ])
    head = ["row", "what it changes", "Dice", "worst", "Jaccard", "HD95 voxels", "ASSD voxels", "M weights", "minutes"]
    return markdown(head, rows, text_columns=2)


def folds() -> str:
    """The rows of the ladder that were run on all five folds: each scan scored once, by a network that never saw it."""
    rows = []
    for row in (f"{budget}_{name}" for budget in accuracy.BUDGETS for name in accuracy.ROWS):
        paths = [RESULTS / "ladder" / f"{row}{fold}.json" for fold in ("", *(f"_fold{k}" for k in range(1, 5)))]
        if all(path.exists() for path in paths):
            records = [json.loads(path.read_text()) for path in paths]
            scans = [scan for record in records for scan in record["scores"]]
            columns = ([scan[key] for scan in scans] for key in ("dice", "jaccard", "hd95_voxels", "assd_voxels"))
            dice, jaccard, *distances = ((np.mean(column), np.std(column)) for column in columns)
            rows.append([f"`{row}`", f"{len(scans)}", "{:.4f} ± {:.4f}".format(*dice),
                         f"{min(scan['dice'] for scan in scans):.4f}", f"{jaccard[0]:.4f}",
                         *(distance(*both) for both in distances),
                         *(f"{record['mean']['dice']:.4f}" for record in records)])
    head = ["row", "scans", "Dice", "worst", "Jaccard", "HD95 voxels", "ASSD voxels"]
    return markdown([*head, *(f"fold {k}" for k in range(5))], rows)


def published() -> str:
    """Scores of the literature (`published.json` cites them) above this project's, distances in voxels."""
    rows = [[row["name"], *(f"{value:.2f}" for value in row["scores"])]
            for row in json.loads((RESULTS / "published" / "published.json").read_text())]
    for path in long_runs():
        mean = json.loads(path.read_text())["mean"]
        # The first record has only mm; these volumes are 0.625 mm in every direction.
        voxels = [mean.get(f"{key}_voxels", mean[key] / 0.625) for key in ("hd95", "assd")]
        scores = (100 * mean["dice"], 100 * mean["jaccard"], *voxels)
        rows.append([f"here: [`{path.stem}`]({path.relative_to(ROOT)})", *(f"{value:.2f}" for value in scores)])
    return markdown(["trained and scored on", "Dice %", "Jaccard %", "HD95", "ASSD"], rows)


def timings() -> str:
    rows = []
    for path in sorted((RESULTS / "engines").glob("*.json")):
        record = json.loads(path.read_text())
        for row in record["rows"]:
            spread = f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}"
            rows.append([f"{row['row']} ({path.stem.split('_')[1]})", f"{row['ratio']:.2f}", spread])
    return markdown(["seconds per epoch", "median ratio", "range"], rows)


def speed() -> str:
    rows = []
    for path in sorted((RESULTS / "speed").glob("*.json")):
        for number, row in json.loads(path.read_text())["rows"].items():
            for line in row["checks"]:
                met = {True: "yes", False: "**no**", None: ""}[line.get("met")]
                spread = f"{min(line['values']):.3g} to {max(line['values']):.3g}" if len(line["values"]) > 1 else ""
                rows.append([number, line["what"], f"{line['median']:.3g} {line['unit']}".strip(), spread,
                             line["goal"], met])
    return markdown(["row", "what", "median", "range", "goal", "met"], rows, text_columns=2)


def code_lines(source: str) -> int:
    """Lines that hold code: no docstrings, comments and blanks."""
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, node.end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for token in tokens if token.type not in silent for n in range(token.start[0], token.end[0] + 1)}
    return len(lines - texts)


def files() -> str:
    rows = []
    for name in FILES:
        source = (ROOT / f"{name}.py").read_text()
        purpose = ast.get_docstring(ast.parse(source)).splitlines()[0].rstrip(".")
        rows.append([f"[`{name}.py`]({name}.py)", purpose, str(code_lines(source))])
    return markdown(["file", "what it is", "lines of code"], rows, text_columns=2)


BLOCKS = {"results": results, "published": published, "ladder": ladder, "folds": folds, "timings": timings,
          "speed": speed, "files": files}

if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, make in BLOCKS.items():
        table = make()
        print(table, end="\n\n")
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        text = re.sub(f"{start}.*?{end}", lambda _, whole=f"{start}{table}\n{end}": whole, text, flags=re.S)
    if "--write" in sys.argv:
        readme.write_text(text)
