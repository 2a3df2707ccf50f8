"""Reading, checking, splitting and completing tasks from files."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretune.errors import UserError
from foretune.tasks.example import SPLITS
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task, TaskCollection

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
    table = datasets.Dataset.from_list([{"task": "a", "text": "t", "label": 1}] * 3, features)
    datasets.DatasetDict(train=table, validation=table, test=table).save_to_disk(tmp_path / "d")
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
    with pytest.raises(
        UserError, match=r"owner/name.*Couldn't reach the Hub; there is no file"
    ) as caught:
        load("owner/name")
    assert "\n" not in str(caught.value)


# Splits


def test_missing_splits_are_carved_from_train(tmp_path: Path) -> None:
    task = load(write(tmp_path / "d.jsonl", labelled(count=100)))["a"]
    assert sizes(task) == (70, 10, 20)
    assert len({row["text"] for split in SPLITS for row in task.split(split)}) == 100


def test_a_rare_label_keeps_a_training_row(tmp_path: Path) -> None:
    """Whatever the draw: held out alone it could be neither learnt nor scored."""
    for seed in range(12):
        rows = [*labelled(count=10), {"task": "a", "text": "oh no", "label": "complaint"}]
        task = load(write(tmp_path / "d.jsonl", rows), seed=seed)["a"]
        assert {row["label"] for row in task.train} == {0, 1, "complaint"}
        assert sum(sizes(task)) == 11 and len(task.validation) <= 1 and len(task.test) <= 2


def test_numeric_names_of_unseen_tasks_may_be_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [row for t in (1, 2, 3) for row in labelled(str(t))])
    _, unseen = load_tasks(Source(source=source, unseen=[1, "3"]), "classification")  # type: ignore[list-item]
    assert unseen is not None and unseen.names == ["1", "3"]


def test_dialogues_are_carved_whole_and_the_last_are_test(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", dialogues("a", num=10) + dialogues("b", num=10))
    task = load(path, "choice", num_candidates=3)["a"]
    groups = [{row["dialogue"] for row in task.split(split)} for split in SPLITS]
    assert groups == [set(range(7)), {7}, {8, 9}]


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1))])
def test_carving_never_empties_train(tmp_path: Path, count: int, expected: tuple[int, ...]) -> None:
    task = load(write(tmp_path / "d.jsonl", labelled(count=count, label=0)))["a"]
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


def test_a_source_survives_json() -> None:
    source = Source(source="d.jsonl", unseen=["a"], columns={"u": "task"})
    assert Source(**json.loads(json.dumps(source.to_dict()))) == source


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
