"""The held-out seen tasks, by which learning rates, methods and ways to adapt are chosen.

The score on the tasks that a base was retrained on does not show how well the base adapts: a
learning rate that is too high raises the first and lowers the second. Every choice is therefore
made on seen tasks that were held out of retraining, and on many examples: with 20 examples from
each of 8 tasks, chance can hide a difference of two points between rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from foretune.errors import UserError
from foretune.tasks.redrawn import redraw_validation
from foretune.tasks.row_store import join
from foretune.tasks.splits import carve
from foretune.tasks.task import Task, TaskCollection
from foretune.training import verbs
from foretune.training.shots import draw_shots

SHARES = (0.5, 0.3, 0.15)  # of a held-out task's training examples, to be scored
ADAPTATIONS = 6  # at least so many per score and number of shots: a single draw is too noisy


def build_search_tasks(
    tasks: TaskCollection,
    shots: Sequence[int | None],
    seed: int,
    group_column: str | None = None,
) -> TaskCollection:
    """Copies of held-out seen tasks with many validation examples to score on.

    No base that is scored on them was retrained on them, so a part of their training examples moves
    to the validation split: the largest of `SHARES` that leaves enough for a draw of `shots`. All
    examples are then all that are left: few scored examples are noise in every choice, and fewer
    training examples only make it for tasks that are somewhat smaller. Choice examples that moved
    get other distractors than those of the training examples (`redraw_validation`).

    Args:
        tasks: Seen tasks, held out of every retraining that is scored on them.
        shots: Numbers of training examples that bases are adapted on; None for all.
        seed: Random seed of the parts.
        group_column: Column with the group of an example; a group is not split.

    Raises:
        UserError: No task has validation examples.
    """
    finite = [k for k in shots if k is not None] or [1]  # one of each class, at least
    search_tasks = []
    for task in tasks:
        unsplit = Task(task.name, task.train, task.validation)
        split = unsplit
        for share in SHARES:
            parts = carve(
                Task(task.name, task.train),
                validation=0,
                test=share,
                seed=seed,
                group_column=group_column,
            )
            split = Task(task.name, parts.train, join([parts.test, task.validation]))
            if all(_num_drawn(tasks, split, k) == _num_drawn(tasks, unsplit, k) for k in finite):
                break
            split = unsplit
        search_tasks.append(split)
    moved = usable(dataclasses.replace(tasks, tasks=tuple(search_tasks)))
    return redraw_validation(moved, seed) if verbs.objective_of(tasks).kind == "choice" else moved


def usable(tasks: TaskCollection) -> TaskCollection:
    """The tasks that have both training and validation examples.

    Raises:
        UserError: There are none.
    """
    names = [task.name for task in tasks if task.validation and task.train]
    if not names:
        raise UserError(
            "held-out seen tasks have no validation examples to score on; set tasks.validation"
        )
    return tasks.subset(names)


def _num_drawn(tasks: TaskCollection, task: Task, shots: int | None) -> int:
    """Training examples in a draw of `shots` from the task; shots are per class if it has any."""
    alone = dataclasses.replace(tasks, tasks=(task,))
    kind = verbs.objective_of(tasks).kind
    return sum(len(slot.train) for slot in draw_shots(alone, kind, shots, 1, 0))


def num_draws(num_tasks: int) -> int:
    """Draws of shots per task, so that `num_tasks` tasks make at least `ADAPTATIONS` in all."""
    return math.ceil(ADAPTATIONS / num_tasks)
