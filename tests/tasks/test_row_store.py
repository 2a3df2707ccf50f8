"""Rows on disk are the rows that memory would hold: every format, split, draw and fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretune.errors import ForetuneError, UserError
from foretune.tasks import row_store, scratch
from foretune.tasks.drawn_rows import DrawnRows
from foretune.tasks.example import SPLITS, place_of
from foretune.tasks.leakage import find_overlaps
from foretune.tasks.objectives import make_objective
from foretune.tasks.row_store import RowStore, StoredRows, View, select
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import TaskCollection

Load = Callable[..., tuple[TaskCollection, TaskCollection | None]]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(count: int = 120, tasks: int = 4, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"task": f"t{i % tasks}", "text": f"row {i % 90}", "label": i // 4 % 2, "note": None}
        | ({"extra": [i, {"a": 1}]} if i % 3 else {})
        | fields
        for i in range(count)
    ]


def replies(count: int = 900, texts: int = 700, **fields: Any) -> list[dict[str, Any]]:
    return [
        {"task": f"t{i % 5}", "context": [f"c {i}"], "response": f"r {i % texts}", **fields}
        for i in range(count)
    ]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a source twice, checks that rows on disk equal those in memory, gives the former."""

    def load(source: str, kind: str = "classification", **fields: Any) -> Any:
        eager = load_tasks(Source(source=source, **fields), kind)
        monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", 0)
        stored = load_tasks(Source(source=source, **fields), kind)
        monkeypatch.undo()
        for side, expected in zip(stored, eager, strict=True):
            assert (side is None) == (expected is None)
            for task, expected_task in zip(side or (), expected or (), strict=True):
                assert task.name == expected_task.name
                for split in SPLITS:
                    rows = task.split(split)
                    assert isinstance(rows, View)
                    assert isinstance(expected_task.split(split), tuple)
                    assert list(rows) == list(expected_task.split(split))
        return stored

    return load


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    plain = [{k: v for k, v in row.items() if k != "extra"} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), path, row_group_size=50)


def write_dataset(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    plain = [{k: v for k, v in row.items() if k != "extra"} for row in rows]
    datasets.DatasetDict(train=datasets.Dataset.from_list(plain)).save_to_disk(path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet", "d"])
def test_every_format_gives_the_same_rows(tmp_path: Path, both: Load, name: str) -> None:
    path, rows = tmp_path / name, labelled()
    if name == "d.parquet":
        write_parquet(path, rows)
    elif name == "d":
        write_dataset(path, rows)
    elif name == "d.json":
        path.write_text(json.dumps(rows))
    else:
        write(path, rows)
    both(str(path), unseen=1)


def test_arrays_come_back_with_their_type_and_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.arange(60, dtype=np.int16).reshape(10, 2, 3)
    np.savez(tmp_path / "d.npz", task=["p"] * 10, x=x, y=[0, 1] * 5)
    source = Source(source=str(tmp_path / "d.npz"), test=0, validation=0)
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", 0)
    task = load_tasks(source, "classification")[0]["p"]
    assert isinstance(task.train, StoredRows)
    assert task.train[3]["x"].dtype == np.int16
    np.testing.assert_array_equal(np.stack([row["x"] for row in task.train]), x)


@pytest.mark.parametrize(
    "fields",
    [
        {"validation": 0.3, "test": 0.0},
        {"max_rows": 7, "max_tasks": 3, "seed": 2},
        {"unseen": ["t1"], "min_rows": 5},
        {"columns": {"text": "label", "label": "text"}},
    ],
)
def test_every_cut_gives_the_same_rows(tmp_path: Path, both: Load, fields: dict[str, Any]) -> None:
    rows = labelled()
    if "columns" in fields:
        rows = [{**row, "text": row["label"], "label": row["text"]} for row in rows]
    both(write(tmp_path / "d.jsonl", rows), **fields)


@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        (replies(), {}),
        (replies(), {"unseen": 2, "candidate_pool": 30}),
        (replies(), {"candidates_from": "own", "num_candidates": 6}),
        (replies(texts=22), {}),
        ([{**row, "dialogue": i // 7} for i, row in enumerate(replies())], {"max_rows": 50}),
        (
            [*replies(200), {"task": "t1", "context": "c", "candidates": ["a", "b"], "answer": 1}],
            {"num_candidates": 5},
        ),
    ],
)
def test_candidates_are_the_same(
    tmp_path: Path, both: Load, rows: list[Any], fields: dict[str, Any]
) -> None:
    seen, _ = both(write(tmp_path / "d.jsonl", rows), "choice", **fields)
    drawn = [task.train for task in seen if isinstance(task.train, DrawnRows)]
    assert drawn
    for train in drawn:
        assert list(train.candidate_counts()) == [len(row["candidates"]) for row in train]


def test_fitting_and_leaks_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded() -> Any:
        words = load_tasks(Source(source=texts, unseen=1), "classification")
        turns = load_tasks(Source(source=choices, unseen=1, num_candidates=5), "choice")
        fitted = [
            make_objective(kind).fit(side)
            for kind, sides in (("classification", words), ("choice", turns))
            for side in sides
            if side is not None
        ]
        return find_overlaps(*words), find_overlaps(*turns), fitted

    texts = write(tmp_path / "1.jsonl", labelled())
    choices = write(tmp_path / "2.jsonl", [{**row, "context": "c"} for row in replies(texts=60)])
    expected = loaded()
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", 0)
    assert loaded() == expected
    assert expected[0].shared_inputs
    assert expected[1]


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([{}, {"text": " "}], {}, "d.jsonl line 2: text is empty"),
        ([{}, {"text": " "}, "[]"], {}, "d.jsonl line 3: a row must be a JSON object"),
        ([{}, {"text": " "}], {"columns": {"txt": "text"}}, 'renames "txt", which'),
        ([{}, {"text": " "}], {"group_column": "talk"}, "line 2: text is empty"),
        ([{}], {"group_column": "talk"}, 'no column "talk"'),
        ([{"split": "test"}], {}, 'task "a" has no train examples, only 1 test'),
    ],
)
@pytest.mark.parametrize("most", [0, 2**26])
def test_faults_are_the_same_and_in_the_same_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    fields: dict[str, Any],
    message: str,
    most: int,
) -> None:
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", most)
    good = {"task": "a", "text": "t", "label": "l"}
    lines = [[] if row == "[]" else {**good, **row} for row in rows]
    source = write(tmp_path / "d.jsonl", lines)
    with pytest.raises(UserError, match=message):
        load_tasks(Source(source=source, **fields), "classification")


