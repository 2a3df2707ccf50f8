"""What is worth knowing of a recipe before hours are spent on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foretune.evaluation.verdict import tasks_needed
from foretune.evaluation.wording import counted, listed
from foretune.recipes.setup import Setup


def plan_notes(setup: Setup, labels: Mapping[str, Sequence[Any]]) -> list[str]:
    """Sentences on tasks that are too few, that tell nothing, or that choose; none if all is well.

    Args:
        setup: The inputs of the run's first repeat.
        labels: Task → its labels, of seen and unseen tasks; empty where examples have none.
    """
    notes = [_unseen(setup), _seen(setup), _one_label(labels), _held_out(setup)]
    return [note for note in notes if note is not None]


def _unseen(setup: Setup) -> str | None:
    num_bases = len(setup.recipe.entries)
    pairs = num_bases * (num_bases - 1) // 2
    if setup.unseen is None or not pairs or setup.recipe.tasks.rotate:
        return None
    number, least = len(setup.unseen), tasks_needed(pairs)
    if number >= least:
        return None
    return (
        f"{counted(number, 'unseen task')}: too few for a verdict, whatever the scores. With "
        f"{num_bases} methods compared, {least} are the least, 20 a good number: set tasks.unseen."
    )


def _seen(setup: Setup) -> str | None:
    number = len(setup.seen)
    if number == 1:
        return (
            "1 seen task: there is nothing to learn across tasks. Lower tasks.unseen, or bring "
            "more tasks."
        )
    if setup.unseen is not None and number < len(setup.unseen):
        return (
            f"{counted(number, 'task')} to retrain on, {len(setup.unseen)} unseen ones: lower "
            "tasks.unseen, or set tasks.rotate: true, with which every task is unseen once."
        )
    return None


def _one_label(labels: Mapping[str, Sequence[Any]]) -> str | None:
    tasks = [task for task, of_task in labels.items() if len(of_task) == 1]
    if not tasks:
        return None
    which = f"{listed(tasks)}: one label only"
    if len(tasks) == len(labels):
        which = "All tasks have one label each"
    return (
        f"{which}, so every prediction is right and the scores say nothing. Leave them "
        "out, or add rows with other labels."
    )


def _held_out(setup: Setup) -> str | None:
    names = [name for name in setup.all_seen.names if name not in setup.seen.names]
    if not names:
        return None
    return (
        f"Rates and how to adapt are chosen by {listed(names)}, which no base is retrained on; "
        "other repeats hold out others."
    )
