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


@pytest.fixture
def dry(phantoms, tmp_path, monkeypatch):
    """Run rows of the ladder dry, in a folder of their own; their results are in runs/dry/results."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch.setattr)
    command = ["--data", str(phantoms), "--limit-batches", "1", "--workers", "0", "--width", "4", "--depth", "2"]
    return lambda words: accuracy.main([*command, *words.split()])


def test_a_row_runs_dry_and_is_passed_over_the_second_time(dry, phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(accuracy.ROWS, "parts", ("short", "largest part", "", "--largest-component"))
    assert dry("--only short parts --seeds 1") == 0
    out = tmp_path / "runs" / "dry"
    results = [out / "results" / "ladder" / f"{name}_seed1.json" for name in ("short", "parts")]
    plain, largest = (json.loads(path.read_text()) for path in results)
    assert sorted(os.listdir(out)) == ["results", "short_seed1"]  # a row that predicts otherwise trains nothing
    assert plain["log"] == largest["log"] and len(plain["log"]) == 1
    assert largest["command"].endswith(" -- --largest-component") and " -- " not in plain["command"]
    assert "--width 4 --depth 2" in plain["command"] and str(phantoms) not in plain["command"]
    assert all(0 <= row["dice"] <= 1 and "mask" not in row for row in plain["scores"])
    assert {"commit", "date", "hardware", "cores", "threads", "versions", "parameters", "minutes"} <= plain.keys()
    assert set(plain["minutes_to"]) == {"0.90", "0.91", "0.92"}
    assert 0 < plain["waited_for_data"] <= 1 and plain["memory"]["processes_gb"] >= 0
    assert "memory" not in largest and "waited_for_data" not in largest  # this one did not train
    capsys.readouterr()
    dry("--only short parts --seeds 1")
    assert capsys.readouterr().out == "short_seed1: done\nparts_seed1: done\n"


def test_the_second_data_set_and_several_folds(dry, tmp_path):
    assert dry("--only anterior --seeds 0 --fold 0 1 --dims 3 --size 8 32 32 --spacing 6 --stem 1 --batch-size 2") == 0
    results = tmp_path / "runs" / "dry" / "results" / "hippocampus"
    assert sorted(os.listdir(results)) == ["anterior_fold1_seed0.json", "anterior_seed0.json"]
    command = json.loads((results / "anterior_fold1_seed0.json").read_text())["command"]
    assert "--label 1 --fold 1" in command


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
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_speed_measures_each_row_and_keeps_the_others(apart, tmp_path, monkeypatch):
    """In quick form. Engines are timed in processes of their own, which take a minute, or by a watch that lies."""
    launchers = []
    monkeypatch.setattr(speed, "SCRATCH", tmp_path / "scratch")
    if not apart:
        monkeypatch.setattr(speed, "epoch_seconds", lambda launcher, words: launchers.append(launcher) or 1.0)

    def measured(*rows):
        assert speed.main(["--quick", "--rows", *rows, "--results", str(tmp_path)]) == 0
        return json.loads((tmp_path / "quick_cpu.json").read_text())["rows"]

    first = measured("step", "data", "prediction", "engines")
    assert list(first) == ["step", "data", "prediction", "engines"]
    assert all({"command", "commit", "hardware", "date", "versions", "checks"} <= row.keys() for row in first.values())
    lines = [line for row in first.values() for line in row["checks"]]
    assert all(len(line["values"]) == 1 and ("met" in line) == bool(line["goal"]) for line in lines)
    assert all(line["median"] > 0 for line in lines)
    goals = {line["what"]: line["goal"] for line in lines}
    assert goals["full: slices/s / MONAI's"] == "at least 1.5" and goals["slice loop / ours"] == "at least 3"
    assert list(goals)[-2:] == ["loop / Lightning, width 8", "2 cores / 1, default"]
    assert apart or len(launchers) == 4 and [words[:2] for words in launchers[2:]] == [["taskset", "-c"]] * 2
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


def test_tables_are_of_what_there_is(tmp_path, monkeypatch, capsys):
    """Without any result, then with three seeds of a row on one fold and one seed on all."""
    results = tmp_path / "results"
    for module in (record, table):
        monkeypatch.setattr(module, "RESULTS", results)
    for folder in ("ladder", "gpu", "speed"):
        (results / folder).mkdir(parents=True)
    for page in table.TABLES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((table.ROOT / page).read_text())
    table.main(write=False, root=tmp_path)
    assert "Not measured yet" in capsys.readouterr().out
    scores = {"dice": 0.9, "jaccard": 0.8, "hd95": 3.0, "assd": 1.0}
    content = {"scores": [scores] * 16, "parameters": 5e5, "log": [{}] * 6, "minutes": 5.0, "threads": 1, "cores": 2}
    others = {f"fold{k}_seed0": 0.9 for k in (1, 2, 3, 4)}
    for name, dice in {"seed0": 0.90, "seed1": 0.91, "seed2": 0.92, **others}.items():
        own = {"mean": scores | {"dice": dice}, "worst_dice": dice, "hardware": "CPU, 2 cores, X, AVX2",
               "memory": {"processes_gb": 2 + dice, "gpu_gb": float("nan")}}
        record.write(results / "ladder" / f"short_{name}.json", content | own)
    card = {"mean": scores, "worst_dice": 0.9, "hardware": "Card", "memory": {"processes_gb": 3.0, "gpu_gb": 1.5}}
    record.write(results / "gpu" / "default_seed0.json", content | card)
    checks = [speed.check("a / b", [1.0, 2.0], "at most 1")]
    rows = {"step": {"hardware": "Card", "commit": "abc", "checks": checks}}
    record.write(results / "speed" / "speed_cuda.json", {"rows": rows})

    words = accuracy.arguments("short")
    expected = {"README.md": [
        f"| `python train.py --data DIR {words}` | 5.0 on 2 cores of X, AVX2 | 2.9 GB | 0.9100 ± 0.0100 | 0.9000 |",
        "| 3 | 0.9000 |\n",  # three runs; all folds, of seed 0
        "| `python train.py --data DIR` | 5.0 on Card | 3 GB, GPU 1.5 GB |",
    ], "benchmarks/README.md": [
        f"the short run: `{words}` | 0.9100 ± 0.0100 | 0.9000 |", "| `short` | 80 | 0.9000 ± 0.0000 |",
        "| step, Card | a / b | 1.5 | 1 to 2 | at most 1 | **no** | abc |",
    ]}
    for _ in range(2):  # the second time nothing changes
        table.main(write=True, root=tmp_path)
        for page, lines in expected.items():
            assert all(line in (tmp_path / page).read_text() for line in lines), page
def test_the_tables_that_are_committed_are_those_of_the_results(capsys):
    """A result that was added, or a file that grew: `python benchmarks/table.py --write`."""
    table.main(write=False)
    shown = capsys.readouterr().out
    for page, tables in table.TABLES.items():
        text = (table.ROOT / page).read_text()
        for name, make in tables.items():
            assert f"<!-- {name} -->\n{make()}\n<!-- end -->" in text and make() in shown, (page, name)
