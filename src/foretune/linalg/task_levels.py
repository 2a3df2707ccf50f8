"""Labels of many tasks as common probabilities that each task shifts by levels of its own.

    p(label c | row) ∝ exp(a log q_c + b_c),    b ~ N(0, τ²)

with the common probabilities q of the row's labels, a and τ of all tasks, and b of one task. On a
linear scale an offset would move likely and unlikely labels alike; what is left over would look
like a difference between tasks in more than their levels.

b is the mode, by bounded Newton steps (Böhning and Lindsay, "Monotonicity of
Quadratic-Approximation Algorithms", Annals of the Institute of Statistical Mathematics 1988); a and
τ fit all tasks best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foretune.linalg.task_moments import Array

LEAST_PROBABILITY = 0.02
STEPS, UPDATES = 20, 8
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class TaskLevels:
    """What all tasks have in common.

    Args:
        slope: a.
        variance: τ².
    """

    slope: float = 1.0
    variance: float = 1.0

    def shifts(
        self,
        common: Array,
        labels: Indices,
        tasks: Indices,
        start: Array,
        *,
        steps: int = STEPS,
    ) -> Array:
        """(T, C) b of each task.

        Args:
            common: (n, C) q of each row.
            labels: (n,) label of each row.
            tasks: (n,) task of each row.
            start: (T, C) where to begin.
            steps: Number of Newton steps.
        """
        right, shifts, num_tasks = np.eye(common.shape[1])[labels], start, len(start)
        curvature = np.bincount(tasks, minlength=num_tasks)[:, None] / 2 + 1 / self.variance
        for _ in range(steps):
            errors = right - self.probabilities(common, shifts[tasks])
            shifts = shifts + (_sums(errors, tasks, num_tasks) - shifts / self.variance) / curvature
        return shifts

    def probabilities(self, common: Array, shifts: Array) -> Array:
        """(n, C) p of each row, from q and b of each row."""
        scores = self.slope * np.log(np.maximum(common, LEAST_PROBABILITY)) + shifts
        odds = np.exp(scores)
        p: Array = odds / (odds @ np.ones((odds.shape[1], 1)))
        return p


def fit_levels(common: Array, labels: Indices, tasks: Indices, num_tasks: int) -> TaskLevels:
    """The a and τ that fit tasks best.

    Args:
        common: (n, C) q of each row.
        labels: (n,) label of each row.
        tasks: (n,) task of each row.
        num_tasks: T.
    """
    levels, num_labels = TaskLevels(), common.shape[1]
    logs = np.log(np.maximum(common, LEAST_PROBABILITY))
    shifts = np.zeros((num_tasks, num_labels))
    for _ in range(UPDATES):
        shifts = levels.shifts(common, labels, tasks, shifts, steps=STEPS // UPDATES)
        p = levels.probabilities(common, shifts[tasks])
        means = (p * logs).sum(1)
        gradient = (logs[np.arange(len(labels)), labels] - means).sum()
        curvature = ((p * logs**2).sum(1) - means**2).sum()
        information = _sums((p * (1 - p)).sum(1, keepdims=True), tasks, num_tasks) / (
            num_labels - 1
        )
        spread = 1 / (information[:, 0] + 1 / levels.variance)
        levels = replace(
            levels,
            slope=max(levels.slope + gradient / max(curvature, 1e-9), 0.0),
            variance=max(float(((shifts**2).sum(1) / (num_labels - 1) + spread).mean()), 1e-6),
        )
    return levels


def _sums(values: Array, tasks: Indices, num_tasks: int) -> Array:
    """(T, C) sums of (n, C) values over the rows of each task."""
    columns = [np.bincount(tasks, column, minlength=num_tasks) for column in values.T]
    return np.stack(columns, 1)
