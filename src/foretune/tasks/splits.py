"""Carve validation and test examples out of train, and limit the size of tasks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from foretune.errors import UserError
from foretune.tasks.example import Example
from foretune.tasks.labels import label_of
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
    scored: bool = False,
) -> Task:
    """The task with validation and test examples moved out of train, if it has none.

    Where examples have groups, whole groups are moved, the last ones first (the latest dialogues
    are most like those that a deployed model meets); else examples are drawn with the seed. Test
    takes precedence. At least one example or group stays in train, and with labels at least one
    example of each, so a task that is too small keeps all examples in train.

    Args:
        task: Any task.
        validation: Share of the train examples (or groups) to move to validation; 0 for none.
        test: Share of the train examples (or groups) to move to test; 0 for none.
        seed: Random seed of the draw, combined with the task's name.
        group_column: As in `draw_candidates`.
        labelled: Whether each example has a label.
        scored: Whether the task needs test examples: with labels, if any example can be held out,
            one is for test.
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
        if scored and num_test and not last:
            last = [between.pop()] if between else _spare(task, train)

    def examples(of_units: list[Sequence[int]]) -> Sequence[Example]:
        return select(task.train, sorted(i for unit in of_units for i in unit))

    return replace(
        task,
        train=examples(train),
        validation=examples(between) if num_validation else task.validation,
        test=examples(last) if num_test else task.test,
    )


def _keep_labels(
    task: Task, train: list[Sequence[int]], held_out: list[list[Sequence[int]]]
) -> None:
    """Move units to train, in place, until it has every held-out label."""
    train_labels = {label_of(task.train[i]) for unit in train for i in unit}
    for part in held_out:
        for unit in list(part):
            new = {label_of(task.train[i]) for i in unit} - train_labels
            if new:
                part.remove(unit)
                train.append(unit)
                train_labels |= new


def _spare(task: Task, train: list[Sequence[int]]) -> list[Sequence[int]]:
    """A unit whose labels other units have too, moved out of train, in place; none if none has."""
    counts = Counter(label_of(task.train[i]) for unit in train for i in unit)
    for unit in reversed(train):
        in_unit = Counter(label_of(task.train[i]) for i in unit)
        if all(counts[label] > number for label, number in in_unit.items()):
            train.remove(unit)
            return [unit]
    return []


def cut_train(task: Task, max_rows: int | None, seed: int = 0, *, labelled: bool = False) -> Task:
    """The task with at most `max_rows` train examples, drawn with the seed, order preserved.

    Where examples have labels, one of each is kept.

    Raises:
        UserError: There are more labels than `max_rows`.
    """
    if max_rows is None or len(task.train) <= max_rows:
        return task
    rng = random.Random(seed_for(seed, task.name, "rows"))
    places = rng.sample(range(len(task.train)), max_rows)
    if labelled:
        places = _with_all_labels([label_of(example) for example in task.train], places)
        if len(places) > max_rows:
            raise UserError(
                f'task "{task.name}" has {len(places)} labels, of which max_rows={max_rows} leaves '
                f"some without a training row: set max_rows to {len(places)} or more"
            )
    return replace(task, train=select(task.train, sorted(places)))


def _with_all_labels(labels: Sequence[str], places: Sequence[int]) -> list[int]:
    """The places, of which some give way to the first example of each label that they lack."""
    counts = Counter(labels[place] for place in places)
    lacking = [place for label, place in reversed(_first(labels)) if not counts[label]]
    chosen = list(places)
    for place in reversed(places):
        if len(chosen) + len(lacking) > len(places) and counts[labels[place]] > 1:
            counts[labels[place]] -= 1
            chosen.remove(place)
    return chosen + lacking


def _first(labels: Sequence[str]) -> list[tuple[str, int]]:
    """Each distinct label, and the first place that has it."""
    return list({label: place for place, label in reversed(list(enumerate(labels)))}.items())


def _units(task: Task, group_column: str | None, seed: int) -> list[Sequence[int]]:
    """Units that move as one: groups and ungrouped examples in order; shuffled without groups."""
    groups: dict[str | int, list[int]] = {}
    grouped = False
    for i, example in enumerate(task.train):
        group = group_of(example, group_column)
        grouped = grouped or group is not None
        groups.setdefault(i if group is None else repr(group), []).append(i)
    units: list[Sequence[int]] = list(groups.values())
    if not grouped:
        random.Random(seed_for(seed, task.name, "carve")).shuffle(units)
    return units


def _share(count: int, share: float, most: int) -> int:
    """`share` of `count`, at least 1 unless the share is zero, and at most `most`."""
    return max(0, min(most, max(1, round(share * count)))) if share > 0 else 0


def draw_tasks(
    tasks: Sequence[Task], max_tasks: int | None, seed: int = 0, keep: Sequence[str] = ()
) -> list[Task]:
    """At most `max_tasks` of the tasks, drawn with the seed, order preserved.

    Args:
        tasks: The tasks to draw from.
        max_tasks: Maximum number of tasks; None for all.
        seed: Random seed of the draw.
        keep: Names of tasks that are always kept.

    Raises:
        UserError: `keep` has more than `max_tasks` names.
    """
    if max_tasks is None or len(tasks) <= max_tasks:
        return list(tasks)
    always = set(keep)
    if len(always) > max_tasks:
        raise UserError(f"max_tasks={max_tasks} is less than the {len(always)} unseen tasks")
    others = sorted(task.name for task in tasks if task.name not in always)
    drawn = random.Random(seed_for(seed, "tasks")).sample(others, max_tasks - len(always))
    chosen = {*always, *drawn}
    return [task for task in tasks if task.name in chosen]
