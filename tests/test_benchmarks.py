"""The benchmarks run, in quick form, and say what they measured: no time and no score is judged here."""

import json
import time

import accuracy
import engines
import numpy as np
import pytest
import record
import speed
import table
from conftest import without_pictures

import train

pytestmark = pytest.mark.filterwarnings("ignore")


# ------------------------------------------------------------------------------------------------------- the ladder


def test_a_row_runs_dry_and_is_passed_over_the_second_time(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch.setattr)
    monkeypatch.setitem(accuracy.ROWS, "short", (None, "tiny", {"width": 4, "depth": 2}, []))
    monkeypatch.setitem(accuracy.ROWS, "parts", ("short", "largest part", {}, ["--largest-component"]))
    command = ["--data", str(phantoms), "--limit-batches", "1", "--only", "short", "parts", "--seeds", "1",
               "--workers", "0"]
    assert accuracy.main(command) == 0
    results = tmp_path / "runs" / "dry" / "results"
    plain, largest = (json.loads((results / f"{name}_seed1.json").read_text()) for name in ("short", "parts"))
    folders = sorted(path.name for path in results.parent.iterdir())
    assert folders == ["results", "short_seed1"]  # a row that predicts otherwise trains nothing
    assert plain["log"] == largest["log"] and len(plain["log"]) == 1
    assert largest["command"].endswith(" -- --largest-component") and " -- " not in plain["command"]
    assert "--width 4 --depth 2 --seed 1" in plain["command"] and str(phantoms) not in plain["command"]
    assert all(0 <= row["dice"] <= 1 for row in plain["scores"])
    assert {"commit", "date", "hardware", "threads", "versions", "parameters", "minutes"} <= plain.keys()
    capsys.readouterr()
    accuracy.main(command)
    assert capsys.readouterr().out == "short_seed1: done\nparts_seed1: done\n"


@pytest.mark.parametrize("row", accuracy.ROWS)
def test_a_row_is_a_command_of_today(row):
    base = accuracy.ROWS[row][0]
    assert base is None or base in accuracy.ROWS
    train.parse_args(["--data", "", *accuracy.flags(accuracy.arguments(row))])


def test_the_first_recipe_is_the_one_that_train_names():
    start = train.__doc__.index("--width 64")
    words = train.__doc__[start:].replace("\\\n", " ").split()
    told, row = (vars(train.parse_args(["--data", "", *flags, "--epochs", "1"]))
                 for flags in (words, accuracy.flags(accuracy.arguments("seed"))))
    assert told == row


# ------------------------------------------------------------------------------------------------------ the timings


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "SCRATCH", tmp_path / "scratch")


def measured(folder, *rows, more=()):
    assert speed.main(["--quick", "--rows", *rows, "--results", str(folder), *more]) == 0
    content = json.loads((folder / "quick_cpu.json").read_text())["rows"]
    for row in content.values():
        assert {"command", "commit", "hardware", "date", "versions", "raw"} <= row.keys()
        for line in row["checks"]:
            assert len(line["values"]) == 1 and ("met" in line) == bool(line["goal"])
            assert line["median"] > 0 or "each further scan" in line["what"]  # a difference, at this size of noise
    return content


def test_speed_measures_each_row_and_keeps_the_others(tmp_path):
    pytest.importorskip("monai")
    first = measured(tmp_path, "step", "monai", "data", "prediction")
    assert list(first) == ["step", "monai", "data", "prediction"]
    again = measured(tmp_path, "step")
    assert again["data"] == first["data"] and again["step"] != first["step"]


def test_minutes_trains_both_sides(phantoms, tmp_path, monkeypatch):
    pytest.importorskip("monai")
    without_pictures(monkeypatch.setattr)
    row = measured(tmp_path, "minutes", more=["--data", str(phantoms), "--minutes", "0.01"])["minutes"]
    assert set(row["raw"]) == {"ours", "MONAI"} and all(row["raw"].values())
    assert len([line for line in row["checks"] if "not reached" in line["what"]]) == 2
    assert row["command"].endswith(f"--data {phantoms.name} --minutes 0.01")


