"""`auto` tries what the measured conflict leaves worth a trial."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import foretune
from foretune.evaluation.promising import promising
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import family

CANDIDATES: list[dict[str, Any]] = [
    {"name": "none"},
    {"name": "standard"},
    {"name": "peft-ml"},
    {"name": "factorised-heads"},
    {"name": "peft-ml", "form": "last-layer"},
]


def votes(disagreement: float) -> TaskCollection:
    rng = np.random.default_rng(0)
    items, common, direction = rng.normal(size=(80, 3)), *rng.normal(size=(2, 80))
    tasks = []
    for task in range(60):
        scores = 2 * common + disagreement * rng.normal() * direction
        examples = rng.permutation(80)[:60]
        rows = [{"x": items[i], "y": int(scores[i] > 0)} for i in examples]
        tasks.append(Task(f"t{task}", rows))
    return TaskCollection(tuple(tasks), foretune.Classification())


@pytest.mark.parametrize(("disagreement", "places"), [(0.0, [0, 1]), (6.0, [2, 3, 4, 0, 1])])
def test_what_pays_where_tasks_disagree_is_left_out_or_comes_first(
    disagreement: float, places: list[int]
) -> None:
    tried = promising(CANDIDATES, votes(disagreement), (4, None), seed=0)
    assert [CANDIDATES.index(candidate) for candidate in tried] == places


def test_two_candidates_remain() -> None:
    assert promising(CANDIDATES[1:], votes(0), (4,), seed=0) == CANDIDATES[1:]


def test_tasks_that_do_not_share_their_inputs_leave_all_candidates() -> None:
    assert promising(CANDIDATES, family(8), (4,), seed=0) == CANDIDATES
