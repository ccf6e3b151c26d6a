"""The benchmarks run, in quick form, and say what they measured: no time and no score is judged here."""

import json
import os
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

# ------------------------------------------------------------------------------------------------------- the ladder


@pytest.fixture
def dry(phantoms, tmp_path, monkeypatch):
    """Run rows of the ladder dry, in a folder of their own; their results are in runs/dry/results."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch.setattr)
    command = ["--data", str(phantoms), "--limit-batches", "1", "--workers", "0", "--width", "4", "--depth", "2"]
    return lambda *words: accuracy.main([*command, *words])


def test_a_row_runs_dry_and_is_passed_over_the_second_time(dry, phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(accuracy.ROWS, "parts", ("short", "largest part", "", "--largest-component"))
    assert dry("--only", "short", "parts", "--seeds", "1") == 0
    results = tmp_path / "runs" / "dry" / "results" / "ladder"
    plain, largest = (json.loads((results / f"{name}_seed1.json").read_text()) for name in ("short", "parts"))
    folders = sorted(path.name for path in (tmp_path / "runs" / "dry").iterdir())
    assert folders == ["results", "short_seed1"]  # a row that predicts otherwise trains nothing
    assert plain["log"] == largest["log"] and len(plain["log"]) == 1
    assert largest["command"].endswith(" -- --largest-component") and " -- " not in plain["command"]
    assert "--width 4 --depth 2" in plain["command"] and str(phantoms) not in plain["command"]
    assert all(0 <= row["dice"] <= 1 and "mask" not in row for row in plain["scores"])
    assert {"commit", "date", "hardware", "cores", "threads", "versions", "parameters", "minutes"} <= plain.keys()
    assert set(plain["minutes_to"]) == {"0.90", "0.91", "0.92"}
    assert 0 < plain["waited_for_data"] <= 1 and plain["memory"]["processes_gb"] >= 0
    assert "memory" not in largest and "waited_for_data" not in largest  # this one did not train
    capsys.readouterr()
    dry("--only", "short", "parts", "--seeds", "1")
    assert capsys.readouterr().out == "short_seed1: done\nparts_seed1: done\n"


def test_the_second_data_set_and_several_folds(dry, tmp_path):
    volume = ["--size", "8", "32", "32", "--spacing", "6", "--stem", "1", "--batch-size", "2"]
    assert dry("--only", "anterior", "--seeds", "0", "--fold", "0", "1", *volume) == 0
    results = tmp_path / "runs" / "dry" / "results" / "hippocampus"
    assert sorted(path.name for path in results.iterdir()) == ["anterior_fold1_seed0.json", "anterior_seed0.json"]
    assert "--dims 3 --label 1 --fold 1" in json.loads((results / "anterior_fold1_seed0.json").read_text())["command"]


@pytest.mark.parametrize("row", accuracy.ROWS)
def test_a_row_is_a_command_of_today(row):
    base, _, own, prediction = accuracy.ROWS[row]
    assert not base or base in accuracy.ROWS
    assert not (own and prediction)  # the table has room for one
    train.parse_args(["--data", "", *accuracy.arguments(row).split()])


def test_the_first_recipe_is_the_one_that_train_names():
    start = train.__doc__.index("--width 64")
    words = train.__doc__[start:].replace("\\\n", " ").split()
    told, row = (vars(train.parse_args(["--data", "", *flags, "--epochs", "1", "--steps", "1"]))
                 for flags in (words, accuracy.arguments("seed").split()))
    assert told == row


@linux
def test_a_run_is_watched():
    """200 MB held by this process, 300 by a child; a loader that takes half a second, and a loop that takes longer."""
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.25)
            return super().__getitem__(index)

    child = [sys.executable, "-c", "import time; held = b'x' * 300_000_000; time.sleep(20)"]
    with record.watch(every=0.1) as found, subprocess.Popen(child) as process:
        held = np.ones(25_000_000)
        deadline = time.monotonic() + 20
        while found["gb"] < 0.5 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
        for _ in DataLoader(Slow([1, 2])):
            time.sleep(0.5)
    assert found["gb"] > 0.5 and held.any()
    assert 0.5 <= found["waited"] < 1  # the loop's own second is not counted


# ------------------------------------------------------------------------------------------------------ the timings


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Measure rows of speed.py in quick form: the rows of their JSON."""
    monkeypatch.setattr(speed, "SCRATCH", tmp_path / "scratch")

    def measure(*rows):
        assert speed.main(["--quick", "--rows", *rows, "--results", str(tmp_path)]) == 0
        content = json.loads((tmp_path / "quick_cpu.json").read_text())["rows"]
        for row in content.values():
            assert {"command", "commit", "hardware", "date", "versions", "checks"} <= row.keys()
            for line in row["checks"]:
                assert len(line["values"]) == 1 and ("met" in line) == bool(line["goal"]) and line["median"] > 0
        return content

    return measure


@linux
def test_speed_measures_each_row_and_keeps_the_others(measured):
    pytest.importorskip("monai")
    first = measured("step", "data", "prediction")
    assert list(first) == ["step", "data", "prediction"]
    goals = {line["what"]: line["goal"] for row in first.values() for line in row["checks"] if line["goal"]}
    assert goals["full: slices/s / MONAI's"] == "at least 1.5" and goals["slice loop / ours"] == "at least 3"
    again = measured("step")
    assert again["data"] == first["data"] and again["step"] != first["step"]


