"""Conflict between tasks, on collections whose conflict is known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from foretune.errors import UserError
from foretune.evaluation.conflict import REALISED, Conflict, measure_conflict
from foretune.evaluation.conflict_reading import Inputs
from foretune.evaluation.conflict_text import about_tasks, conflict_rows, expectation
from foretune.tasks.task import Task, TaskCollection

T, ROWS, ITEMS = 60, 40, 60
SHARED = Path(__file__).parents[3] / "shared" / "data"


class Unread(tuple[dict[str, Any], ...]):
    """Rows that must not be read."""

    def __iter__(self) -> Any:
        raise AssertionError("test rows were read")

    __getitem__ = __iter__  # type: ignore[assignment]


def collection(kind: str, rows_of: list[list[dict[str, Any]]], validation: int = 8) -> Any:
    tasks = [
        Task(f"t{i}", rows[validation:], rows[:validation], Unread([{}]))
        for i, rows in enumerate(rows_of)
    ]
    return TaskCollection(tuple(tasks), SimpleNamespace(kind=kind))  # type: ignore[arg-type]


def votes(*, offset: float = 0.0, rank: int = 0, shared: bool = True, seed: int = 0) -> Any:
    """Tasks that label items by pooled scores, offsets and differences of a rank, with noise."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(ITEMS if shared else T * ROWS, 6)).astype(np.float32)
    common, directions = rng.normal(size=6), rng.normal(size=(6, rank))
    rows_of = []
    for task in range(T):
        items = rng.permutation(ITEMS)[:ROWS] if shared else task * ROWS + np.arange(ROWS)
        x = vectors[items]
        weights = common + 1.5 * directions @ rng.normal(size=rank)
        scores = x @ weights + offset * rng.normal() + 0.5 * rng.normal(size=ROWS)
        rows_of.append([{"x": a, "y": int(s > 0)} for a, s in zip(x, scores, strict=True)])
    return collection("classification", rows_of)


def scores(conflict: Conflict, place: int = -1) -> dict[str, float]:
    return {name: score[0] for name, score in conflict.by_shots[place].scores.items()}


@pytest.mark.parametrize("shared", [True, False])
def test_tasks_that_agree_are_to_be_pooled(shared: bool) -> None:
    conflict = measure_conflict(votes(shared=shared), shots=(4, None))
    assert conflict.advice == "pool"
    assert conflict.over == ("inputs" if shared else "features")
    assert conflict.expected_gain is not None and conflict.expected_gain[0] < 0.01
    assert scores(conflict)["pooled"] > scores(conflict)["blank"] + 0.2


@pytest.mark.parametrize("shared", [True, False])
def test_offsets_are_told_from_low_rank_differences(shared: bool) -> None:
    conflict = measure_conflict(votes(shared=shared, offset=2), shots=(4, None))
    assert conflict.advice == "pool"
    assert scores(conflict)["offset"] > scores(conflict)["pooled"] + 0.1
    assert conflict.expected_gain is not None and conflict.expected_gain[0] < 0.01


@pytest.mark.parametrize("shared", [True, False])
def test_low_rank_differences_make_peft_ml_pay(shared: bool) -> None:
    conflict = measure_conflict(votes(shared=shared, rank=1), shots=(4, None))
    assert conflict.advice == "PEFT-ML"
    mean, low, high = conflict.low_rank_gain or (0, 0, 0)
    assert 0.05 < low < mean < high
    assert conflict.expected_gain == (REALISED * mean, REALISED * low, REALISED * high)
    assert conflict.shared_inputs == (1.0 if shared else 0.0)
    few, many = scores(conflict, 0), scores(conflict, 1)
    assert min(few["low rank"], many["low rank"]) > many["pooled"] + 0.1
    assert conflict.by_shots[-1].r2["low rank"] > conflict.by_shots[-1].r2["offset"] + 0.2


def test_tasks_that_have_nothing_in_common_keep_the_model() -> None:
    rng = np.random.default_rng(0)
    rows_of = []
    for _ in range(30):
        x, weights = rng.normal(size=(ROWS, 5)).astype(np.float32), rng.normal(size=5)
        rows_of.append([{"x": a, "y": int(a @ weights > 0)} for a in x])
    conflict = measure_conflict(collection("classification", rows_of), shots=(8, None))
    assert conflict.advice == "keep the model"
    assert scores(conflict)["alone"] > scores(conflict)["pooled"] + 0.2


def test_more_than_two_labels_and_labels_that_some_tasks_lack() -> None:
    rng = np.random.default_rng(0)
    vectors, weights = rng.normal(size=(ITEMS, 4)).astype(np.float32), rng.normal(size=(4, 3))
    shift = rng.normal(size=(4, 3))
    rows_of = []
    for task in range(T):
        z = rng.normal()
        labels = (vectors @ (weights + 2 * z * shift))[:, : 2 + task % 2].argmax(1)
        items = rng.permutation(ITEMS)[:ROWS]
        rows_of.append([{"x": vectors[i], "y": f"label {labels[i]}"} for i in items])
    conflict = measure_conflict(collection("classification", rows_of), shots=(4, None))
    assert conflict.advice == "PEFT-ML"
    assert scores(conflict)["low rank"] > 0.8


