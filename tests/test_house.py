"""House rules: files that stand alone, help and README that are true, nothing imported that is not required."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
ALONE = ("unet", "losses", "metrics", "data", "visualize", "phantom")
FILES = (*ALONE, "train", "predict")


@pytest.mark.parametrize("name", ALONE)
def test_a_file_copied_alone_into_an_empty_folder_imports(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import sys; sys.path.insert(0, '.'); import {name}; assert 'imgaug' not in sys.modules"
    run = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_its_documentation_and_says_what_it_needs(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    docstring = ast.get_docstring(tree)
    assert "Contract:" in docstring and docstring.splitlines()[0].endswith((".", ":")) or name == "train"
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    required = {re.split(r"[=<>]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()}
    # PIL is pillow; cv2 and skimage come with imgaug, mpl_toolkits with matplotlib.
    known = required | {"PIL", "cv2", "skimage", "mpl_toolkits", *FILES, *sys.stdlib_module_names}
    if name == "train":
        known |= {"lightning"}  # optional, for --engine lightning alone: test_twins.py runs without it
    assert imported <= known
    for node in ast.walk(tree):  # public functions, classes and methods say what they do
        public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        if public and name in ("unet", "losses", "metrics") and node.name not in ("forward", "check_shapes"):
            assert ast.get_docstring(node), node.name


def test_no_pyplot():
    assert not [name for name in FILES if "pyplot" in (ROOT / f"{name}.py").read_text().replace("pyplot's", "")]


def test_readme_names_every_file_and_no_other():
    named = set(re.findall(r"^\| \[`(\w+\.py)`\]", README, re.M))
    assert named == {f"{name}.py" for name in FILES}


def test_every_flag_in_the_readme_exists():
    """Help and README agree. The sub-commands of visualize.py are run below instead."""
    used = set()
    for script, arguments in re.findall(r"python (train|predict|data|phantom)\.py((?:[^\n`\\]|\\\n)*)", README):
        used |= {(script, flag) for flag in re.findall(r"--[\w-]+", arguments)}
    for script in {script for script, _ in used}:
        command = [sys.executable, str(ROOT / f"{script}.py"), "--help"]
        told = subprocess.run(command, capture_output=True, text=True).stdout
        assert not [flag for name, flag in used if name == script and flag not in told]
    assert ("train", "--resume") in used or ("predict", "--held-out") in used


def test_flags_stay_few(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    assert len(set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M))) <= 40


def commands():
    """The commands of the README's first section, in its order."""
    section = README.split("## Three commands")[1].split("\n## ")[0]
    return re.findall(r"^python (.*?)(?: +#.*)?$", section.replace("\\\n", ""), re.M)


def test_readme_commands_run(phantoms, tmp_path):
    """A newcomer types them one after the other; here on six small phantoms and one batch."""
    tiny = {"train.py": ["--limit-batches", "1", "--width", "4", "--epochs", "1", "--workers", "0"]}
    env = os.environ | {"MPLCONFIGDIR": str(tmp_path)}
    assert len(commands()) >= 3
    for command in commands():
        command = command.replace("--crop 32", "--crop 4").replace("imagesTs", "imagesTr")  # they are small, and few
        command = command.replace("Task02_Heart", str(phantoms))
        script, *arguments = shlex.split(command)
        scan = re.sub(r"la_\d+", "la_000", " ".join(arguments))
        arguments = scan.split() + tiny.get(script, [])
        run = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=tmp_path, env=env,
                             capture_output=True, text=True)
        assert run.returncode == 0, (command, run.stderr)


def test_tables_are_made_from_the_json_and_the_code():
    made = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "table.py")], capture_output=True, text=True)
    tables = made.stdout.strip().split("\n\n")
    assert made.returncode == 0 and len(tables) >= 4, made.stderr
    for table in tables:
        assert table in README, "run python benchmarks/table.py --write"


def test_the_comparison_of_the_engines_is_the_one_that_was_made():
    assert (ROOT / "docs" / "engines.txt").read_text() in README
