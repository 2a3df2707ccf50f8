"""Reading, checking, splitting and completing tasks from files."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretune.errors import UserError
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import SPLITS, Task, TaskCollection

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("FORETUNE_DATA", ROOT.parent / "shared" / "data"))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def labelled(task: str = "a", count: int = 10, **fields: Any) -> list[dict[str, Any]]:
    return [{"task": task, "text": f"{task} {i}", "label": i % 2, **fields} for i in range(count)]


def dialogues(task: str, num: int = 5, turns: int = 4) -> list[dict[str, Any]]:
    return [
        {"task": task, "dialogue": d, "context": ["hello"], "response": f"{task} {d} {t}"}
        for d in range(num)
        for t in range(turns)
    ]


def load(source: str, kind: str = "classification", **fields: Any) -> TaskCollection:
    seen, _ = load_tasks(Source(source=source, **fields), kind)
    return seen


def sizes(task: Task) -> tuple[int, ...]:
    return tuple(len(task.split(split)) for split in SPLITS)


def rows_of(collection: TaskCollection) -> list[Any]:
    return [row for task in collection for split in SPLITS for row in task.split(split)]


# Formats


def test_splits_of_the_data_are_kept_under_our_names(tmp_path: Path) -> None:
    names = ["train", "valid", "dev", "validation", "test"]
    rows = [{**row, "split": s} for s, row in zip(names, labelled(count=5), strict=True)]
    task = load(write(tmp_path / "d.jsonl", rows))["a"]
    assert sizes(task) == (1, 3, 1)
    assert task.test[0] == {"text": "a 4", "label": 0}


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet"])
def test_every_format_gives_the_same_tasks(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = labelled("a") + labelled("b")
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    expected = load(write(tmp_path / "plain.jsonl", rows))
    assert load(str(path)).tasks == expected.tasks


def test_a_folder_is_all_its_data_files(tmp_path: Path) -> None:
    write(tmp_path / "2.jsonl", labelled("b"))
    write(tmp_path / "1.jsonl", labelled("a"))
    (tmp_path / "README.md").write_text("no data")
    assert load(str(tmp_path)).names == ["a", "b"]


def test_a_test_file_beside_a_train_file_is_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", labelled(count=10))
    write(tmp_path / "test.jsonl", labelled(count=4))
    assert sizes(load(str(tmp_path))["a"]) == (9, 1, 4)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_npz_arrays_become_rows(tmp_path: Path, kind: str) -> None:
    x = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    splits = ["train", "train", "validation", "test"]
    np.savez(tmp_path / "d.npz", task=["p"] * 4, split=splits, x=x, y=[0, 1, 1, 0])
    task = load(str(tmp_path / "d.npz"), kind)["p"]
    np.testing.assert_array_equal(task.test[0]["x"], x[3])
    assert task.test[0]["y"] == 0
    assert type(task.test[0]["y"]) is (int if kind == "classification" else float)


def test_parquet_list_columns_become_arrays(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"task": 7, "x": [[1.0, 2.0]], "y": [0.5, i]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    row = load(str(tmp_path / "d.parquet"), "regression")["7"].train[0]
    assert row["x"].shape == (1, 2)
    assert row["y"].shape == (2,)


def test_columns_are_renamed(tmp_path: Path) -> None:
    rows = [{"user": "u", "utterance": f"hi {i}", "intent": "greet"} for i in range(5)]
    columns = {"user": "task", "utterance": "text", "intent": "label"}
    task = load(write(tmp_path / "d.jsonl", rows), columns=columns)["u"]
    assert set(task.train[0]) == {"text", "label"}


@pytest.mark.parametrize("fields", [{"text": "t"}, {"prompt": "p", "completion": "c"}])
def test_language_rows(tmp_path: Path, fields: dict[str, str]) -> None:
    rows = [{"task": "a", **fields}] * 5
    assert load(write(tmp_path / "d.jsonl", rows), "causal-lm")["a"].train[0] == fields


def test_a_saved_hf_dataset_keeps_its_splits_and_class_names(tmp_path: Path) -> None:
    import datasets

    labels = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({c: datasets.Value("string") for c in ("task", "text")})
    features["label"] = labels
    one = datasets.Dataset.from_list([{"task": "a", "text": "t", "label": 1}] * 3, features)
    datasets.DatasetDict(train=one, validation=one, test=one).save_to_disk(tmp_path / "d")
    task = load(str(tmp_path / "d"))["a"]
    assert sizes(task) == (3, 3, 3)
    assert task.train[0]["label"] == "yes"


def test_an_hf_dataset_is_loaded_with_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fake(name: str, config: str | None) -> Any:
        assert (name, config) == ("owner/name", "small")
        return {"train": datasets.Dataset.from_list(labelled())}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load("owner/name:small").names == ["a"]


def test_an_unreachable_hf_dataset_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fake(name: str, config: str | None) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fake)
    with pytest.raises(UserError, match="owner/name.*Couldn't reach the Hub; nor") as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


# Splits


def test_missing_splits_are_carved_from_train(tmp_path: Path) -> None:
    task = load(write(tmp_path / "d.jsonl", labelled(count=100)))["a"]
    assert sizes(task) == (70, 10, 20)
    assert len({row["text"] for split in SPLITS for row in task.split(split)}) == 100


def test_dialogues_are_carved_whole_and_the_last_are_test(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", dialogues("a", num=10) + dialogues("b", num=10))
    task = load(path, "choice", num_candidates=3)["a"]
    found = [{row["dialogue"] for row in task.split(split)} for split in SPLITS]
    assert found == [set(range(7)), {7}, {8, 9}]


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1))])
def test_carving_never_empties_train(tmp_path: Path, count: int, expected: tuple[int, ...]) -> None:
    task = load(write(tmp_path / "d.jsonl", labelled(count=count)))["a"]
    assert sizes(task) == expected


def test_carving_one_task_does_not_depend_on_the_others(tmp_path: Path) -> None:
    alone = load(write(tmp_path / "1.jsonl", labelled("b", 50)))
    together = load(write(tmp_path / "2.jsonl", labelled("a", 30) + labelled("b", 50)))
    assert alone["b"] == together["b"]


def test_sizes_are_cut(tmp_path: Path) -> None:
    rows = [row for name in "abcdef" for row in labelled(name, 20)] + labelled("small", 3)
    source = write(tmp_path / "d.jsonl", rows)
    tasks = load(source, min_rows=10, max_tasks=4, max_rows=5)
    assert len(tasks) == 4
    assert "small" not in tasks.names
    assert {sizes(task) for task in tasks} == {(5, 2, 4)}
    assert load(source, max_tasks=3, seed=1).names != load(source, max_tasks=3, seed=2).names


def test_named_unseen_tasks_survive_max_tasks(tmp_path: Path) -> None:
    rows = [row for name in "abcdef" for row in labelled(name)]
    source = Source(source=write(tmp_path / "d.jsonl", rows), unseen=["c"], max_tasks=3)
    seen, unseen = load_tasks(source, "classification")
    assert unseen is not None
    assert (len(seen), unseen.names) == (2, ["c"])


def test_unseen_by_number_and_by_second_source(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", labelled("a") + labelled("b") + labelled("c"))
    second = write(tmp_path / "2.jsonl", labelled("d"))
    seen, unseen = load_tasks(Source(source=first, unseen=1), "classification")
    assert unseen is not None
    assert {*seen.names, *unseen.names} == {"a", "b", "c"}
    seen, unseen = load_tasks(Source(source=first, unseen=second), "classification")
    assert unseen is not None
    assert (len(seen), unseen.names) == (3, ["d"])


# Candidates


@pytest.mark.parametrize("pool", [None, 7])
def test_no_distractor_equals_the_truth_and_none_stands_twice(
    tmp_path: Path, pool: int | None
) -> None:
    rows = [row for name in "abcd" for row in dialogues(name, 10)]
    for i, row in enumerate(rows):
        row["response"] = f"answer {i % 23}"  # many rows share a response
        row["id"] = i % 23
    source = write(tmp_path / "d.jsonl", rows)
    found = load(source, "choice", num_candidates=6, candidate_pool=pool)
    for row in rows_of(found):
        assert len(set(row["candidates"])) == 6
        assert row["candidates"][row["answer"]] == f"answer {row['id']}"
        assert "response" not in row


def test_distractors_come_from_other_dialogues_of_the_same_split(tmp_path: Path) -> None:
    rows = [row for name in "abcd" for row in dialogues(name, 10)]
    tasks = load(write(tmp_path / "d.jsonl", rows), "choice", num_candidates=4)
    for task in tasks:
        for split, dialogue in [("train", range(7)), ("validation", (7,)), ("test", (8, 9))]:
            for row in task.split(split):
                truth = row["candidates"].pop(row["answer"]).split()
                others = [c.split() for c in row["candidates"]]
                assert all(other[:2] != truth[:2] for other in others)
                assert all(int(other[1]) in dialogue for other in others)


def test_without_groups_distractors_come_from_other_tasks(tmp_path: Path) -> None:
    rows = [row for name in "abcd" for row in dialogues(name, 10)]
    for row in rows:
        del row["dialogue"]
    for task in load(write(tmp_path / "d.jsonl", rows), "choice", num_candidates=4):
        for row in rows_of(TaskCollection((task,))):
            from_own = [c for c in row["candidates"] if c.startswith(task.name)]
            assert from_own == [row["candidates"][row["answer"]]]


def test_a_single_task_falls_back_on_its_own_rows(tmp_path: Path) -> None:
    rows = [{"task": "a", "context": "c", "response": f"r {i}"} for i in range(8)]
    tasks = load(write(tmp_path / "d.jsonl", rows), "choice", num_candidates=8)
    assert all(len(set(row["candidates"])) == 8 for row in rows_of(tasks))


def test_large_sources_draw_distinct_distractors_evenly() -> None:
    rows = [{"context": "c", "response": f"r {i % 700}"} for i in range(3000)]
    tasks = tuple(Task(str(t), train=tuple(rows[t * 1000 : (t + 1) * 1000])) for t in range(3))
    found = rows_of(draw_candidates(TaskCollection(tasks), 20))
    assert all(len(set(row["candidates"])) == 20 for row in found)
    places = np.bincount([row["answer"] for row in found], minlength=20)
    assert places.min() > 90
    assert places.max() < 220


def test_a_pool_bounds_the_distinct_texts_of_a_task(tmp_path: Path) -> None:
    rows = [row for name in "abcd" for row in dialogues(name, 30)]
    tasks = load(write(tmp_path / "d.jsonl", rows), "choice", num_candidates=5, candidate_pool=9)
    for task in tasks:
        drawn = {
            c for row in task.train for i, c in enumerate(row["candidates"]) if i != row["answer"]
        }
        assert len(drawn) == 9


def test_candidates_that_the_data_bring_stay(tmp_path: Path) -> None:
    row = {"task": "a", "context": "c", "candidates": ["x", "y"], "answer": 1}
    found = load(write(tmp_path / "d.jsonl", [row] * 5), "choice")["a"].train[0]
    assert found == {"context": "c", "candidates": ["x", "y"], "answer": 1}


def test_loading_does_not_depend_on_python_hashing(tmp_path: Path) -> None:
    rows = [row for name in "abcd" for row in dialogues(name, 10)]
    source = write(tmp_path / "d.jsonl", rows)
    program = (
        "import hashlib; from foretune.tasks.sources import *;"
        f"both = load_tasks(Source(source={source!r}, unseen=2, num_candidates=4), 'choice');"
        "print(hashlib.md5(repr([c.tasks for c in both]).encode()).hexdigest())"
    )
    results = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(results) == 1


def test_seeds_change_the_candidates(tmp_path: Path) -> None:
    rows = [row for name in "abcd" for row in dialogues(name, 10)]
    source = write(tmp_path / "d.jsonl", rows)
    one, same, other = (
        load(source, "choice", candidate_seed=s, num_candidates=4) for s in (0, 0, 1)
    )
    assert one.tasks == same.tasks
    assert one.tasks != other.tasks


# Errors

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
        ("classification", {**GOOD, "label": 0.5}, "line 2: label must be a class .* got 0.5"),
        ("classification", {**GOOD, "text": "  "}, "line 2: text is empty"),
        ("classification", {**GOOD, "text": 3}, "line 2: text must be text, got 3"),
        ("classification", {"task": "a"}, "line 2: x and y missing: a classification row needs"),
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
        ("choice", {"task": "a", "response": "r"}, "line 2: context and candidates and answer"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(
    tmp_path: Path, kind: str, row: Any, message: str
) -> None:
    good = {"text": "t", "label": "l"} if kind == "classification" else {"text": "t"}
    good = {"regression": {"x": [1], "y": 0}, "choice": CHOICE}.get(kind, good)
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
        ("d.parquet", b"no parquet", "d.parquet is no readable Parquet file"),
        ("d.npz", b"no npz", "d.npz is no readable .npz file"),
        ("d.txt", b"text", "d.txt is no data file: its name must end in"),
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
        ({"unseen": 2}, "it sets 2 aside, but there are 2 tasks"),
        ({"unseen": 0}, "unseen must be a number not below 1"),
        ({"unseen": ["alpah"]}, 'no task of .*Did you mean "alpha"'),
        ({"unseen": ["alpha", "beta"]}, "must leave at least one seen task"),
        ({"unseen": "alpha"}, r"write a list: unseen=\[\"alpha\"\]"),
        ({"min_rows": 99}, "no task of .* has min_rows=99 rows, the largest has 10"),
        ({"task_column": "tsk"}, 'no "tsk" column.*Did you mean "task"'),
        ({"group_column": "talk"}, 'no column "talk" .group_column.; it has label, task, text'),
        ({"columns": {"txt": "text"}}, 'renames "txt", which .*Did you mean "text"'),
        ({"columns": {"task": "text"}}, 'has a column "text" already'),
        ({"unseen": 1, "test": 0.0}, "unseen task .* has no test rows"),
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
    with pytest.raises(UserError, match="needs at least 2 tasks, .* has only one"):
        load(write(tmp_path / "d.jsonl", labelled()), unseen=1)


def test_a_task_in_both_sources_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "1.jsonl", labelled("a") + labelled("b"))
    second = write(tmp_path / "2.jsonl", labelled("b") + labelled("c"))
    with pytest.raises(UserError, match=r'task "b" is in both groups, seen .*1\.jsonl.*2\.jsonl'):
        load(first, unseen=second)


def test_a_task_without_train_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='task "a" has no train rows, only 10 test'):
        load(write(tmp_path / "d.jsonl", labelled(split="test")))


def test_too_few_responses_say_how_many_there_are(tmp_path: Path) -> None:
    rows = [{"task": "a", "context": "c", "response": f"r {i}"} for i in range(4)]
    with pytest.raises(UserError, match='"a": 20 candidates need 19 .*are 3 distinct.* to 4 or'):
        load(write(tmp_path / "d.jsonl", rows), "choice")


def test_a_source_survives_json() -> None:
    source = Source(source="d.jsonl", unseen=["a"], columns={"u": "task"})
    assert Source(**json.loads(json.dumps(source.to_dict()))) == source


# Real data


@pytest.mark.skipif(not (SHARED / "convai2").is_dir(), reason="shared data is not at hand")
def test_convai2_personas() -> None:
    source = Source(source=str(SHARED / "convai2" / "valid.jsonl.gz"), unseen=20)
    seen, unseen = load_tasks(source, "choice")
    assert unseen is not None
    assert (len(seen), len(unseen)) == (80, 20)
    for task in (*seen, *unseen):
        dialogues = [{row["dialogue"] for row in task.split(split)} for split in SPLITS]
        assert not dialogues[0] & dialogues[1]
        assert not dialogues[0] & dialogues[2]
        assert all(len(set(row["candidates"])) == 20 for row in task.test)