@linux
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_engines_and_cores_are_timed(apart, measured, monkeypatch):
    """In this process, without launchers, or, as they are timed, in processes of their own."""
    pytest.importorskip("lightning")
    if not apart:
        launchers = []
        monkeypatch.setattr(speed, "epoch_seconds", lambda launcher, words: launchers.append(launcher) or 1.0)
    lines = measured("engines")["engines"]["checks"]
    assert [line["what"] for line in lines] == ["loop / Lightning, width 8", "2 cores / 1, default"]
    if not apart:
        assert len(launchers) == 4 and [launcher[:2] for launcher in launchers[2:]] == [["taskset", "-c"]] * 2


def test_a_goal_is_held_against_the_median():
    assert speed.check("", [0.1, 0.2, 0.9], "at most 0.30")["met"] is True
    assert speed.check("", np.array([2.0, 3.5, 2.5]), "at least 3")["met"] is False


def test_sides_take_turns():
    turns = []
    seconds = speed.take_turns({"a": lambda: turns.append("a"), "b": lambda: turns.append("b") or 7.0}, 2)
    assert turns == ["b", "a", "a", "b", "b", "a"]
    assert len(seconds["a"]) == 2 and seconds["b"].tolist() == [7, 7]


@pytest.mark.slow
def test_the_proof_on_a_gpu_runs_dry(phantoms, tmp_path):
    """The whole script, on a CPU, in tiny form: every stage but the one that asks for the card ends well."""
    job = ["bash", str(record.ROOT / "benchmarks" / "gpu.sh"), str(phantoms), str(tmp_path / "out"), "--tiny"]
    job += ["--device", "cpu"]
    subprocess.run(job, check=True, env=os.environ | {"PYTHON": sys.executable}, timeout=800)
    stages = [line.split(",") for line in (tmp_path / "out" / "stages.csv").read_text().splitlines()]
    assert [name for name, *_ in stages] == ["card", "versions", "tests", "default", "volume", "speed", "engines",
                                             "wide", "volume_wide"]
    assert {name: code for name, _, code in stages if code != "exit code 0" and name != "card"} == {}
    results = {path.stem for path in (tmp_path / "out" / "results").glob("*.json")}
    assert results == {"default_seed0", "volume_seed0", "quick_cpu", "wide_seed0", "volume_wide_seed0"}
    assert (tmp_path / "out" / "runs" / "volume" / "validation.png").exists()


# ------------------------------------------------------------------------------------------------------- the tables


def test_tables_are_of_what_there_is(tmp_path, monkeypatch, capsys):
    """Without any result, then with three seeds of a row on one fold and one seed on all."""
    for page in table.TABLES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((table.ROOT / page).read_text())
    results = tmp_path / "results"
    for module in (record, table):
        monkeypatch.setattr(module, "RESULTS", results)
    for folder in ("ladder", "gpu", "speed"):
        (results / folder).mkdir(parents=True)
    table.main(write=False, root=tmp_path)
    assert "Not measured yet" in capsys.readouterr().out
    others = {f"fold{k}_seed0": 0.9 for k in (1, 2, 3, 4)}
    for name, dice in {"seed0": 0.90, "seed1": 0.91, "seed2": 0.92, **others}.items():
        scores = {"dice": dice, "jaccard": 0.8, "hd95": 3.0, "assd": 1.0}
        content = {"mean": scores, "scores": [scores] * 16, "worst_dice": dice, "parameters": 5e5, "log": [{}] * 6,
                   "minutes": 5.0, "threads": 1, "cores": 2, "hardware": "CPU, 2 cores, X, AVX2",
                   "memory": {"processes_gb": 2 + dice, "gpu_gb": float("nan")}}
        (results / "ladder" / f"short_{name}.json").write_text(json.dumps(content))
        card = content | {"hardware": "Card", "memory": {"processes_gb": 3.0, "gpu_gb": 1.5}}
        (results / "gpu" / "default_seed0.json").write_text(json.dumps(card))
    check = speed.check("a / b", [1.0, 2.0], "at most 1")
    rows = {"step": {"hardware": "Card", "commit": "abc", "checks": [check]}}
    (results / "speed" / "speed_cuda.json").write_text(json.dumps({"rows": rows}))
    table.main(write=True, root=tmp_path)
    front, page = ((tmp_path / name).read_text() for name in table.TABLES)
    words = accuracy.arguments("short")
    command = f"| `python train.py --data DIR {words}` | 5.0 on 2 cores of X, AVX2 | 2.9 GB |"
    assert f"{command} 0.9100 ± 0.0100 | 0.9000 |" in front
    assert "| 3 | 0.9000 |\n" in front  # three runs; all folds, of seed 0
    assert "| `python train.py --data DIR` | 5.0 on Card | 3.0 GB, GPU 1.5 GB |" in front
    assert f"the short run: `{words}` | 0.9100 ± 0.0100 | 0.9000 |" in page
    assert "| `short` | 80 | 0.9000 ± 0.0000 |" in page
    assert "| step, Card | a / b | 1.5 | 1 to 2 | at most 1 | **no** | abc |" in page
    table.main(write=True, root=tmp_path)
    assert [(tmp_path / name).read_text() for name in table.TABLES] == [front, page]


def test_the_tables_that_are_committed_are_those_of_the_results(capsys):
    """A result that was added, or a file that grew: `python benchmarks/table.py --write`."""
    table.main(write=False)
    shown = capsys.readouterr().out
    for page, tables in table.TABLES.items():
        text = (table.ROOT / page).read_text()
        for name, make in tables.items():
            assert f"<!-- {name} -->\n{make()}\n<!-- end -->" in text and make() in shown, (page, name)
