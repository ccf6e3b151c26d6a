"""The tables of the two READMEs: scores and timings from the JSON under benchmarks/results/, files from the code.

    python benchmarks/table.py            # print them
    python benchmarks/table.py --write    # put them between their marks, <!-- name --> and <!-- end -->

What has not been measured is left out.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path

import accuracy
import numpy as np
from record import RESULTS, ROOT

FILES = ("unet", "losses", "metrics", "data", "train", "predict", "visualize", "phantom")


def markdown(head: list[str], rows: list[list[str]], text_columns: int = 1) -> str:
    """A table whose first columns are text, to the left, and whose others are numbers, to the right."""
    if not rows:
        return "*Not measured yet.*"
    lines = [head, ["---"] * text_columns + ["---:"] * (len(head) - text_columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def read(folder: str, pattern: str = "*.json") -> list[dict]:
    """The JSON files of a folder of results, each with its own path."""
    paths = sorted((RESULTS / folder).glob(pattern))
    return [json.loads(path.read_text()) | {"path": f"results/{folder}/{path.name}"} for path in paths]


def runs(row: str, fold: int = 0) -> list[dict]:
    """The runs of a row of the ladder, one for each seed."""
    return read("ladder", f"{row}{f'_fold{fold}' if fold else ''}_seed*.json")


def of_all_folds(row: str) -> list[dict]:
    """The runs of a row on the five folds, seed 0: each scan scored once, by a network that never saw it. Else none."""
    records = [record for fold in range(5) for record in runs(row, fold)[:1]]
    return records if len(records) == 5 else []


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation (N - 1) of several values, or the one there is."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def of(records: list[dict], key: str) -> list[float]:
    """The mean over the scans of each run; of a distance that is infinite (an empty mask), infinite."""
    return [record["mean"][key] for record in records]


def machine(record: dict) -> str:
    """The GPU, or how many cores the run took of which processor."""
    if not record["hardware"].startswith("CPU"):
        return record["hardware"]
    return f"{record['threads']} core{'s' * (record['threads'] > 1)} of {record['hardware'].split(', ', 2)[-1]}"


def minutes(records: list[dict]) -> str:
    """How long a run took on each machine that had some."""
    machines = sorted({machine(record) for record in records}, reverse=True)
    means = (np.mean([record["minutes"] for record in records if machine(record) == name]) for name in machines)
    return "; ".join(f"{mean:.1f} on {name}" for mean, name in zip(means, machines, strict=True))


def expect() -> str:
    """For the front page: what the commands reach that one types first."""
    rows = []
    for row in ("short", "default", "volume"):
        if records := runs(row):
            words = shlex.join(accuracy.flags(accuracy.arguments(row)))
            every = [scan["dice"] for record in of_all_folds(row) for scan in record["scores"]]
            rows.append([f"`{f'python train.py --data DIR {words}'.strip()}`", minutes(records),
                         spread(of(records, "dice")), f"{min(record['worst_dice'] for record in records):.3f}",
                         spread(of(records, "hd95"), 1), f"{len(records)}",
                         f"{np.mean(every):.4f}" if every else ""])
    head = ["command", "minutes", "Dice", "worst scan", "HD95 mm", "runs", "Dice of all folds"]
    return markdown(head, rows, text_columns=2)


def ladder() -> str:
    """A line for each measured row of accuracy.py, in its order."""
    rows = []
    for row, (base, change, own, prediction) in accuracy.ROWS.items():
        if records := runs(row):
            words = shlex.join(accuracy.flags(own) + prediction)
            rows.append([
                f"[`{row}`]({records[0]['path']})", base or "", change + (f": `{words}`" if words else ""),
                spread(of(records, "dice")), f"{min(record['worst_dice'] for record in records):.4f}",
                spread(of(records, "jaccard")), spread(of(records, "hd95"), 2), spread(of(records, "assd"), 2),
                f"{records[0]['parameters'] / 1e6:.2f}", f"{len(records[0]['log'])}",
                minutes(records), f"{len(records)}"])
    head = ["row", "changes", "what", "Dice", "worst scan", "Jaccard", "HD95 mm", "ASSD mm", "M weights", "epochs"]
    return markdown([*head, "minutes", "runs"], rows, text_columns=3)


def folds() -> str:
    """The rows that were run on all five folds."""
    rows = []
    for row in accuracy.ROWS:
        if records := of_all_folds(row):
            scans = [scan for record in records for scan in record["scores"]]
            columns = {key: [scan[key] for scan in scans] for key in ("dice", "jaccard", "hd95", "assd")}
            rows.append([f"`{row}`", f"{len(scans)}", spread(columns["dice"]), f"{min(columns['dice']):.4f}",
                         f"{np.mean(columns['jaccard']):.4f}", spread(columns["hd95"], 2), spread(columns["assd"], 2),
                         *(f"{dice:.4f}" for dice in of(records, "dice"))])
    head = ["row", "scans", "Dice", "worst scan", "Jaccard", "HD95 mm", "ASSD mm"]
    return markdown([*head, *(f"fold {k}" for k in range(5))], rows)


def published() -> str:
    """Scores of the literature (`published.json` cites them) above this project's, distances in voxels."""
    rows = [[row["name"], *(f"{value:.2f}" for value in row["scores"])]
            for row in json.loads((RESULTS / "published" / "published.json").read_text())]
    for row in ("short", "default", "volume"):
        if records := runs(row):
            scores = (100 * np.mean(of(records, "dice")), 100 * np.mean(of(records, "jaccard")),
                      *(np.mean(of(records, f"{key}_voxels")) for key in ("hd95", "assd")))
            rows.append([f"here, 64 labelled scans: `{row}`", *(f"{value:.2f}" for value in scores)])
    return markdown(["trained on", "Dice %", "Jaccard %", "HD95", "ASSD"], rows)


