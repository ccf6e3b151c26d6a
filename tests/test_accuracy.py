"""The ladder of benchmarks/accuracy.py, dry: each row is measured once, from files, and passed over the second time."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_ladder_runs_dry_and_goes_on_where_it_was(phantoms, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "--data", str(phantoms), "--budget", "cpu"]
    command += ["--limit-batches", "1", "--only", "default", "component"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = tmp_path / "runs" / "dry" / "results"
    plain, largest = (json.loads((results / f"cpu_{name}.json").read_text()) for name in ("default", "component"))
    assert sorted(os.listdir(results.parent)) == ["cpu_default", "results"]  # no training of its own
    assert plain["log"] == largest["log"] and plain["scores"] != largest["scores"]
    assert largest["command"].endswith(" -- --largest-component") and " -- " not in plain["command"]
    assert str(phantoms) not in plain["command"] and "--width 8" in plain["command"] and plain["prediction"] == ""
    for row in plain["scores"]:
        assert 0 <= row["dice"] <= 1 and row["assd_voxels"] != row["assd"]
    assert {"commit", "date", "hardware", "versions", "parameters", "minutes"} <= plain.keys()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.split("\n") == ["cpu_default: done", "cpu_component: done", ""]
