"""What a base reaches on seen tasks that its retraining did not meet: what rates are chosen by.

How well a base does on the tasks that it was retrained on does not say how well it adapts; a rate
that is too high serves the first and spoils the second. So all that is chosen is chosen here, and
on many rows: with 20 of each of 8 tasks luck makes up for a rate that is two points worse.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from torch import nn

from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.row_store import join
from foretune.tasks.splits import carve
from foretune.tasks.task import Task, TaskCollection
from foretune.training import verbs
from foretune.training.loop import DivergedError, Progress
from foretune.training.shots import draw_shots

ADAPTATIONS = 6  # behind a score, at least, at each number of shots: one draw has too much luck


def exam(
    tasks: TaskCollection,
    shots: Sequence[int | None],
    seed: int,
    group_column: str | None = None,
) -> TaskCollection:
    """The tasks with many rows to be scored on.

    No base that is tried has met them, so half of their training rows may stand beside the
    validation rows; not so where the other half would be too few to adapt to (of a label even).

    Args:
        tasks: Seen tasks, held out from every retraining that is tried on them.
        shots: Numbers of rows with which they will be adapted to; None for all.
        seed: Seeds the halves.
        group_column: The column that says which rows belong together.

    Raises:
        UserError: None of them has rows to be scored on.
    """
    found = []
    for task in tasks:
        whole = Task(task.name, task.train, task.validation)
        half = carve(
            Task(task.name, task.train),
            validation=0,
            test=0.5,
            seed=seed,
            group_column=group_column,
        )
        halved = Task(task.name, half.train, join([half.test, task.validation]))
        enough = all(_drawn(tasks, halved, k) == _drawn(tasks, whole, k) for k in shots)
        found.append(halved if enough else whole)
    return usable(dataclasses.replace(tasks, tasks=tuple(found)))


def usable(tasks: TaskCollection) -> TaskCollection:
    """The tasks that can be adapted to and scored on other rows.

    Raises:
        UserError: There are none.
    """
    names = [task.name for task in tasks if task.validation and task.train]
    if not names:
        raise UserError(
            "seen tasks that are held out are adapted to and scored on other rows, of which they "
            "have none: set tasks.validation"
        )
    return tasks.subset(names)


def _drawn(tasks: TaskCollection, task: Task, shots: int | None) -> int:
    """How many training rows a draw of so many shots holds: of each label, where there are any."""
    alone = dataclasses.replace(tasks, tasks=(task,))
    kind = verbs.objective_of(tasks).kind
    return sum(len(slot.train) for slot in draw_shots(alone, kind, shots, 1, 0))


def num_draws(num_tasks: int) -> int:
    """Draws of its shots with which each of so many tasks is adapted to."""
    return math.ceil(ADAPTATIONS / num_tasks)


def try_rates(
    base: nn.Module,
    tasks: TaskCollection,
    method: Any,
    rates: Sequence[float],
    run: Run,
    shots: Sequence[int | None],
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Adapts a base to held-out tasks at each learning rate.

    Args:
        base: What retraining made; it is not changed.
        tasks: Tasks that it was not retrained on; `usable` ones.
        method: The adapting method.
        rates: Its learning rates; empty for its own.
        run: Seed and budget of each adaptation, which has no patience here: it would stop on the
            very rows that the trial is scored on.
        shots: Numbers of rows with which it is done; None for all.
        progress: Called during each adaptation.

    Returns:
        `learning_rate` (None: the method's own), `by_task` (its scores on validation rows, a
        number of shots after the other) and `score`, the mean over numbers of shots of their
        means, for each rate; of one that diverged `score` is None, and `reason` says why.
    """
    found: list[dict[str, Any]] = []
    run = run.replace(patience=None)
    wanted: list[float | None] = [*rates] or [None]
    for rate in wanted:
        record = method if rate is None else dataclasses.replace(method, learning_rate=rate)
        by_task: dict[str, list[float]] = {name: [] for name in tasks.names}
        means = []
        try:
            for k in shots:
                draws = 1 if k is None else num_draws(len(tasks))
                done = verbs.adapt(
                    base,
                    tasks,
                    record,
                    run,
                    shots=k,
                    draws=draws,
                    split="validation",
                    progress=progress,
                )
                for (task, _), score in done.scores.items():
                    by_task[task].append(score)
                means.append(statistics.fmean(done.scores.values()))
        except DivergedError as error:
            found.append({"learning_rate": rate, "score": None, "reason": str(error)})
            continue
        mean = statistics.fmean(means)
        found.append({"learning_rate": rate, "score": mean, "by_task": by_task})
    return found


def best(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The trial with the highest score; of equals the first.

    Raises:
        DivergedError: All of them diverged.
    """
    whole = [trial for trial in trials if trial["score"] is not None]
    if not whole:
        raise DivergedError(f"adapting diverged at every learning rate: {trials[-1]['reason']}")
    return max(whole, key=lambda trial: trial["score"])
