"""The benchmarks run, in quick form, and say what they measured: no time and no score is judged here."""

import json
import os
import shutil
import subprocess
import sys
import time

import accuracy
import numpy as np
import pytest
import record
import speed
import table
from conftest import without_pictures
from torch.utils.data import DataLoader

import train

pytestmark = pytest.mark.filterwarnings("ignore")
linux = pytest.mark.skipif(sys.platform != "linux", reason="taskset, fork and /proc are Linux's")


def test_rows_run_dry_and_are_passed_over_the_second_time(phantoms, tmp_path, monkeypatch, capsys):
    """One that predicts otherwise trains nothing; one of the second data set, on another fold; each is a file."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch.setattr)
    monkeypatch.setitem(accuracy.ROWS, "parts", ("short", "largest part", "", "--largest-component"))
    tiny = "--seeds 1 --limit-batches 1 --workers 0 --width 4 --depth 2 --dims 3 --size 8 32 32 --spacing 6 --stem 1"
    job = ["--data", str(phantoms), *tiny.split(), "--batch-size", "2", "--fold", "1", "--only"]
    rows = ["short", "parts", "anterior"]
    assert accuracy.main([*job, *rows]) == 0
    folders, out = ("ladder", "ladder", "hippocampus"), tmp_path / "runs" / "dry"
    paths = [out / "results" / folder / f"{row}_fold1_seed1.json" for folder, row in zip(folders, rows, strict=True)]
    plain, largest, anterior = (json.loads(path.read_text()) for path in paths)
    assert sorted(os.listdir(out)) == ["anterior_fold1_seed1", "results", "short_fold1_seed1"]
    assert plain["log"] == largest["log"] and len(plain["log"]) == 1
    assert largest["command"].endswith(" -- --largest-component") and " -- " not in plain["command"]
    assert "--label 1 --fold 1" in anterior["command"] and str(phantoms) not in anterior["command"]
    assert all(0 <= row["dice"] <= 1 and "mask" not in row for row in plain["scores"])
    assert {"commit", "date", "hardware", "cores", "threads", "versions", "parameters", "minutes"} <= plain.keys()
    assert set(plain["minutes_to"]) == {"0.90", "0.91", "0.92"}
    assert 0 < plain["waited_for_data"] <= 1 and plain["memory"]["processes_gb"] >= 0
    assert "memory" not in largest and "waited_for_data" not in largest  # this one did not train
    capsys.readouterr()
    accuracy.main([*job, *rows])
    assert capsys.readouterr().out.splitlines() == [f"{row}_fold1_seed1: done" for row in rows]


@pytest.mark.parametrize("row", accuracy.ROWS)
def test_a_row_is_a_command_of_today_and_the_first_recipe_is_that_of_train(row):
    base, _, own, prediction = accuracy.ROWS[row]
    assert not base or base in accuracy.ROWS
    assert not (own and prediction)  # the table has room for one
    parsed = train.parse_args(["--data", "", *accuracy.arguments(row).split()])
    if row == "seed":
        words = train.__doc__[train.__doc__.index("--dims 2 --width 64"):].replace("\\\n", " ").split()
        told = train.parse_args(["--data", "", *words])
        assert vars(told) | {"epochs": 1, "steps": 1} == vars(parsed) | {"epochs": 1, "steps": 1}


@linux
def test_a_run_is_watched():
    """200 MB held by this process, 300 by a child; a loader that takes half a second, and a loop that takes longer."""
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.25)
            return super().__getitem__(index)

    child = [sys.executable, "-c", "import time; held = b'x' * 300_000_000; time.sleep(20)"]
    with record.watch(every=0.1) as found, subprocess.Popen(child) as process:
        held, deadline = np.ones(25_000_000), time.monotonic() + 20
        while found["gb"] < 0.5 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
        for _ in DataLoader(Slow([1, 2])):
            time.sleep(0.5)
    assert found["gb"] > 0.5 and held.any()
    assert 0.5 <= found["waited"] < 1  # the loop's own second is not counted


@linux
def test_speed_measures_each_row_and_keeps_the_others(tmp_path, monkeypatch):
    """In quick form. Trainings are timed in processes of their own, which takes minutes: here a watch tells 1 s."""
    def measured(*rows):
        assert speed.main(["--quick", "--rows", *rows, "--results", str(tmp_path)]) == 0
        return json.loads((tmp_path / "quick_cpu.json").read_text())["rows"]

    launchers = []
    monkeypatch.setattr(speed, "SCRATCH", tmp_path / "scratch")
    monkeypatch.setattr(speed, "epoch_seconds", lambda launcher, words: launchers.append(launcher) or 1.0)
    first = measured("step", "data", "prediction", "engines")
    assert list(first) == ["step", "data", "prediction", "engines"]
    assert all({"command", "commit", "hardware", "date", "versions", "checks"} <= row.keys() for row in first.values())
    lines = {line["what"]: line for row in first.values() for line in row["checks"]}
    assert all(line["median"] > 0 and ("met" in line) == bool(line["goal"]) for line in lines.values())
    assert lines["slice loop / ours"]["goal"] == "at least 3"
    assert list(lines)[-2:] == ["loop / Lightning, width 8", "2 cores / 1, default"]
    assert len(launchers) == 4 and [words[:2] for words in launchers[2:]] == [["taskset", "-c"]] * 2
    again = measured("step")
    assert again["data"] == first["data"] and again["step"] != first["step"]


def test_sides_take_turns_and_a_goal_is_held_against_the_median():
    turns = []
    seconds = speed.take_turns({"a": lambda: turns.append("a"), "b": lambda: turns.append("b") or 7.0}, 2)
    assert turns == ["b", "a", "a", "b", "b", "a"]
    assert len(seconds["a"]) == 2 and seconds["b"].tolist() == [7, 7]
    assert speed.check("", [0.1, 0.2, 0.9], "at most 0.30")["met"] is True
    assert speed.check("", np.array([2.0, 3.5, 2.5]), "at least 3")["met"] is False


@pytest.mark.slow
def test_the_proof_on_a_gpu_runs_dry(phantoms, tmp_path):
    """The whole script, on a CPU, in tiny form: every stage but the one that asks for the card ends well."""
    script, out = record.ROOT / "benchmarks" / "gpu.sh", tmp_path / "out"
    subprocess.run(["bash", str(script), str(phantoms), str(out), "--tiny", "--device", "cpu"], check=True, timeout=800,
                   env=os.environ | {"PYTHON": sys.executable})
    stages = [line.split(",") for line in (out / "stages.csv").read_text().splitlines()]
    assert [name for name, *_ in stages] == ["tests", "default", "slices", "speed", "engines", "large"]
    assert {name: code for name, _, code in stages if code != "exit code 0"} == {}
    results = {path.stem for path in (out / "results").glob("*.json")}
    assert results == {"default_seed0", "slices_seed0", "quick_cpu", "large_seed0"}
    assert (out / "runs" / "default" / "validation.png").exists()


def test_the_tables_that_are_committed_are_those_of_the_results(tmp_path, monkeypatch):
    """A result was added, or a file grew: `python benchmarks/table.py --write`. Without results it says so."""
    for page in table.TABLES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(table.ROOT / page, tmp_path / page)
    with monkeypatch.context() as patch:
        patch.setattr(table, "RESULTS", tmp_path / "nowhere")
        table.main(write=True, root=tmp_path)
    assert all("Not measured yet" in (tmp_path / page).read_text() for page in table.TABLES)
    table.main(write=True, root=tmp_path)
    for page in table.TABLES:
        assert (tmp_path / page).read_text() == (table.ROOT / page).read_text(), page


def test_numbers_of_a_table_by_hand():
    assert table.spread([0.90, 0.91, 0.92]) == "0.9100 ± 0.0100" and table.spread([2.345], 1) == "2.3"
    runs = [{"hardware": "CPU, 2 cores, X, AVX2", "threads": 2, "minutes": minutes} for minutes in (4.0, 6.0)]
    runs += [{"hardware": "Card", "threads": 1, "minutes": 2.0, "memory": {"processes_gb": 3.0, "gpu_gb": 1.5}}]
    told = {"minutes": "2.0 on Card; 5.0 on 2 cores of X, AVX2", "memory": "3 GB, GPU 1.5 GB", "runs": "3"}
    assert table.costs(runs) == told