def hold(megabytes):
    kept = np.ones(megabytes * 125_000)
    time.sleep(0.5)
    return kept


def test_memory_is_seen():
    assert speed.peak_memory(hold, 400) > 400


@pytest.mark.slow
def test_memory_row(tmp_path):
    checks = measured(tmp_path, "memory")["memory"]["checks"]
    assert [line["what"].split(", ")[1] for line in checks] == ["fork", "fork", "spawn", "spawn"]


def test_a_goal_is_held_against_the_median():
    assert speed.check("", [0.1, 0.2, 0.9], "at most 0.30")["met"]
    assert not speed.check("", [2.0, 3.5, 2.5], "at least 3")["met"]
    assert speed.over([1.0, 4.0], [2.0, 2.0]) == [0.5, 2.0]


def test_sides_take_turns():
    turns = []
    seconds = speed.take_turns({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2)
    assert turns == ["b", "a", "a", "b", "b", "a"]
    assert len(seconds["a"]) == len(seconds["b"]) == 2


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_engines_end_with_the_same_weights(apart, tmp_path, monkeypatch):
    """In this process, or, as they are timed, in processes of their own."""
    pytest.importorskip("lightning")
    without_pictures(monkeypatch.setattr)
    if not apart:
        here = lambda _, words, out: 1 + train.main([*words, "--out", str(out)])  # noqa: E731
        monkeypatch.setattr(engines, "epoch_seconds", here)
    assert engines.main(["--quick", "--rounds", "1", "--results", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "engines_cpu.json").read_text())["rows"]
    assert row["difference"] == 0 and row["ratio"] > 0


# ------------------------------------------------------------------------------------------------------- the tables


def test_tables_are_of_what_there_is(tmp_path, monkeypatch, capsys):
    """Without any result, then with three seeds of a row on one fold and one seed on all."""
    for page in table.TABLES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((table.ROOT / page).read_text())
    for module in (record, table):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "published").mkdir(parents=True)
    (tmp_path / "results" / "published" / "published.json").write_text('[{"name": "N", "scores": [90, 80, 5, 1]}]')
    table.main(write=False, root=tmp_path)
    assert "Not measured yet" in capsys.readouterr().out
    (tmp_path / "results" / "ladder").mkdir()
    others = {f"fold{k}_seed0": 0.9 for k in (1, 2, 3, 4)}
    for name, dice in {"seed0": 0.90, "seed1": 0.91, "seed2": 0.92, **others}.items():
        scores = {"dice": dice, "jaccard": 0.8, "hd95": 3.0, "assd": 1.0, "hd95_voxels": 5.0, "assd_voxels": 1.5}
        content = {"mean": scores, "scores": [scores] * 16, "worst_dice": dice, "parameters": 5e5, "log": [{}] * 6,
                   "minutes": 5.0, "threads": 2, "hardware": "CPU, 2 cores, X, AVX2"}
        (tmp_path / "results" / "ladder" / f"short_{name}.json").write_text(json.dumps(content))
    table.main(write=True, root=tmp_path)
    front, page = ((tmp_path / name).read_text() for name in table.TABLES)
    words = " ".join(accuracy.flags(accuracy.arguments("short")))
    assert f"| `python train.py --data DIR {words}` | 5.0 on 2 cores of X, AVX2 | 0.9100 ± 0.0100 | 0.900 |" in front
    assert "| 3 | 0.9000 |\n" in front  # three runs; all folds, of seed 0
    assert "[`unet.py`](unet.py)" in front
    assert f"the short run: `{words}` | 0.9100 ± 0.0100 | 0.9000 |" in page
    assert "| `short` | 80 | 0.9000 ± 0.0000 |" in page and "| N | 90.00 |" in page
    table.main(write=True, root=tmp_path)
    assert [(tmp_path / name).read_text() for name in table.TABLES] == [front, page]
