"""How long a step takes, from a few: of full size if they are quick, else on a few of its tasks."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from foretune.recipes.setup import Setup
from foretune.tasks.task import Task, TaskCollection

TIMED_STEPS = 2
# Steps get so many times as many tasks until they take QUICK_S seconds or are of full size.
GROWTH, QUICK_S = 4, 0.2
# Those that are quicker still are timed again, as many as fit into about a second: what a process
# does once may take longer than they do.
MOST_TIMED_STEPS = 16

Train = Callable[[TaskCollection, int, int, "Stopwatch"], Any]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was timed, and what it says about a step of full size.

    Args:
        outcome: The result of the steps.
        watch: The watch that timed them.
        num_tasks: Tasks in each of them.
        seconds: Time of an update of full size, on rows that a frozen part has read before.
        new_rows_seconds: What it takes longer on rows that are new to a frozen part.
    """

    outcome: Any
    watch: Stopwatch
    num_tasks: int
    seconds: float
    new_rows_seconds: float


def time_steps(
    train: Train, setup: Setup, tasks: TaskCollection, tasks_per_step: int, batch_size: int
) -> Timing:
    """Times a few updates.

    Updates on few tasks say how long one of full size takes: in proportion to its tasks, once they
    take long enough for what does not grow with them to be a small part.

    Args:
        train: Makes updates on some tasks of a collection (its number of tasks per update, then of
            updates) and calls the watch after each; the same rows each time.
        setup: The model.
        tasks: The tasks.
        tasks_per_step: Tasks in an update of full size.
        batch_size: Rows per task in an update.
    """
    keeps_states = _keeps_states(setup)
    trimmed = _trimmed(
        tasks, batch_size * (1 + (TIMED_STEPS if keeps_states else MOST_TIMED_STEPS))
    )
    num_tasks = 1

    def timed(steps: int) -> tuple[Any, Stopwatch]:
        watch = Stopwatch(1 + steps)
        return train(trimmed, num_tasks, watch.planned, watch), watch

    outcome, watch, frozen = None, Stopwatch(0), 0.0
    while outcome is None or (num_tasks < tasks_per_step and watch.seconds_per_update() < QUICK_S):
        num_tasks = min(num_tasks * GROWTH, tasks_per_step)
        if keeps_states:
            # What lower blocks make of a row is kept, so that an update on rows that were read
            # before is what a run consists of.
            frozen = timed(TIMED_STEPS)[1].seconds_per_update()
        outcome, watch = timed(TIMED_STEPS)
        frozen -= watch.seconds_per_update()
    factor = tasks_per_step / num_tasks
    seconds = watch.seconds_per_update()
    if seconds < QUICK_S:
        again = max(TIMED_STEPS, min(MOST_TIMED_STEPS, round(1 / max(seconds, 1e-3))))
        if keeps_states:
            timed(again)
        outcome, watch = timed(again)
    return Timing(
        outcome=outcome,
        watch=watch,
        num_tasks=num_tasks,
        seconds=watch.seconds_per_update() * factor,
        new_rows_seconds=max(0.0, frozen) * factor,
    )


class Stopwatch:
    """A progress callback that times updates; the first one is left out as a warm-up.

    Args:
        planned: Updates that are asked for; a method may make another number of them.
    """

    def __init__(self, planned: int) -> None:
        self.planned = planned
        self.ticks: list[float] = []
        self.updates = 0

    def __call__(self, update: int, updates: int, figures: dict[str, Any]) -> None:
        """Records the end of an update and the total number of updates."""
        self.ticks.append(time.perf_counter())
        self.updates = updates

    def seconds_per_update(self) -> float:
        """Median time of an update in seconds."""
        intervals = [end - start for start, end in itertools.pairwise(self.ticks)]
        return statistics.median(intervals) if intervals else 0.0


def evenly(tasks: TaskCollection, number: int) -> tuple[Task, ...]:
    """So many of the tasks, evenly spread over them."""
    listed = tuple(tasks)
    return tuple(listed[i * len(listed) // number] for i in range(number))


def _keeps_states(setup: Setup) -> bool:
    """Whether lower blocks, or an encoder, are frozen, so that a row goes through them once."""
    model = setup.recipe.model
    return model.trainable_layers is not None or (model.tower is not None and bool(model.name))


def _trimmed(tasks: TaskCollection, rows: int) -> TaskCollection:
    """The tasks with no more training rows than the timed steps read, so that only these are timed.

    A training row serves as the test row, because a real one may have a label that is cut off.
    """
    small = tuple(Task(t.name, train=t.train[:rows], test=t.train[:1]) for t in tasks)
    return dataclasses.replace(tasks, tasks=small)