def test_labels_that_differ_from_task_to_task_cannot_be_pooled() -> None:
    rng = np.random.default_rng(0)
    rows_of = []
    for task in range(8):
        centres = rng.normal(size=(4, 5))
        rows = [(label, rng.normal(size=5) + 2 * centres[label]) for label in range(4)] * 10
        rows_of.append([{"x": x.astype(np.float32), "y": f"{task}-{y}"} for y, x in rows])
        rng.shuffle(rows_of[-1])  # type: ignore[arg-type]
    conflict = measure_conflict(collection("classification", rows_of), shots=(5,))
    assert conflict.own_labels and conflict.expected_gain is None
    assert conflict.advice == "keep the model"
    assert scores(conflict)["pooled"] == pytest.approx(1 / 4)
    assert scores(conflict)["alone"] > 0.6
    assert "Labels differ from task to task" in about_tasks(conflict.to_dict())


def test_targets_of_a_regression_are_scored_by_r2() -> None:
    rng = np.random.default_rng(0)
    common, direction = rng.normal(size=(2, 3, 2))
    rows_of = []
    for _ in range(T):
        x = rng.normal(size=(20, 3)).astype(np.float32)
        y = 10 + x @ (common + rng.normal() * direction) + 0.1 * rng.normal(size=(20, 2))
        rows_of.append([{"x": a, "y": b} for a, b in zip(x, y, strict=True)])
    conflict = measure_conflict(collection("regression", rows_of), shots=(4, None))
    assert (conflict.metric, conflict.unit, conflict.rank) == ("R²", "rows", 1)
    assert scores(conflict)["low rank"] > 0.95 > scores(conflict)["pooled"]
    assert scores(conflict) == pytest.approx(conflict.by_shots[-1].r2)


def choices(taste: float) -> tuple[Any, Inputs]:
    """Tasks that prefer, among responses, the one like the context, or like their own taste."""
    rng = np.random.default_rng(0)
    vectors = {f"text {i}": v for i, v in enumerate(rng.normal(size=(400, 8)))}
    direction = rng.normal(size=8)
    rows_of = []
    for _ in range(30):
        own = taste * rng.choice([-1, 1]) * direction
        rows = []
        for _ in range(30):
            context, *candidates = (f"text {i}" for i in rng.permutation(400)[:6])
            appeal = [vectors[c] @ (vectors[context] + own) for c in candidates]
            fields = {"candidates": candidates, "answer": int(np.argmax(appeal))}
            rows.append({"context": [context], **fields})
        rows_of.append(rows)
    embed = lambda texts: np.stack([vectors[text] for text in texts])  # noqa: E731
    return collection("choice", rows_of), Inputs(embed=embed, most=100_000)


def test_choices_by_the_context_alone_keep_the_model_and_tastes_make_peft_ml_pay() -> None:
    agreed, inputs = choices(taste=0)
    conflict = measure_conflict(agreed, inputs, shots=(4, None))
    assert conflict.advice == "keep the model" and conflict.over == "responses"
    assert scores(conflict)["blank"] > 0.7
    contested, inputs = choices(taste=3)
    assert measure_conflict(contested, inputs, shots=(4, None)).advice == "PEFT-ML"


def test_only_so_many_inputs_are_embedded() -> None:
    tasks, inputs = choices(taste=1)
    embedded: list[int] = []

    def embed(texts: Any) -> Any:
        embedded.append(len(texts))
        return inputs.embed(texts)  # type: ignore[misc]

    conflict = measure_conflict(tasks, Inputs(embed=embed, most=1200), shots=(4,))
    assert embedded[0] <= 400 and conflict.num_rows == pytest.approx(1200 / 6, rel=0.2)


def test_same_seed_same_bits() -> None:
    tasks = votes(rank=1)
    assert measure_conflict(tasks).to_dict() == measure_conflict(tasks).to_dict()


def test_what_cannot_be_measured_is_refused_in_one_line() -> None:
    tasks = votes()
    with pytest.raises(UserError, match=r"it takes 4 seen tasks with at least 5 .* got 3"):
        measure_conflict(tasks.subset(tasks.names[:3]))
    texts = [[{"text": f"{task} {i}", "label": "ab"[i % 2]} for i in range(9)] for task in range(9)]
    with pytest.raises(UserError, match="texts that tasks do not share need a model"):
        measure_conflict(collection("classification", texts, validation=2))


def test_the_words_fit_eighty_columns_and_name_rank_gain_and_advice() -> None:
    fields = measure_conflict(votes(rank=1), shots=(2, 4, 16, None)).to_dict()
    assert json.loads(json.dumps(fields))["advice"] == "PEFT-ML"
    header, *rows = conflict_rows(fields)
    assert header == ["rows per class", "2", "4", "16", "all"]
    assert [len(row) for row in rows] == [5] * len(rows)
    assert rows[-1][0] == "expected gain of PEFT-ML" and rows[-1][1].startswith("+")
    assert "share their inputs: 100 % of the rows" in about_tasks(fields)
    assert "points of accuracy" in expectation(fields) and "Advice: PEFT-ML" in expectation(fields)


def test_people_of_a_conversation_differ_in_few_directions() -> None:
    file = SHARED / "opinions" / "land-bank.jsonl.gz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    rows_of: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["split"] != "test":
                rows_of.setdefault(row["task"], []).append(row)
    tasks = collection("classification", list(rows_of.values()))
    conflict = measure_conflict(tasks, shots=(None,))
    r2 = conflict.by_shots[0].r2
    # a matrix factorisation of all its votes: .26, .28 with offsets, .54
    assert [r2["pooled"], r2["offset"], r2["low rank"]] == pytest.approx(
        [0.25, 0.27, 0.53], abs=0.04
    )
