"""A wing is one folder: without it, its command, its tests and its rows the rest still works.

No line of the rest leads to a wing that is gone: every import is looked at, those inside functions,
too, and every name by which a table is asked. Then, without one of them and without all of them,
every module of the rest and of its tests is imported, and tests are run: of one wing those of the
command line, of all wings the first of every file and each of the command line in its first case.
That no wing knows another is import-linter's.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from warm import Warm, warm

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
    if (tree / "tests").exists():
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


def copy_of_the_tree(folder: Path, parts: Sequence[str] = COPIED) -> None:
    for part in parts:  # compiled files, too, which are those of files with the same date and size
        ignored = shutil.ignore_patterns("*.egg-info")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)


@pytest.fixture(scope="module")
def process() -> Iterator[Warm]:
    with warm({**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}) as process:
        yield process


# Runs pytest in the copy; with "once" the first test of each file alone, and of the command line
# the first case of each test.
RUNNER = """
import os, pathlib, sys
import pytest

here = pathlib.Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = str(here / "src")
sys.path.insert(0, str(here / "src"))
for name in [name for name in sys.modules if name.partition(".")[0] == "foretune"]:
    del sys.modules[name]

class Once:
    def pytest_collection_modifyitems(self, config, items):
        first = {}
        for item in items:
            walks = item.path.parent.name == "cli"
            name = getattr(item, "originalname", item.name) if walks else None
            first.setdefault((item.path, name), item)
        left_out = [item for item in items if item not in first.values()]
        items[:] = first.values()
        config.hook.pytest_deselected(items=left_out)

once, *options = sys.argv[1:]
code = pytest.main(options, plugins=[Once()] if once == "once" else [])
import foretune
assert pathlib.Path(foretune.__file__).is_relative_to(here), foretune.__file__
raise SystemExit(int(code))
"""


def check_tests(process: Warm, folder: Path, which: str, *options: str) -> None:
    """Runs pytest in the copy."""
    (folder / "removed.py").write_text(RUNNER, "utf-8")
    left_out = [f"--ignore={path}" for path in ABOUT_ALL]
    words = ["removed.py", which, "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    done = process.run([*words, *options, *left_out], folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def rows_of(tree: Path) -> set[str]:
    """The strings in the tables."""
    tables = [table for table in TABLES if table.endswith(".py")]
    nodes = (node for table in tables for node in nodes_of((tree / table).read_text("utf-8")))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def nodes_of(text: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(text))


LOOK_UPS = ("make", "method_class_of", "entry_point", "getattr", "get")
IMPORTERS = ("import_module", "__import__")
# `entry_point`, and the names of the package: both take what is in a table.
IMPORT_BY_NAME = ("src/foretune/entry_points.py", "src/foretune/__init__.py")


def traces(text: str, wings: Sequence[str], gone: set[str], *, by_name: bool = False) -> list[str]:
    """What in a module leads to one of these wings, as "line: what".

    Args:
        text: The module.
        wings: The wings.
        gone: What is no longer in the tables: names and their modules.
        by_name: Whether the module may import what a string names.
    """
    module = re.compile(rf"foretune[./]({'|'.join(wings)})\b|^foretune\.$")
    found = []
    for node in nodes_of(text):
        match node:
            case ast.Import(names=aliases):
                names = [alias.name for alias in aliases]
                bad = [name for name in names if module.search(name)]
            case ast.ImportFrom(level=level, module=source, names=aliases):
                names = [f"{source or ''}.{alias.name}".lstrip(".") for alias in aliases]
                names = [f"foretune.{name}" for name in names] if level else names
                bad = [name for name in names if module.search(name)]
                bad += [n for n in names if n.removeprefix("foretune.") in gone and source]
            case ast.Constant(value=str(string)):
                bad = [string] if module.search(string) else []
            case ast.Attribute(value=ast.Name(id="foretune"), attr=name):
                bad = [name] if name in gone or name in wings else []
            case ast.Subscript(slice=ast.Constant(value=key)):
                bad = [str(key)] if key in gone else []
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments):
                given = [a.value for a in arguments if isinstance(a, ast.Constant)]
                bad = [str(a) for a in given if a in gone] if name in LOOK_UPS else []
                bad += [name] if name in IMPORTERS and not by_name else []
            case _:
                bad = []
        found += [f"{getattr(node, 'lineno', 0)}: {what}" for what in bad]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import foretune.fusion.ties",
        "def f():\n    from foretune.fusion import ties",
        "def f():\n    from foretune import fusion",
        "def f():\n    from ..fusion.ties import TIES",
        "if False:\n    from .. import fusion",
        "from foretune import TIES",
        "def f():\n    return foretune.TIES",
        "entry_point('foretune.fusion.ties:TIES')",
        "entry_point(f'foretune.{room}.ties:TIES')",
        "importlib.import_module(name)",
        "__import__(name)",
        "METHODS['ties']",
        "METHODS.get('ties')",
        "make('ties', scaling=0.3)",
    ],
)
def test_what_leads_to_a_wing_is_seen(line: str) -> None:
    assert traces(line, ["fusion"], {"TIES", "ties"})
    harmless = "from foretune.files import x\nscipy.linkage(y, 'ties')\nself.ties\nties = 'ties'"
    assert not traces(harmless, ["fusion"], {"TIES", "ties"})


@pytest.mark.parametrize("removed", [*((wing,) for wing in WINGS), WINGS], ids="+".join)
def test_nothing_of_the_rest_leads_to_a_wing(removed: Sequence[str], tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path, ["src"])
    before = rows_of(tmp_path)
    for wing in removed:
        remove(wing, tmp_path)
    gone = before - rows_of(tmp_path)
    assert gone
    found = {}
    for file in (tmp_path / "src").rglob("*.py"):
        name = file.relative_to(tmp_path).as_posix()
        by_name = name in IMPORT_BY_NAME
        found[name] = traces(file.read_text("utf-8"), removed, gone, by_name=by_name)
    assert len(found) > 100
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.slow
@pytest.mark.parametrize("wing", WINGS)
def test_the_rest_works_without_a_wing(process: Warm, wing: str, tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    remove(wing, tmp_path)
    # All is collected, where an error ends the run, and one file of it is run.
    options = ("-m", "not slow", "-k", "test_cli.py", "tests", "src")
    check_tests(process, tmp_path, "all", *options)


@pytest.mark.slow
def test_the_core_works_without_all_wings(process: Warm, tmp_path: Path) -> None:
    copy_of_the_tree(tmp_path)
    for wing in WINGS:
        remove(wing, tmp_path)
    check_tests(process, tmp_path, "once", "-m", "not slow and not hypothesis", "tests", "src")
