"""Distractors: drawn from the right rows, never the truth, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foretune.errors import UserError
from foretune.tasks import candidates
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.example import SPLITS
from foretune.tasks.sources import Source, load_tasks
from foretune.tasks.task import Task, TaskCollection


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def dialogues(task: str, num: int = 5, turns: int = 4) -> list[dict[str, Any]]:
    return [
        {"task": task, "dialogue": d, "context": ["hello"], "response": f"{task} {d} {t}"}
        for d in range(num)
        for t in range(turns)
    ]


def load(source: str, kind: str = "classification", **fields: Any) -> TaskCollection:
    seen, _ = load_tasks(Source(source=source, **fields), kind)
    return seen


def rows_of(collection: TaskCollection) -> list[Any]:
    return [row for task in collection for split in SPLITS for row in task.split(split)]


@pytest.mark.parametrize("pool", [None, 7])
def test_no_distractor_equals_the_truth_and_none_stands_twice(
    tmp_path: Path, pool: int | None
) -> None:
    rows = [row for name in "abcd" for row in dialogues(name, 10)]
    for i, row in enumerate(rows):
        row["response"] = f"answer {i % 23}"  # many rows share a response
        row["id"] = i % 23
    source = write(tmp_path / "d.jsonl", rows)
    drawn = load(source, "choice", num_candidates=6, candidate_pool=pool)
    for row in rows_of(drawn):
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
                assert all(distractor[:2] != truth[:2] for distractor in others)
                assert all(int(distractor[1]) in dialogue for distractor in others)


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
    drawn = rows_of(draw_candidates(TaskCollection(tasks), 20))
    assert all(len(set(row["candidates"])) == 20 for row in drawn)
    places = np.bincount([row["answer"] for row in drawn], minlength=20)
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


@pytest.mark.parametrize("origin", ["own", "others"])
def test_drawing_in_parts_draws_the_same(monkeypatch: pytest.MonkeyPatch, origin: str) -> None:
    rows = [{"context": "c", "response": f"r {i % 300}"} for i in range(1200)]
    tasks = TaskCollection(tuple(Task(str(t), train=tuple(rows[t::3])) for t in range(3)))
    at_once = draw_candidates(tasks, 20, own_task=origin == "own")
    monkeypatch.setattr(candidates, "DRAW_ROWS", 7)
    assert draw_candidates(tasks, 20, own_task=origin == "own") == at_once


def test_a_pool_of_a_large_source_is_distinct_and_from_other_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "POOL_FROM_ALL_UP_TO", 100)
    rows = [{"context": "c", "response": f"{i // 200} {i}"} for i in range(600)]
    tasks = TaskCollection(
        tuple(Task(str(t), train=tuple(rows[t * 200 : (t + 1) * 200])) for t in range(3))
    )
    for task in draw_candidates(tasks, 5, pool=9):
        drawn = {
            c for row in task.train for i, c in enumerate(row["candidates"]) if i != row["answer"]
        }
        assert len(drawn) == 9
        assert not any(text.startswith(task.name + " ") for text in drawn)


def test_candidates_that_the_data_bring_stay(tmp_path: Path) -> None:
    row = {"task": "a", "context": "c", "candidates": ["x", "y"], "answer": 1}
    example = load(write(tmp_path / "d.jsonl", [row] * 5), "choice")["a"].train[0]
    assert example == {"context": "c", "candidates": ["x", "y"], "answer": 1}


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
    first, same, second_seed = (
        load(source, "choice", candidate_seed=s, num_candidates=4) for s in (0, 0, 1)
    )
    assert first.tasks == same.tasks
    assert first.tasks != second_seed.tasks


def test_too_few_responses_say_how_many_there_are(tmp_path: Path) -> None:
    rows = [{"task": "a", "context": "c", "response": f"r {i}"} for i in range(4)]
    with pytest.raises(UserError, match=r'"a": 20 candidates need 19 .*only 3 distinct.* to 4 or'):
        load(write(tmp_path / "d.jsonl", rows), "choice")
