"""A wing is one folder: without it, its command, its tests and its rows the rest still works.

Without all of them the core's fast tests pass. Without one of them every module of the rest and of
its tests is imported, and the command line works; that no wing knows another is import-linter's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = ("fusion", "pruning", "decoding", "forecasting", "source_free", "theory")
# Where a wing is named by a row: tables of entry points, lists of commands.
TABLES = (
    "src/foretune/__init__.py",
    "src/foretune/__init__.pyi",
    "src/foretune/methods/__init__.py",
    "src/foretune/models/pretrained.py",
    "src/foretune/recipes/schema.py",
    "src/foretune/tasks/objectives/__init__.py",
)
COPIED = ("src", "tests", "docs", "benchmarks", "examples")
# What is about all methods at once: pages, tables of results, and this file.
ABOUT_ALL = ("tests/promises", "tests/claims", "tests/architectures")


def commands_of(wing: str) -> list[str]:
    """The modules of the command line that call the wing."""
    files = (ROOT / "src/foretune/cli").glob("*.py")
    return sorted(f.stem for f in files if f"foretune.{wing}." in f.read_text("utf-8"))


def remove(wing: str, tree: Path) -> None:
    """Removes the wing's folders, and every line of the tables that names it."""
    shutil.rmtree(tree / "src/foretune" / wing)
    shutil.rmtree(tree / "tests" / wing)
    commands = commands_of(wing)
    for command in commands:
        (tree / "src/foretune/cli" / f"{command}.py").unlink()
    patterns = dict.fromkeys(TABLES, rf"\bforetune\.{wing}\b")
    modules = "|".join(commands)
    patterns["src/foretune/cli/commands.py"] = rf"^\s*({modules}),$|[(]({modules})\."
    for table, pattern in patterns.items():
        lines = (tree / table).read_text("utf-8").splitlines(keepends=True)
        left = [line for line in lines if not re.search(pattern, line.rstrip("\n"))]
        (tree / table).write_text("".join(left), "utf-8")


def copy_of_the_tree(folder: Path) -> None:
    for part in COPIED:  # compiled files, too, which are those of files with the same date and size
        ignored = shutil.ignore_patterns("*.egg-info")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


def check_tests(folder: Path, *options: str) -> None:
    """Runs pytest in the copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    left_out = [f"--ignore={path}" for path in ABOUT_ALL]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *left_out],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("wing", WINGS)
def test_the_rest_works_without_a_wing(wing: str, tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    remove(wing, tmp_path)
    # All is collected, where an error ends the run, and one file of it is run.
    check_tests(tmp_path, "-n", "0", "-x", "-m", "not slow", "-k", "test_cli.py", "tests", "src")


@pytest.mark.slow
def test_the_core_works_without_all_wings(tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    for wing in WINGS:
        remove(wing, tmp_path)
    check_tests(tmp_path, "-n", "2", "-x", "-m", "not slow and not hypothesis")
