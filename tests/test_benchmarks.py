"""The benchmarks run, on tiny sizes, and say what they measured: no time is judged here."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytest.importorskip("monai")
import speed  # noqa: E402


def run(rows, folder):
    assert speed.main(["--quick", "--rows", *map(str, rows), "--results", str(folder)]) == 0
    return json.loads((folder / "quick_cpu.json").read_text())


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SCRATCH", tmp_path / "scratch")


def test_speed_measures_each_row_and_writes_after_each(tmp_path):
    """Rows 4 and 7 start new processes, and wait for their imports: they are below."""
    rows = (1, 2, 3, 5, 6, 8)
    record = run(rows, tmp_path)
    assert tuple(map(int, record["rows"])) == rows
    assert {"hardware", "versions", "sizes"} <= record.keys()
    for row in record["rows"].values():
        assert {"command", "commit", "date", "minutes", "seconds"} <= row.keys()
        for line in row["checks"]:
            assert len(line["values"]) == 1 and ("met" in line) == bool(line["goal"]), line["what"]
    again = run((3,), tmp_path)  # measured anew; the others stay
    assert again["rows"]["1"] == record["rows"]["1"] and again["rows"]["3"] != record["rows"]["3"]


def test_second_start_reads_no_nifti(tmp_path):
    lines = {line["what"]: line for line in run((4,), tmp_path)["rows"]["4"]["checks"]}
    assert lines["NIfTI files read at the second start"]["median"] == 0


@pytest.mark.slow
def test_memory_is_measured_with_the_workers(tmp_path):
    row = run((7,), tmp_path)["rows"]["7"]
    assert len(row["checks"]) == 2 and all(0.5 < line["median"] < 2 for line in row["checks"])


def test_help_explains_each_row(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--help"])
    told = capsys.readouterr().out
    assert all(f"\n  {number}  " in told for number in speed.ROWS)


def test_a_goal_is_held_against_the_median():
    assert speed.check("", [0.1, 0.2, 0.9], "at most 0.30")["met"]
    assert not speed.check("", [2.0, 3.5, 2.5], "at least 3")["met"]
    assert speed.over([1.0, 4.0], [2.0, 2.0]) == [0.5, 2.0]
    assert speed.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_sides_take_turns_and_one_may_time_itself():
    turns = []
    sides = {"a": lambda: turns.append("a"), "b": lambda: turns.append("b") or 7.0}
    seconds = speed.take_turns(sides, 2)
    assert turns == ["b", "a", "a", "b", "b", "a"]
    assert seconds["b"] == [7.0, 7.0] and len(seconds["a"]) == 2
