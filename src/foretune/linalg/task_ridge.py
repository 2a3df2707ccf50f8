"""Coefficients that each task has by itself, around a common mean: ridge regression per task.

    y = φᵀ(m + w) + ε,    w ~ N(0, s) but N(0, s₀) for the constant, ε ~ N(0, σ²)

with m as it is given, and s, s₀, σ² that fit all tasks best (EM; MacKay, "Bayesian Interpolation",
Neural Computation 1992). Tasks share nothing but m and how far they are from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from foretune.linalg.task_factors import LEAST_NOISE, LEAST_VARIANCE
from foretune.linalg.task_moments import Array, FeatureMoments

UPDATES = 20


@dataclass(frozen=True)
class TaskRidge:
    """How far the coefficients of tasks are from a mean.

    Args:
        mean: (C, D) m.
        variances: (D,) s, and s₀ in place of the constant.
        noise: σ².
    """

    mean: Array
    variances: Array
    noise: float

    def posterior(self, moments: FeatureMoments) -> tuple[Array, Array]:
        """Mean (T, D, C) and covariance (T, D, D) of w after each task's rows."""
        residuals = moments.sums - moments.gram @ self.mean.T
        precision = moments.gram / self.noise + np.diag(1 / self.variances)
        covariance = np.linalg.inv(precision).astype(np.float64, copy=False)
        return covariance @ residuals / self.noise, covariance


def fit_ridge(moments: FeatureMoments, mean: Array, updates: int = UPDATES) -> TaskRidge:
    """The variances and the noise that fit tasks best.

    Args:
        moments: Of the tasks.
        mean: (C, D) m.
        updates: Number of EM updates.
    """
    num_values = moments.rows.sum() * moments.num_outputs
    fitted = np.einsum("tdc,cd->", moments.sums, mean)
    squares = moments.squares.sum() - 2 * fitted + np.vdot(mean.T, (moments.gram.sum(0) @ mean.T))
    residuals = moments.sums - moments.gram @ mean.T
    constant = moments.constant > 0
    ridge = TaskRidge(mean, np.full(len(constant), 0.1), squares / num_values)
    for _ in range(updates):
        means, covariances = ridge.posterior(moments)
        entries = (means**2).mean((0, 2)) + np.diagonal(covariances, axis1=1, axis2=2).mean(0)
        variances = np.full(len(constant), entries[~constant].mean())
        variances[constant] = entries[constant]
        noise = squares - 2 * np.vdot(means, residuals) + np.vdot(means, moments.gram @ means)
        noise += moments.num_outputs * np.vdot(covariances, moments.gram)
        ridge = replace(
            ridge,
            variances=np.maximum(variances, LEAST_VARIANCE),
            noise=max(float(noise / num_values), LEAST_NOISE),
        )
    return ridge
