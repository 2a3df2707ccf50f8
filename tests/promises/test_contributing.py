"""The walk-throughs of CONTRIBUTING.md work as they are written: a test follows them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from promises.pages import ROOT

PAGE = ROOT / "CONTRIBUTING.md"
STEP = re.compile(
    r"^\*\*(\d+)\.\*\* `([^`]+)`, (a new file|rows):.*?^```\w+\n(.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
WALKS = {"Adding a method": "bitfit", "Adding an objective": "counts"}
COPIED = ("src", "tests", "docs", "benchmarks", "examples")
CHECKED = (
    *("tests/contract", "tests/methods", "tests/tasks", "tests/recipes/test_schema.py"),
    *(f"tests/promises/test_{name}.py" for name in ("docstrings", "names", "reference")),
)


def steps_of(walk: str) -> list[tuple[str, str, str]]:
    """(file, whether it is a new file or rows are added, block) of each step."""
    section = PAGE.read_text("utf-8").partition(f"\n## {walk}\n")[2].partition("\n## ")[0]
    steps = STEP.findall(section)
    numbers = re.findall(r"^\*\*(\d+)\.", section, re.MULTILINE)
    assert [number for number, *_ in steps] == numbers
    return [(file, kind, block) for _, file, kind, block in steps]


def follow(walk: str, tree: Path) -> None:
    """Does in a copy of the repository what a walk-through says."""
    for name, kind, block in steps_of(walk):
        file = tree / name
        if kind == "a new file":
            assert not file.exists(), name
            file.write_text(block, "utf-8")
            continue
        anchor = block.partition("\n")[0] + "\n"
        text = file.read_text("utf-8")
        assert text.count(f"\n{anchor}") == 1, f"{name}: {anchor}"
        file.write_text(text.replace(f"\n{anchor}", f"\n{block}"), "utf-8")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository in which both walk-throughs were followed."""
    folder = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for walk in WALKS:
        follow(walk, folder)
    return folder


def run(tree: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_walk_throughs_lint(tree):
    new = [name for walk in WALKS for name, *_ in steps_of(walk) if name.endswith((".py", ".pyi"))]
    run(tree, "ruff", "format", "--check", *new)
    run(tree, "ruff", "check", *new)
    files = [name for name in new if name.startswith("src") and Path(name).stem in WALKS.values()]
    docstrings = ("--preview", "--select", "D,DOC501", "--ignore", "D105,D107")
    run(tree, "ruff", "check", *docstrings, *files)


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS.values())
def test_the_tests_pass_that_concern_what_was_added(tree, name):
    # Cases are named by the method, fields of the reference by the class or the file.
    said = run(tree, "pytest", "-n", "0", "-p", "no:cacheprovider", "-k", name, *CHECKED)
    assert int(re.findall(r"(\d+) passed", said)[0]) > 5


@pytest.mark.slow
def test_types_hold(tree):
    run(tree, "mypy")


@pytest.mark.slow
def test_the_command_line_knows_the_method(tree):
    assert "learning_rate" in run(tree, "foretune.cli", "show", "bitfit")
    assert "2106.10199" in run(tree, "foretune.cli", "cite", "bitfit")
