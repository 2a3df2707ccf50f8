"""Carves validation and test rows out of train, and cuts tasks to size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from foretune.errors import UserError
from foretune.tasks.example import Example
from foretune.tasks.responses import group_of
from foretune.tasks.row_store import select
from foretune.tasks.seeds import seed_for
from foretune.tasks.task import Task


def carve(
    task: Task,
    *,
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    group_column: str | None = None,
    labelled: bool = False,
) -> Task:
    """The task with validation and test rows taken from train where it has none.

    Where rows have a group, whole groups move and the last ones are taken (the latest dialogues
    are what a deployed model meets next); else rows are drawn with the seed. Test comes first.
    At least one row or group stays in train, so a task that is too small keeps all of them there;
    of a label, too, where rows have labels.

    Args:
        task: Any task.
        validation: Share of the train rows (or groups) that becomes validation; 0 for none.
        test: The same for test.
        seed: Seeds the draw, together with the task's name.
        group_column: As in `draw_candidates`.
        labelled: Rows have a label each.
    """
    units = _units(task, group_column, seed)
    num_test = 0 if task.test else _share(len(units), test, len(units) - 1)
    num_validation = (
        0 if task.validation else _share(len(units), validation, len(units) - 1 - num_test)
    )
    if num_test + num_validation == 0:
        return task
    middle, end = len(units) - num_test - num_validation, len(units) - num_test
    train, between, last = units[:middle], units[middle:end], units[end:]
    if labelled:
        _keep_labels(task, train, [between, last])

    def rows(some: list[Sequence[int]]) -> Sequence[Example]:
        return select(task.train, sorted(i for unit in some for i in unit))

    return replace(
        task,
        train=rows(train),
        validation=rows(between) if num_validation else task.validation,
        test=rows(last) if num_test else task.test,
    )


def _keep_labels(task: Task, train: list[Sequence[int]], held: list[list[Sequence[int]]]) -> None:
    """Moves units to train, in place, until it has every label that is held out."""
    known = {label_of(task.train[i]) for unit in train for i in unit}
    for part in held:
        for unit in list(part):
            new = {label_of(task.train[i]) for i in unit} - known
            if new:
                part.remove(unit)
                train.append(unit)
                known |= new


def label_of(row: Example) -> Any:
    """The label of a row that has one."""
    import numpy as np

    return row["label"] if "label" in row else np.asarray(row["y"]).item()


def cut_train(task: Task, max_rows: int | None, seed: int = 0) -> Task:
    """The task with at most `max_rows` train rows, drawn with the seed, in their old order."""
    if max_rows is None or len(task.train) <= max_rows:
        return task
    rng = random.Random(seed_for(seed, task.name, "rows"))
    kept = sorted(rng.sample(range(len(task.train)), max_rows))
    return replace(task, train=select(task.train, kept))


def _units(task: Task, group_column: str | None, seed: int) -> list[Sequence[int]]:
    """What moves as one: groups and single rows in order of appearance; drawn if all are single."""
    groups: dict[str | int, list[int]] = {}
    grouped = False
    for i, row in enumerate(task.train):
        group = group_of(row, group_column)
        grouped = grouped or group is not None
        groups.setdefault(i if group is None else repr(group), []).append(i)
    units: list[Sequence[int]] = list(groups.values())
    if not grouped:
        random.Random(seed_for(seed, task.name, "carve")).shuffle(units)
    return units


def _share(count: int, share: float, most: int) -> int:
    """`share` of `count`, at least one unless the share is zero, never more than `most`."""
    return max(0, min(most, max(1, round(share * count)))) if share > 0 else 0


def draw_tasks(
    tasks: Sequence[Task], max_tasks: int | None, seed: int = 0, keep: Sequence[str] = ()
) -> list[Task]:
    """At most `max_tasks` of the tasks, drawn with the seed, in their old order.

    Args:
        tasks: All of them.
        max_tasks: How many stay; None for all.
        seed: Seeds the draw.
        keep: Names that stay in any case.
    """
    if max_tasks is None or len(tasks) <= max_tasks:
        return list(tasks)
    kept = set(keep)
    if len(kept) > max_tasks:
        raise UserError(f"max_tasks={max_tasks} is less than the {len(kept)} unseen tasks")
    others = sorted(task.name for task in tasks if task.name not in kept)
    drawn = random.Random(seed_for(seed, "tasks")).sample(others, max_tasks - len(kept))
    chosen = {*kept, *drawn}
    return [task for task in tasks if task.name in chosen]
