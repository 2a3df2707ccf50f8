"""How long a step takes, from a few: of full size if they are quick, else on a few of its tasks."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foretune.models.reading import Reading, metered_reading
from foretune.tasks.drawn_rows import undrawn
from foretune.tasks.leakage import content
from foretune.tasks.rows import CLASSES
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
        seconds: Time of an update of full size, on rows that frozen layers have read before.
        row_seconds: Time that frozen layers take to read a row for the first time; 0 without them.
    """

    outcome: Any
    watch: Stopwatch
    num_tasks: int
    seconds: float
    row_seconds: float


def time_steps(train: Train, tasks: TaskCollection, tasks_per_step: int, batch_size: int) -> Timing:
    """Times a few updates.

    Updates on few tasks say how long one of full size takes: in proportion to its tasks, once they
    take long enough for what does not grow with them to be a small part. What frozen layers take to
    read a row is not part of an update, as they read it once in a run.

    Args:
        train: Makes updates on some tasks of a collection (its number of tasks per update, then of
            updates) and calls the watch after each; the same rows each time.
        tasks: The tasks.
        tasks_per_step: Tasks in an update of full size.
        batch_size: Rows per task in an update.
    """
    trimmed = _trimmed(tasks, batch_size * (1 + MOST_TIMED_STEPS))
    num_tasks = 1
    with metered_reading() as reading:

        def timed(steps: int) -> tuple[Any, Stopwatch]:
            watch = Stopwatch(1 + steps, reading)
            return train(trimmed, num_tasks, watch.planned, watch), watch

        outcome, watch = None, Stopwatch(0)
        while outcome is None or (
            num_tasks < tasks_per_step and watch.seconds_per_update() < QUICK_S
        ):
            num_tasks = min(num_tasks * GROWTH, tasks_per_step)
            outcome, watch = timed(TIMED_STEPS)
        factor = tasks_per_step / num_tasks
        seconds = watch.seconds_per_update()
        if seconds < QUICK_S:
            read = reading.seconds / (1 + TIMED_STEPS)
            again = min(MOST_TIMED_STEPS, round(1 / max(seconds + read, 1e-3)))
            if again > TIMED_STEPS:
                outcome, watch = timed(again)
    return Timing(
        outcome=outcome,
        watch=watch,
        num_tasks=num_tasks,
        seconds=watch.seconds_per_update() * factor,
        row_seconds=reading.seconds_per_text()
        * watch.texts_per_update()
        / (num_tasks * batch_size),
    )


class Stopwatch:
    """A progress callback that times updates; the first one is left out as a warm-up.

    Args:
        planned: Updates that are asked for; a method may make another number of them.
        reading: What frozen layers read meanwhile, whose time does not count.
    """

    def __init__(self, planned: int, reading: Reading | None = None) -> None:
        self.planned = planned
        self.reading = reading or Reading()
        self.ticks: list[float] = []
        self.texts: list[int] = []
        self.updates = 0

    def __call__(self, update: int, updates: int, figures: dict[str, Any]) -> None:
        """Records the end of an update and the total number of updates."""
        self.ticks.append(time.perf_counter() - self.reading.seconds)
        self.texts.append(self.reading.asked)
        self.updates = updates

    def seconds_per_update(self) -> float:
        """Median time of an update in seconds."""
        return _median_step(self.ticks)

    def texts_per_update(self) -> float:
        """Median number of texts that frozen layers are asked for in an update."""
        return _median_step(self.texts)


def _median_step(values: Sequence[float]) -> float:
    steps = [end - start for start, end in itertools.pairwise(values)]
    return statistics.median(steps) if steps else 0.0


def evenly(tasks: TaskCollection, number: int) -> tuple[Task, ...]:
    """So many of the tasks, evenly spread over them."""
    listed = tuple(tasks)
    return tuple(listed[i * len(listed) // number] for i in range(number))


def rows_read(kind: str, tasks: TaskCollection, splits: Sequence[str]) -> set[int]:
    """Digests of what frozen layers read of the rows: once where only labels differ."""
    has_labels = kind in CLASSES
    return {
        content(row)[0 if has_labels else 1]
        for task in tasks
        for split in splits
        for row in undrawn(task.split(split))
    }


def _trimmed(tasks: TaskCollection, rows: int) -> TaskCollection:
    """The tasks with no more training rows than the timed steps read, so that only these are timed.

    A training row serves as the test row, because a real one may have a label that is cut off.
    """
    small = tuple(Task(t.name, train=t.train[:rows], test=t.train[:1]) for t in tasks)
    return dataclasses.replace(tasks, tasks=small)