def speed() -> str:
    rows = []
    for record in read("speed"):
        for name, row in record["rows"].items():
            for line in row["checks"]:
                low, high = min(line["values"]), max(line["values"])
                rows.append([name, line["what"], f"{line['median']:.3g} {line['unit']}".strip(),
                             f"{low:.3g} to {high:.3g}" if low < high else "", line["goal"],
                             {True: "yes", False: "**no**", None: ""}[line.get("met")], row["commit"]])
    return markdown(["row", "what", "median", "range", "goal", "met", "commit"], rows, text_columns=2)


def engines() -> str:
    rows = []
    for record in read("engines"):
        device = Path(record["path"]).stem.split("_")[1]
        for row in record["rows"]:
            difference = f"{row['difference']:.3g}" if "difference" in row else ""
            rows.append([f"{row['row']} ({device})", f"{row['ratio']:.2f}",
                         f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}", f"{len(row['ratios'])}", difference,
                         row["commit"]])
    return markdown(["seconds per epoch", "median ratio", "range", "rounds", "weights differ by", "commit"], rows)


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no docstrings, comments and blanks."""
    texts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts |= set(range(node.lineno, node.end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {n for t in tokens if t.type not in silent for n in range(t.start[0], t.end[0] + 1)} - texts


def files() -> str:
    rows = []
    for name in FILES:
        source = (ROOT / f"{name}.py").read_text()
        purpose = ast.get_docstring(ast.parse(source)).splitlines()[0].rstrip(".")
        rows.append([f"[`{name}.py`]({name}.py)", purpose, str(len(code_lines(source)))])
    return markdown(["file", "what it is", "lines of code"], rows, text_columns=2)


TABLES = {"README.md": (expect, files), "benchmarks/README.md": (ladder, folds, published, speed, engines)}


def main(write: bool, root: Path = ROOT) -> None:
    for page, tables in TABLES.items():
        text = (root / page).read_text()
        for make in tables:
            table = make()
            print(f"{make.__name__}, {page}\n\n{table}\n")
            start, end = f"<!-- {make.__name__} -->\n", "<!-- end -->"
            text = re.sub(f"{start}.*?{end}", lambda _, whole=f"{start}{table}\n{end}": whole, text, flags=re.S)
        if write:
            (root / page).write_text(text)


if __name__ == "__main__":
    main("--write" in sys.argv)
