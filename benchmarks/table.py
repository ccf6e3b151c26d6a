"""The tables of the two READMEs, of the JSON under benchmarks/results/; what has not been measured is left out.

    python benchmarks/table.py            # print them
    python benchmarks/table.py --write    # put them between their marks, <!-- name --> and <!-- end -->
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import accuracy
import numpy as np
from record import RESULTS, ROOT
from scipy.stats import spearmanr


def markdown(rows: list[dict[str, str]], text_columns: int = 1) -> str:
    """A table whose first columns are text, to the left, and whose others are numbers, to the right."""
    if not rows:
        return "*Not measured yet.*"
    rules = ["---" if i < text_columns else "---:" for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (rows[0], rules, *(row.values() for row in rows)))


def read(pattern: str) -> list[dict]:
    """The results of that name, each with its own path."""
    return [json.loads(path.read_text()) | {"path": f"results/{path.relative_to(RESULTS)}"}
            for path in sorted(RESULTS.glob(pattern))]


def of_all_folds(folder: str, row: str) -> list[dict]:
    """The runs of a row on the five folds, seed 0: each scan scored once, by a network that never saw it. Else none."""
    names = [f"{row}_seed*", *(f"{row}_fold{k}_seed*" for k in range(1, 5))]
    records = [record for name in names for record in read(f"{folder}/{name}.json")[:1]]
    return records if len(records) == 5 else []


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation (N - 1) of several values, or the one there is."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def scores(rows: list[dict], worst: float) -> dict[str, str]:
    """Columns of the scores of several runs, or of several scans. A distance may be infinite: an empty mask."""
    dice, jaccard, hd95, assd = ([row[key] for row in rows] for key in ("dice", "jaccard", "hd95", "assd"))
    return {"Dice": spread(dice), "worst scan": f"{worst:.4f}", "Jaccard": spread(jaccard),
            "HD95 mm": spread(hd95, 2), "ASSD mm": spread(assd, 2)}


def costs(records: list[dict]) -> dict[str, str]:
    """Columns of what the runs took: minutes on each machine that had some, and the most memory that was measured."""
    machines: dict[str, list[float]] = {}
    for record in records:
        name, cores = record["hardware"], record.get("cores", record["threads"])
        if name.startswith("CPU"):
            name = f"{cores} core{'s' * (cores > 1)} of {name.split(', ', 2)[-1]}"
        machines.setdefault(name, []).append(record["minutes"])
    took = [f"{np.mean(machines[name]):.1f} on {name}" for name in sorted(machines, reverse=True)]
    measured = [record["memory"] for record in records if "memory" in record]
    peaks = [max((memory[key] for memory in measured), default=math.nan) for key in ("processes_gb", "gpu_gb")]
    held = [f"{text}{peak:.2g} GB" for text, peak in zip(("", "GPU "), peaks, strict=True) if peak > 0]
    return {"minutes": "; ".join(took), "memory": ", ".join(held), "runs": f"{len(records)}"}


def measured(folder: str, rows: Sequence[str]) -> list[dict[str, str]]:
    """The rows of accuracy.py that have runs in a folder of results, with all their columns."""
    lines = []
    for row in rows:
        base, change, own, prediction = accuracy.ROWS[row]
        if records := read(f"{folder}/{row}_seed*.json"):
            every = [scan["dice"] for record in of_all_folds(folder, row) for scan in record["scores"]]
            command = f"`{f'python train.py --data DIR {accuracy.arguments(row)}'.strip()}`"
            lines.append({
                "row": f"[`{row}`]({records[0]['path']})", "changes": base,
                "what": change + (f": `{own or prediction}`" if own or prediction else ""),
                "command": command,
                **scores([record["mean"] for record in records], min(record["worst_dice"] for record in records)),
                "M weights": f"{records[0]['parameters'] / 1e6:.2f}", "epochs": f"{len(records[0]['log'])}",
                **costs(records), "Dice of all folds": f"{np.mean(every):.4f}" if every else ""})
    return lines


def expect() -> str:
    """For the front page: what the commands reach that one types first, on a CPU and on a GPU."""
    rows = "default", "large", "slices", "short"
    lines = measured("ladder", rows) + measured("gpu", rows)
    names = "command", "minutes", "memory", "Dice", "worst scan", "HD95 mm", "runs", "Dice of all folds"
    return markdown([{name: line[name] for name in names} for line in lines], text_columns=3)


def ladder() -> str:
    """A line for each measured row of accuracy.py, in its order."""
    left_out = "command", "memory", "Dice of all folds"
    return markdown([{name: cell for name, cell in line.items() if name not in left_out}
                     for line in measured("ladder", list(accuracy.ROWS))], text_columns=3)


def folds(folder: str = "ladder") -> str:
    """The rows that were run on all five folds; mean and deviation are over the scans."""
    rows = []
    for row in accuracy.ROWS:
        if records := of_all_folds(folder, row):
            scans = [scan for record in records for scan in record["scores"]]
            known = [(scan["dice"], scan["confidence"]) for scan in scans if "confidence" in scan]
            rows.append({"row": f"`{row}`", "scans": f"{len(scans)}",
                         **scores(scans, min(scan["dice"] for scan in scans)),
                         "rank correlation": f"{spearmanr(known).statistic:.2f}" if len(known) == len(scans) else "",
                         **{f"fold {k}": f"{record['mean']['dice']:.4f}" for k, record in enumerate(records)}})
    return markdown(rows)


def speed() -> str:
    rows = []
    for name, row in [item for record in read("speed/*.json") for item in record["rows"].items()]:
        for line in row["checks"]:
            low, high = min(line["values"]), max(line["values"])
            rows.append({"row": name if row["hardware"].startswith("CPU") else f"{name}, {row['hardware']}",
                         "what": line["what"], "median": f"{line['median']:.3g} {line['unit']}".strip(),
                         "range": f"{low:.3g} to {high:.3g}" if low < high else "", "goal": line["goal"],
                         "met": {True: "yes", False: "**no**", None: ""}[line.get("met")], "commit": row["commit"]})
    return markdown(rows, text_columns=2)


TABLES = {"README.md": {"expect": expect}, "benchmarks/README.md": {
    "ladder": ladder, "folds": folds, "hippocampus": partial(folds, "hippocampus"), "speed": speed}}


def main(write: bool, root: Path = ROOT) -> None:
    for page, tables in TABLES.items():
        text = (root / page).read_text()
        for name, make in tables.items():
            print(f"{name}, {page}\n\n{make()}\n")
            text = re.sub(f"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\1{make()}\n\2", text, flags=re.S)
        if write:
            (root / page).write_text(text)


if __name__ == "__main__":
    main("--write" in sys.argv)