def test_too_few_responses_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", 0)
    source = write(tmp_path / "d.jsonl", replies(10, texts=4))
    with pytest.raises(UserError, match=r"20 candidates need 19 .*only 3 distinct.* to 4 or"):
        load_tasks(Source(source=source), "choice")


# Views


def stored(count: int = 10) -> StoredRows:
    store = RowStore()
    for i in range(count):
        store.add({"i": i})
    rows = store.rows(range(count))
    assert isinstance(rows, StoredRows)
    return rows


def test_a_view_is_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", 0)
    rows, plain = stored(), [{"i": i} for i in range(10)]
    assert (len(rows), rows[-1], rows[np.int64(3)]) == (10, {"i": 9}, {"i": 3})
    assert rows == plain
    assert tuple(plain) == rows
    assert rows[2:8:2] == plain[2:8:2]
    assert rows[::-1][:2] == plain[::-1][:2]
    assert select(rows, [4, 0]) == [{"i": 4}, {"i": 0}]
    assert rows != plain[:9]
    with pytest.raises(IndexError):
        rows[10]


def test_rows_move_to_disk_when_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", 100)
    assert stored(20) == [{"i": i} for i in range(20)]


def test_pooling_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(source=write(tmp_path / "d.jsonl", labelled()))
    expected = load_tasks(source, "classification")[0].pooled()
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", 0)
    pooled = load_tasks(source, "classification")[0].pooled()
    assert isinstance(pooled.train, View)
    assert pooled == expected
    assert pooled.train[5:9] == expected.train[5:9]


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def fileno(self) -> int:
            return 0

        def write(self, content: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(ForetuneError, match="the disk is full; set TMPDIR") as caught:
        scratch.ScratchFile().append(b"row")
    assert "\n" not in str(caught.value)


def test_scratch_files_go_where_tmpdir_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(scratch.tempfile, "tempdir", None)
    file = scratch.ScratchFile()
    file.append(b"abc")
    file.flush()
    assert (scratch.scratch_folder(), file.read(1, 2)) == (str(tmp_path), b"bc")
    assert not list(tmp_path.iterdir())


STATUS = Path("/proc/self/status")
MEMORY = """
import sys
import numpy, pyarrow.parquet
from foretune.tasks import row_store
from foretune.tasks.leakage import find_leaks
from foretune.tasks.sources import Source, load_tasks
row_store.IN_MEMORY_BYTES = 2**20
def peak():  # in MB; what getrusage says of a child begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
before = peak()
seen, unseen = load_tasks(Source(source=sys.argv[1], unseen=3), sys.argv[2])
find_leaks(seen, unseen)
assert sum(map(len, seen)) + sum(map(len, unseen)) == 200_000
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="this system does not tell the peak of memory")
@pytest.mark.parametrize(("suffix", "kind"), [("jsonl", "classification"), ("parquet", "choice")])
def test_memory_does_not_grow_with_the_texts(tmp_path: Path, suffix: str, kind: str) -> None:
    """As Python objects these 200,000 rows would be 250 MB."""
    import pyarrow
    import pyarrow.json
    import pyarrow.parquet

    field = "text" if kind == "classification" else "context"
    path = tmp_path / "d.jsonl"
    with path.open("w") as stream:
        for i in range(200_000):
            row = {"task": f"t{i % 100}", field: f"{i} " + "word " * 150}
            row |= {"label": "x"} if kind == "classification" else {"response": f"reply {i}"}
            stream.write(json.dumps(row) + "\n")
    if suffix == "parquet":
        table = pyarrow.json.read_json(path)
        path = tmp_path / "d.parquet"
        pyarrow.parquet.write_table(table, path)
    process = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path), kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(process.stdout) < 100


@pytest.mark.parametrize("bytes_in_memory", [2**26, 0])
def test_an_example_knows_its_file_and_line(tmp_path, monkeypatch, bytes_in_memory):
    """In memory and on disk, carved, cut and completed; without it, messages name no line."""
    monkeypatch.setattr(row_store, "IN_MEMORY_BYTES", bytes_in_memory)
    rows = [{"task": t, "context": "hi", "response": f"{t} {i}"} for t in "ab" for i in range(9)]
    for name, part in (("1.jsonl", rows[:12]), ("2.jsonl", rows[12:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    tasks, _ = load_tasks(Source(source=str(tmp_path), num_candidates=3, max_rows=5), "choice")
    for example in (row for task in tasks for split in SPLITS for row in task.split(split)):
        text = example["candidates"][example["answer"]]
        index = [row["response"] for row in rows].index(text)
        file, line = ("1.jsonl", index + 1) if index < 12 else ("2.jsonl", index - 11)
        assert place_of(example) == f" ({tmp_path / file} line {line})"
    assert place_of({"text": "typed in Python"}) == ""
