"""Held-out scenes of each task, and the choice between its forecaster and constant velocity."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from foretune.forecasting.objective import Forecast
from foretune.tasks.task import Task, TaskCollection

ENOUGH = 20  # held-out scenes of a task
SHARE = 5  # of a task's scenes, at most one in so many is moved from training to validation
FORECASTER, CONSTANT_VELOCITY = "forecaster", "constant velocity"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was measured on the held-out scenes of a task.

    Args:
        scenes: Number of held-out scenes.
        minFDE: Mean final displacement in m of the best of the forecaster's modes that count.
        constant_velocity: Mean final displacement in m of constant velocity's single mode.
        chosen: "forecaster" or "constant velocity".
    """

    scenes: int
    minFDE: float | None  # noqa: N815 (the metric's name)
    constant_velocity: float | None
    chosen: str


def with_held_out(tasks: TaskCollection) -> TaskCollection:
    """The tasks, each with validation scenes as far as it has scenes to spare.

    A task with fewer than 20 validation scenes gives up its last training scenes for validation
    until it has 20, or a fifth of all that it has for training and validation.
    """
    return dataclasses.replace(tasks, tasks=tuple(map(_with_held_out, tasks)))


def _with_held_out(task: Task) -> Task:
    total = len(task.train) + len(task.validation)
    moved = min(ENOUGH, total // SHARE) - len(task.validation)
    if moved <= 0:
        return task
    train = list(task.train)
    validation = [*train[-moved:], *task.validation]
    return Task(task.name, train[:-moved], validation, task.test)


def choose(
    model: nn.Module | None, scenes: Sequence[Mapping[str, Any]], objective: Forecast
) -> Choice:
    """Choose between a forecaster and constant velocity by scenes that neither was trained on.

    The forecaster is chosen where its final displacement is smaller by more than one standard error
    of the differences: a tie, or a handful of scenes, speaks for what costs nothing.

    Args:
        model: The forecaster.
        scenes: Held-out scenes in the plain format.
        objective: Says how many of the modes count.
    """
    from foretune.forecasting.displacement import min_fde
    from foretune.forecasting.measures import forecast_rows

    if len(scenes) < 2:
        return Choice(len(scenes), None, None, CONSTANT_VELOCITY)
    ours = min_fde(*forecast_rows(model, scenes, objective), k=objective.best_of)
    baseline = min_fde(*forecast_rows(None, scenes, objective))
    gain = baseline - ours
    ahead = float(gain.mean()) > float(gain.std()) / len(gain) ** 0.5
    return Choice(
        scenes=len(scenes),
        minFDE=float(ours.mean()),
        constant_velocity=float(baseline.mean()),
        chosen=FORECASTER if ahead else CONSTANT_VELOCITY,
    )
