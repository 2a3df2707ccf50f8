"""What a base reaches on seen tasks that its retraining did not meet: what rates are chosen by.

How well a base does on the tasks that it was retrained on does not say how well it adapts; a rate
that is too high serves the first and spoils the second. So all that is chosen is chosen here.
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
from foretune.tasks.task import TaskCollection
from foretune.training import verbs
from foretune.training.loop import DivergedError, Progress

ADAPTATIONS = 6  # behind a score, at least, at each number of shots: one draw has too much luck


def usable(tasks: TaskCollection) -> TaskCollection:
    """The tasks that can be adapted to and scored on other rows.

    Raises:
        UserError: There are none.
    """
    names = [task.name for task in tasks if task.validation and task.train]
    if not names:
        raise UserError(
            "learning_rates are searched on validation rows of seen tasks that are held out, and "
            "those have none: set tasks.validation, or give one learning_rate"
        )
    return tasks.subset(names)


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
