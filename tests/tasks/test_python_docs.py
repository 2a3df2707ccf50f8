"""The collection of Python documentation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from foretune.errors import UserError
from foretune.tasks import python_docs
from foretune.tasks.python_docs import first_sentence, installed_modules, read_python_docs
from foretune.tasks.sources import Source, load_tasks


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of 80 documented functions, and much that must be left out."""
    root = tmp_path / "fake"
    (root / "tests").mkdir(parents=True)
    (root / "_vendor").mkdir()
    lines = [
        f'def function_{i}(a: int, *, b=1):\n    """Return value number {i}. More."""\n'
        for i in range(80)
    ]
    (root / "__init__.py").write_text(
        'raise RuntimeError("nothing may import this")\n' + "".join(lines)
    )
    (root / "_inner.py").write_text(
        'class Door:\n    """A door that opens."""\n'
        '    def __init__(self, width, height=2):\n        """Build the door now."""\n'
        '    def open(self, key):\n        """Open the ``door`` with a key."""\n'
        '    @property\n    def colour(self):\n        """The colour of the door."""\n'
        '    def _hide(self):\n        """Hide what is private."""\n'
        'def again():\n    """A door that opens."""\n'
        'def old():\n    """Deprecated since version two."""\n'
        'def short():\n    """Too short."""\n'
    )
    for folder in ("tests", "_vendor"):
        (root / folder / "inner.py").write_text('def f():\n    """Never to be found."""\n')
    (root / "broken.py").write_text("def (:\n")
    return root


def test_names_become_contexts_and_first_sentences_responses(package: Path) -> None:
    rows = read_python_docs(modules={"fake": package})
    responses = {row["context"]: row["response"] for row in rows}
    assert responses["fake.function_3(a, b)"] == "Return value number 3."
    assert responses["fake.Door(width, height)"] == "A door that opens."
    assert responses["fake.Door.open(key)"] == "Open the door with a key."
    assert responses["fake.Door.colour"] == "The colour of the door."
    assert len(responses) == 83


def test_splits_are_twenty_and_ten_per_cent(package: Path) -> None:
    rows = read_python_docs(modules={"fake": package})
    assert Counter(row["split"] for row in rows) == {"train": 55, "validation": 8, "test": 20}


def test_reading_twice_gives_the_same_rows(package: Path) -> None:
    modules = {"fake": package}
    assert read_python_docs(modules=modules) == read_python_docs(modules=modules)
    assert read_python_docs(1, modules) != read_python_docs(2, modules)


def test_a_module_with_little_documentation_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text('def f():\n    """Say what it does."""\n')
    with pytest.raises(UserError, match="no Python module with 60 documented names among 1"):
        read_python_docs(modules={"tiny": tmp_path / "tiny.py"})


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Read a file, e.g. Text. Then stop.", "Read a file, e.g. Text."),
        ("f(x) -> int\n\nCount the letters of x.", "Count the letters of x."),
        ("Wrap :class:`~a.B` and [`C`] in *one*.", "Wrap a.B and C in one."),
        ("Multiply by 1.5 and add.", "Multiply by 1.5 and add."),
        ("Do two\n    lines here\n\nArgs: x", "Do two lines here"),
        ("Two words.", None),
        ("word " * 41, None),
        ("", None),
    ],
)
def test_first_sentences(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


def test_long_signatures_are_cut(tmp_path: Path) -> None:
    arguments = ", ".join(f"argument_{i}" for i in range(30))
    text = "".join(
        f'def f{i}({arguments}):\n    """Return value number {i}."""\n' for i in range(60)
    )
    (tmp_path / "long.py").write_text(text)
    rows = read_python_docs(modules={"long": tmp_path / "long.py"})
    assert all(len(row["context"]) <= 105 and row["context"].endswith("…)") for row in rows)


def test_standard_modules_become_choice_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = installed_modules()
    few = {name: installed[name] for name in ("email", "logging", "http", "unittest")}
    monkeypatch.setattr(python_docs, "installed_modules", lambda: few)
    seen, unseen = load_tasks(Source(source="python-docs", unseen=1), "choice")
    assert unseen is not None
    assert sorted([*seen.names, *unseen.names]) == sorted(few)
    for task in (*seen, *unseen):
        assert len(task.test) >= 20
        for row in task.test:
            truth = row["candidates"][row["answer"]]
            assert len(set(row["candidates"])) == 20
            assert truth not in row["context"]


def test_python_docs_are_choice_tasks_only() -> None:
    with pytest.raises(
        UserError, match="collection of choice tasks; got objective kind regression"
    ):
        load_tasks(Source(source="python-docs"), "regression")


def test_votes_of_the_land_bank_come_with_the_package() -> None:
    seen, unseen = load_tasks(Source(source="land-bank", unseen=94), "classification")
    assert unseen is not None
    assert (len(seen), len(unseen)) == (190, 94)
    assert sum(len(task) for task in (*seen, *unseen)) == 25612
    assert {row["label"] for task in unseen for row in task.test} == {"agree", "disagree"}
    attribution = (Path(python_docs.__file__).parents[1] / "data/README.md").read_text()
    assert "CC BY 4.0" in attribution
    assert "https://github.com/compdemocracy/openData" in attribution
