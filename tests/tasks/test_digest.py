"""The digest of rows: the same for the same rows, another one for any change."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import UserDict, deque
from datetime import date
from decimal import Decimal

import numpy as np
import pyarrow.parquet
import pytest
import torch

from foretune.tasks.digest import rows_sha256
from foretune.tasks.drawn_rows import undrawn
from foretune.tasks.row_store import RowStore
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
ROWS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def digest(*splits):
    return Task("t", *splits).digest


def test_equal_rows_have_one_digest_wherever_they_lie():
    store = RowStore()
    for row in ROWS:
        store.add(row)
    assert digest(ROWS) == digest(tuple(dict(reversed(row.items())) for row in ROWS))
    assert digest(ROWS) == digest(store.rows([0, 1]))
    assert digest([{"x": ARRAY}]) == digest([{"x": np.asfortranarray(ARRAY)}])
    assert digest([{"x": ARRAY}]) == digest([{"x": torch.from_numpy(ARRAY)}])


@pytest.mark.parametrize(
    "splits",
    [
        (ROWS[::-1],),
        (ROWS[:1], ROWS[1:]),
        ((), ROWS),
        ([ROWS[0], {"text": "b", "label": "1"}],),
        ([*ROWS, ROWS[0]],),
    ],
)
def test_any_change_of_rows_shows(splits):
    assert digest(*splits) != digest(ROWS)


@pytest.mark.parametrize("changed", [ARRAY + 1, ARRAY.T, ARRAY.astype("f8"), ARRAY.reshape(3, 2)])
def test_any_change_of_an_array_shows(changed):
    assert digest([{"x": changed}]) != digest([{"x": ARRAY}])


@pytest.mark.parametrize(
    ("row", "changed"),
    [
        (UserDict(a=1), UserDict(a=2)),
        ({"x": {1: 0, "a": 0}}, {"x": {1: 0, "a": 1}}),
        ({(0, 1): 0}, {(0, 1): 1}),
        ({"x": torch.ones(2, dtype=torch.bfloat16)}, {"x": torch.zeros(2, dtype=torch.bfloat16)}),
        ({"x": torch.eye(2).to_sparse()}, {"x": torch.ones(2, 2).to_sparse()}),
        ({"x": deque([[1], [1, 2]])}, {"x": deque([[1], [1, 3]])}),
        ({"x": np.array(["a", None])}, {"x": np.array(["b", None])}),
        ({"x": date(2026, 1, 1)}, {"x": date(2026, 1, 2)}),
        ({"x": Decimal(1)}, {"x": Decimal(2)}),
        ({"x": {"a", "b"}}, {"x": {"a", "c"}}),
        ({"x": np.int64(1)}, {"x": np.int64(2)}),
        ({"x": [ARRAY]}, {"x": [ARRAY + 1]}),
    ],
)
def test_rows_of_any_kind_have_a_digest_of_their_own(row, changed):
    assert digest([row]) == digest([row]) != digest([changed])


def test_an_object_without_values_counts_by_its_class():
    assert digest([{"x": object()}]) == digest([{"x": object()}])


def test_candidates_that_were_drawn_anew_show(tmp_path, monkeypatch):
    """Their texts are not put together for it."""
    monkeypatch.setattr("foretune.tasks.row_store.IN_MEMORY_BYTES", 100)
    file = tmp_path / "replies.jsonl"
    rows = [f'{{"task": "t{i % 2}", "context": "c{i}", "response": "r{i}"}}' for i in range(60)]
    file.write_text("\n".join(rows))

    def drawn(seed):
        source = Source(source=str(file), num_candidates=4, candidate_seed=seed)
        return [task.digest for task in load_tasks(source, "choice")[0]]

    assert drawn(0) == drawn(0)
    assert all(first != second for first, second in zip(drawn(0), drawn(1), strict=True))


LABELLED = [
    {"task": "t", "text": "a, b", "label": 1, "weight": 0.5, "spare": None},
    {"task": "t", "text": "ä", "label": 2, "weight": 3.0, "spare": "x"},
]


def train_sha256(file, kind):
    source = Source(source=str(file), validation=0, test=0)
    [task] = load_tasks(source, kind)[0]
    return rows_sha256(task.train)


def test_rows_have_one_sha256_in_all_formats_and_in_any_order(tmp_path):
    table = pyarrow.Table.from_pylist(LABELLED)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    lines = [json.dumps(row) for row in LABELLED]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[::-1]))
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, LABELLED[0])
        writer.writeheader()
        writer.writerows([{**row, "weight": f"{row['weight']:g}"} for row in LABELLED])
    digests = {train_sha256(tmp_path / f"a.{s}", "classification") for s in ("jsonl", "csv")}
    assert digests == {train_sha256(tmp_path / "a.parquet", "classification")}
    assert rows_sha256(LABELLED) != rows_sha256([*LABELLED, LABELLED[0]])


def test_arrays_have_one_sha256_in_all_formats(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(6, 3)), [0.1 * i for i in range(6)]
    np.savez(tmp_path / "a.npz", task=["t"] * 6, x=x, y=y)
    rows = [{"task": "t", "x": list(a), "y": b} for a, b in zip(x.tolist(), y, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = (train_sha256(tmp_path / f"a.{s}", "regression") for s in ("npz", "jsonl"))
    assert first == second != rows_sha256([])


def test_the_sha256_of_rows_is_what_its_description_says():
    texts = ['{"label":"1","text":"ä"}', '{"label":"b","text":"c"}']
    digests = sorted(hashlib.sha256(text.encode()).digest() for text in texts)
    rows = [{"text": "c", "label": "b", "spare": None}, {"text": "ä", "label": 1}]
    assert rows_sha256(rows) == hashlib.sha256(b"".join(digests)).hexdigest()


def test_drawn_candidates_do_not_change_the_sha256_of_rows(tmp_path, monkeypatch):
    file = tmp_path / "replies.jsonl"
    rows = [{"task": f"t{i % 2}", "context": f"c{i}", "response": f"r{i}"} for i in range(60)]
    file.write_text("\n".join(map(json.dumps, rows)))

    def drawn(seed):
        source = Source(source=str(file), num_candidates=4, candidate_seed=seed)
        return [rows_sha256(undrawn(task.train)) for task in load_tasks(source, "choice")[0]]

    in_memory = drawn(0)
    assert in_memory == drawn(1) != in_memory[::-1]
    monkeypatch.setattr("foretune.tasks.row_store.IN_MEMORY_BYTES", 100)
    assert drawn(1) == in_memory
