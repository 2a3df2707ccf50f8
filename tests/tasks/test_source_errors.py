"""Every fault of the data or of a source has its own message, which says where it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretune.errors import UserError
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import TaskCollection


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def labelled(task: str = "a", count: int = 10, **fields: Any) -> list[dict[str, Any]]:
    return [{"task": task, "text": f"{task} {i}", "label": i % 2, **fields} for i in range(count)]


def load(source: str, kind: str = "classification", **fields: Any) -> TaskCollection:
    seen, _ = load_tasks(Source(source=source, **fields), kind)
    return seen


GOOD = {"task": "a", "text": "t", "label": "l"}
CHOICE = {"task": "a", "context": "c", "candidates": ["x", "y"], "answer": 0}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("classification", '{"task": "a", ', "line 2: malformed JSON"),
        ("classification", "[1, 2]", "line 2: a row must be a JSON object"),
        ("classification", {"text": "t", "label": "l"}, 'line 2: no "task" column; it has label'),
        ("classification", {**GOOD, "task": " "}, "line 2: task is empty"),
        ("classification", {**GOOD, "task": 1.5}, "line 2: task must be text, got 1.5"),
        ("classification", {**GOOD, "split": "tset"}, 'line 2: split must be .* got "tset"'),
        ("classification", {"task": "a", "text": "t"}, "line 2: label missing.*has task, text"),
        (
            "classification",
            {**GOOD, "label": 0.5},
            "line 2: label must be a class .* got 0.5: write it as",
        ),
        ("classification", {**GOOD, "task": None}, "line 2: task is empty: each row needs"),
        ("classification", {**GOOD, "text": "  "}, "line 2: text is empty"),
        ("classification", {**GOOD, "text": 3}, "line 2: text must be text, got 3"),
        (
            "classification",
            {"task": "a"},
            "line 2: text and label missing: a classification row needs",
        ),
        ("causal-lm", {"task": "a", "prompt": "p"}, "line 2: completion missing"),
        ("regression", {"task": "a", "x": "text", "y": 1}, "line 2: x must be an array"),
        ("regression", {"task": "a", "x": [[1], [2, 3]], "y": 1}, "line 2: x must be an array"),
        ("regression", {"task": "a", "x": [float("nan")], "y": 1}, "line 2: x holds NaN"),
        ("regression", {"task": "a", "x": [], "y": 1}, "line 2: x is empty"),
        ("regression", {"task": "a", "x": [1], "y": float("inf")}, "line 2: y must be a finite"),
        ("choice", {**CHOICE, "answer": 7}, "line 2: answer is outside .* answer=7 with 2"),
        ("choice", {**CHOICE, "answer": "x"}, "line 2: answer is the position"),
        ("choice", {**CHOICE, "answer": None}, "line 2: answer missing"),
        ("choice", {**CHOICE, "candidates": ["x"]}, "line 2: at least 2 candidates .* got 1"),
        ("choice", {**CHOICE, "candidates": "xy"}, "line 2: candidates must be a list"),
        ("choice", {**CHOICE, "candidates": ["x", ""]}, "line 2: a candidate is empty"),
        ("choice", {**CHOICE, "context": []}, "line 2: context is empty"),
        ("choice", {**CHOICE, "context": ["hi", 3]}, "line 2: a turn of context must be text"),
        ("choice", {"task": "a", "response": "r"}, "line 2: context missing"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    tmp_path: Path, kind: str, row: Any, message: str
) -> None:
    good: dict[str, Any] = (
        {"text": "t", "label": "l"} if kind == "classification" else {"text": "t"}
    )
    good_by_kind: dict[str, dict[str, Any]] = {"regression": {"x": [1], "y": 0}, "choice": CHOICE}
    good = good_by_kind.get(kind, good)
    path = write(tmp_path / "d.jsonl", [{"task": "a", **good}, row, {"task": "a", **good}])
    with pytest.raises(UserError, match=rf"d\.jsonl {message}") as caught:
        load(path, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b'{"task": "a"}\n{"t": "\xff"}\n', r"d.jsonl line 2: byte 0xff is not UTF-8"),
        ("d.jsonl", b"\n\n", "d.jsonl is empty"),
        ("d.json", b"[]", "d.json is empty"),
        ("d.json", b"[\n{},\n{]", "d.json: malformed JSON.* line 3"),
        ("d.json", b"[{}, 3]", "d.json row 2: a row must be a JSON object"),
        ("d.jsonl.gz", b"no gzip", "d.jsonl.gz cannot be read: Not a gzipped file"),
        ("d.parquet", b"no parquet", "d.parquet is not a readable Parquet file"),
        ("d.npz", b"no npz", "d.npz is not a readable .npz file"),
        ("d.txt", b"text", "d.txt is not a data file: its name must end in"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / name))


def test_npz_arrays_must_be_equally_long(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", task=["a", "a"], x=np.zeros((3, 2)), y=[0, 1])
    with pytest.raises(UserError, match=r"lengths differ: task \(2,\), x \(3, 2\), y \(2,\)"):
        load(str(tmp_path / "d.npz"))


def test_a_wrong_path_suggests_a_near_one(tmp_path: Path) -> None:
    write(tmp_path / "personas.jsonl", labelled())
    with pytest.raises(UserError, match=r'no such file.*Did you mean "personas.jsonl"\?'):
        load(str(tmp_path / "persona.jsonl"))


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(UserError, match=r"no data file in folder.*it holds notes\.md"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unseen": 2}, "it holds out 2, but there are 2 tasks"),
        ({"unseen": 0}, "unseen must be a number not below 1"),
        ({"unseen": ["alpah"]}, 'not a task of .*Did you mean "alpha"'),
        ({"unseen": ["alpha", "beta"]}, "must leave at least one seen task"),
        ({"unseen": "alpha"}, r"write a list, such as unseen=\[\"alpha\"\]\.$"),
        ({"unseen": "alpah"}, r"there is none.*unseen=\[.*Did you mean \"alpha\""),
        ({"min_rows": 99}, "no task of .* has min_rows=99 rows, the largest has 10"),
        ({"task_column": "tsk"}, 'no "tsk" column.*Did you mean "task"'),
        ({"group_column": "talk"}, 'no column "talk" .group_column.; it has label, task, text'),
        ({"columns": {"txt": "text"}}, 'renames "txt", which .*Did you mean "text"'),
        ({"columns": {"task": "text"}}, 'already has a column "text"'),
        ({"unseen": 1, "test": 0.0}, "unseen task .* has no rows of split test and test=0"),
        ({"unseen": ["alpha", "beta"], "max_tasks": 1}, "max_tasks=1 is less than the 2 unseen"),
        ({"validation": 0.5, "test": 0.5}, "must leave rows for train"),
        ({"num_candidates": 1}, "num_candidates must be a number not below 2"),
    ],
)
def test_bad_sources(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "d.jsonl", labelled("alpha") + labelled("beta"))
    with pytest.raises(UserError, match=message):
        load(path, **fields)


def test_one_task_cannot_be_split_into_seen_and_unseen(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs at least 2 tasks, .* has only one"):
        load(write(tmp_path / "d.jsonl", labelled()), unseen=1)


def test_a_task_in_both_sources_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", labelled("a") + labelled("b"))
    second = write(tmp_path / "2.jsonl", labelled("b") + labelled("c"))
    with pytest.raises(UserError, match=r'task "b" is in both groups, seen .*1\.jsonl.*2\.jsonl'):
        load(first, unseen=second)


def test_a_task_without_train_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='task "a" has no train examples, only 10 test'):
        load(write(tmp_path / "d.jsonl", labelled(split="test")))
