"""The README's results, made from the JSON files under benchmarks/results/.

    python benchmarks/table.py            # print it
    python benchmarks/table.py --write    # put it into README.md, between the marks
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAD = ("run", "Dice", "worst", "Jaccard", "HD95 mm", "ASSD mm", "parameters", "minutes")


def row(path: Path) -> list[str]:
    record = json.loads(path.read_text())
    mean, std = record["mean"], record["std"]
    return [
        f"[`{path.stem}`](benchmarks/results/{path.name})",
        f"{mean['dice']:.4f} ± {std['dice']:.4f}",
        f"{record['worst_dice']:.4f}",
        f"{mean['jaccard']:.4f}",
        f"{mean['hd95']:.2f} ± {std['hd95']:.2f}",
        f"{mean['assd']:.2f} ± {std['assd']:.2f}",
        f"{record['parameters']:,}",
        f"{record['minutes']:.0f}",
    ]


def table() -> str:
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    lines = [HEAD, ["---"] + ["---:"] * (len(HEAD) - 1), *map(row, paths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    if "--write" in sys.argv:
        readme = ROOT / "README.md"
        marks = "<!-- results -->\n", "\n<!-- end of results -->"
        text = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: table().join(marks), readme.read_text(), flags=re.S)
        readme.write_text(text)
    print(table())
