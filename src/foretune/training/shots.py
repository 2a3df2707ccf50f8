"""`draw_shots`: the few examples of each unseen task that it is adapted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.tasks.labels import label_of
from foretune.tasks.row_store import select
from foretune.tasks.rows import CLASSES
from foretune.tasks.task import Task
from foretune.training.data import SlotRows, stable_hash


def draw_shots(
    tasks: Iterable[Task], kind: str, shots: int | None, draws: int, seed: int
) -> Iterator[SlotRows]:
    """One slot per task and draw, with the first examples of a seeded permutation.

    A draw of fewer shots is the beginning of the draw of more, and depends on the task's name but
    not on the other tasks.

    Args:
        tasks: The unseen tasks.
        kind: The objective's kind; with classes, `shots` counts the examples of each class.
        shots: Examples per task or class; None for all.
        draws: Independent draws per task.
        seed: Random seed of the draws.

    Raises:
        UserError: A task has no training examples, or `shots` is below 1.
    """
    if shots is not None and shots < 1:
        raise UserError(f"shots must be at least 1, got {shots}")
    for task in tasks:
        if not task.train:
            raise UserError(f'task "{task.name}" has no training examples to adapt on')
        for draw in range(draws):
            rng = np.random.default_rng([seed, stable_hash(task.name), draw])
            order = rng.permutation(len(task.train)).tolist()
            chosen = order if shots is None else _first_shots(task, order, shots, kind)
            yield SlotRows(
                key=task.name if draw == 0 else f"{task.name}#{draw}",
                train=select(task.train, chosen),
                validation=task.validation,
                test=task.test,
                task=task.name,
                draw=draw,
            )


def _first_shots(task: Task, order: list[int], shots: int, kind: str) -> list[int]:
    if kind not in CLASSES:
        return order[:shots]
    count: Counter[Any] = Counter()
    chosen = []
    for i in order:
        label = label_of(task.train[i])
        if count[label] < shots:
            count[label] += 1
            chosen.append(i)
    return chosen
