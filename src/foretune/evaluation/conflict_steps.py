"""The steps in which labels of held-out tasks are predicted, fitted to other tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from foretune.evaluation.conflict_rows import Indices, LabelledInputs
from foretune.linalg.task_factors import TaskFactors, fit_factors
from foretune.linalg.task_levels import TaskLevels, fit_levels
from foretune.linalg.task_moments import Array, FeatureMoments, Moments
from foretune.linalg.task_ridge import TaskRidge, fit_ridge

RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Given:
    """The rows that held-out tasks are given.

    Args:
        rows: The rows of all tasks.
        learnt: (m,) which of them are given.
        moments: Of these, for the H units of held-out tasks.
        places: (U,) place of a unit among the H.
    """

    rows: LabelledInputs
    learnt: Indices
    moments: Moments
    places: Indices


Step = Callable[[Given, Indices], Array]  # and the rows to predict → their (n, C) targets


def fit_steps(rows: LabelledInputs, moments: Moments, seen: Indices) -> dict[str, Step]:
    """The steps and the controls by name, the low-rank step at each rank as "rank 1", ….

    Args:
        rows: The rows of all tasks.
        moments: Of the tasks to fit to.
        seen: (m,) the rows of these tasks.
    """
    is_choice = rows.candidates == "responses"
    pooled = start = fit_factors(moments, 0, offset=False)
    blank = dataclasses.replace(pooled, mean=_blank(rows, moments))
    steps: dict[str, Any] = {"blank": FactorStep(blank), "pooled": FactorStep(pooled)}
    if not is_choice:
        start = fit_factors(moments, 0)
        steps["offset"] = FactorStep(start)
    if rows.has_classes:
        steps["offset"] = LevelStep.fitted(pooled, rows, seen)
    if isinstance(moments, FeatureMoments):
        steps["alone"] = RidgeStep(fit_ridge(moments, blank.mean))
        steps["own"] = RidgeStep(fit_ridge(moments, pooled.mean))
    for rank in RANKS:
        start = fit_factors(moments, rank, start=start, offset=not is_choice)
        steps[f"rank {rank}"] = FactorStep(start)
    return steps


def mean_targets(moments: Moments) -> Array:
    """(C,) mean target of tasks; 0 for choices, whose targets have mean 0."""
    ones, outputs = np.ones((len(moments.rows), 1)), range(moments.num_outputs)
    sums = [moments.products(ones, output)[0] @ moments.constant for output in outputs]
    return np.array(sums) / moments.rows.sum()


def _blank(rows: LabelledInputs, moments: Moments) -> Array:
    """(C, D) coefficients of the most frequent label; for choices, of the model's cosine."""
    if rows.candidates != "responses":
        return np.outer(mean_targets(moments), moments.constant)
    assert isinstance(moments, FeatureMoments)
    mean = np.zeros((1, len(moments.constant)))
    mean[0, 0] = moments.sums[:, 0, 0].sum() / moments.gram[:, 0, 0].sum()
    return mean


@dataclass(frozen=True)
class FactorStep:
    """Pooled coefficients, an offset and a low-rank difference, as far as the model has them."""

    factors: TaskFactors

    def __call__(self, shot_rows: Given, part: Indices) -> Array:
        """Predicts the examples of a part: (n, outputs)."""
        rows = shot_rows.rows
        means = rows.project(self.factors.mean.T, part)
        if not self.factors.rank and not self.factors.offset:
            return means
        z = self.factors.posterior(shot_rows.moments)[0][shot_rows.places[rows.units[part]]]
        shifts = [
            (rows.project(self.factors.loadings(output), part) * z).sum(1)
            for output in range(means.shape[1])
        ]
        return means + np.stack(shifts, 1)


@dataclass(frozen=True)
class RidgeStep:
    """A mean, moved in any direction by a task's own rows."""

    ridge: TaskRidge

    def __call__(self, shot_rows: Given, part: Indices) -> Array:
        """Predicts the examples of a part: (n, outputs)."""
        assert isinstance(shot_rows.moments, FeatureMoments) and shot_rows.rows.features is not None
        phi, unit = shot_rows.rows.features[part], shot_rows.places[shot_rows.rows.units[part]]
        shifts = self.ridge.posterior(shot_rows.moments)[0]
        means = phi @ self.ridge.mean.T
        outputs = range(means.shape[1])
        return means + np.stack([(phi * shifts[unit, :, c]).sum(1) for c in outputs], 1)


@dataclass(frozen=True)
class LevelStep:
    """Pooled coefficients, with the task's levels of the labels on a logistic scale."""

    pooled: TaskFactors
    levels: TaskLevels

    @classmethod
    def fitted(cls, pooled: TaskFactors, rows: LabelledInputs, seen: Indices) -> LevelStep:
        """The step for these pooled coefficients.

        Args:
            pooled: The coefficients.
            rows: The rows of all tasks.
            seen: (m,) those to fit to.
        """
        tasks, common = rows.units[seen], _probabilities(pooled, rows, seen)
        levels = fit_levels(common, rows.places_of_labels(seen), *_compact(tasks))
        return cls(pooled, levels)

    def __call__(self, shot_rows: Given, part: Indices) -> Array:
        """Predicts the examples of a part: (n, outputs)."""
        rows, learnt = shot_rows.rows, shot_rows.learnt
        before, common = (_probabilities(self.pooled, rows, which) for which in (learnt, part))
        labels, units = rows.places_of_labels(learnt), shot_rows.places[rows.units[learnt]]
        start = np.zeros((len(shot_rows.moments.rows), before.shape[1]))
        shifts = self.levels.shifts(before, labels, units, start)
        p = self.levels.probabilities(common, shifts[shot_rows.places[rows.units[part]]])
        return 2 * p[:, 1:] - 1 if p.shape[1] == 2 else p


def _compact(tasks: Indices) -> tuple[Indices, int]:
    """The tasks numbered without gaps, and their number."""
    numbers, places = np.unique(tasks, return_inverse=True)
    return places, len(numbers)


def _probabilities(pooled: TaskFactors, rows: LabelledInputs, part: Indices) -> Array:
    """(n, C) pooled targets of rows as probabilities of the labels, two for one of −1 or 1."""
    targets = rows.project(pooled.mean.T, part)
    if targets.shape[1] == 1:
        targets = np.concatenate([1 - targets, 1 + targets], 1) / 2
    targets = np.maximum(targets, 0)
    p: Array = targets / np.maximum(targets.sum(1, keepdims=True), 1e-12)
    return p
