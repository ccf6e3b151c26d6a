"""The course notebook: it is what tour.py says, it was run, it shows its pictures, and it still runs."""

import copy
import inspect
import json
import re
import shutil

import pytest
from test_docs import README, ROOT, commands

import train

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed; requirements-dev.txt names it")
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed; it comes with jupytext")

TOUR = nbformat.read(ROOT / "tour.ipynb", as_version=4)


def picture_cells(cells):
    """Code cells with a question before them and an answer after them."""
    return [
        cell
        for before, cell, after in zip(cells, cells[1:], cells[2:], strict=False)
        if cell.cell_type == "code" and "**Question." in before.source and after.source.startswith("**What to see.**")
    ]


def pictures(cell):
    return [kind for output in cell["outputs"] for kind in output.get("data", {}) if kind in ("image/png", "image/gif")]


def check(cells):
    """Every cell has run, without an error and without a word on stderr; what should be a picture is one."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    silent = [cell.source for cell in picture_cells(cells) if not pictures(cell)]
    # What the network's shapes and the loss look like is told in numbers.
    assert len(silent) == 2 and "visualize.features" in silent[0] and "DiceLoss" in silent[1]
    assert sum(len(pictures(cell)) for cell in code) >= 9


def test_the_notebook_is_what_tour_py_says():
    """`make tour` writes it: edit tour.py, not the notebook."""
    source = jupytext.read(ROOT / "tour.py")
    assert [(c.cell_type, c.source) for c in TOUR.cells] == [(c.cell_type, c.source) for c in source.cells]


def test_the_notebook_was_run_and_can_be_shown_anywhere():
    check(TOUR.cells)
    assert (ROOT / "tour.ipynb").stat().st_size < 2_000_000
    tour = copy.deepcopy(TOUR)
    for output in (output for cell in tour.cells for output in cell.get("outputs", [])):
        for kind in pictures({"outputs": [output]}):
            del output["data"][kind]
    # No path of the machine that it was run on, and no bar that a page cannot redraw.
    text = json.dumps(tour)
    assert not re.search(r"/home/|/root/|/Users/|/usr/|/tmp/|/work/|site-packages|[A-Z]:\\\\|it/s\]", text)
    assert str(ROOT) not in text


def test_the_loop_that_it_shows_is_the_one_that_runs():
    """After a change of train.py: `make tour`."""
    shown = [output["data"]["text/markdown"] for cell in TOUR.cells if cell.cell_type == "code"
             for output in cell.outputs if "text/markdown" in output.get("data", {})]
    assert shown == [f"```python\n{inspect.getsource(f)}```" for f in (train.fit_loop, train.fit_lightning)]


def test_a_student_reads_it_in_one_sitting():
    """Little code, all of it calls; before each picture a question, after it what there is to see."""
    code = [line for c in TOUR.cells if c.cell_type == "code" for line in c.source.splitlines()]
    assert len([line for line in code if line.strip() and not line.lstrip().startswith("#")]) <= 80
    assert not [line for line in code if re.match(r"\s*(def|class|lambda|while|try)\b", line)]
    asked = picture_cells(TOUR.cells)
    assert not [cell.source for cell in TOUR.cells if cell.cell_type == "code" and pictures(cell) and cell not in asked]


def test_its_commands_are_those_of_the_readme():
    """Which test_docs.py runs."""
    told = commands("\n".join(cell.source for cell in TOUR.cells if cell.cell_type == "markdown"))
    assert len(told) == 5 and set(told) <= set(commands(README))


def test_it_runs(tmp_path, monkeypatch):
    """All of it, with small scans and one epoch, in a folder that holds nothing but the project's files."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; requirements-dev.txt names it")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed; requirements-dev.txt names it")
    monkeypatch.setenv("TOUR_QUICK", "1")
    for path in (*ROOT.glob("*.py"), ROOT / "player.html"):
        shutil.copy(path, tmp_path)
    tour = jupytext.read(tmp_path / "tour.py")
    nbclient.NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(tour.cells)
    assert str(tmp_path) not in json.dumps(tour)
