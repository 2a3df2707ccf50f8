"""The mean of a table tasks × repeats, both random: what its variance is made of, interval, test.

A score of task t in repeat s is μ + task + luck + noise, where *luck* is what a repeat does to all
tasks at once: the seed of its retraining, and what its searches chose. With T tasks, S repeats and
the mean squares MS of the two-way layout, the mean has two sources of error:

    tasks and noise   A = MS_tasks / (T·S)                        T − 1 degrees of freedom
    luck              L = max(MS_repeats − MS_rest, 0) / (T·S)    S − 1

Each source gets the half-width of its own t distribution, and the squares add up:

    h² = A·t²(T − 1) + L·t²(S − 1)

(Howe, "Approximate Confidence Limits on the Mean of X + Y", JASA 69, 1974). Satterthwaite's
approximation, one t for A + L, is too narrow here: two or three repeats often show little luck by
luck, and then give it little weight and many degrees of freedom. Each pair of bases has its own
luck, however few the repeats: one method's retrainings may differ by ten times as much as
another's, and with luck pooled over pairs intervals are then too wide for one and too narrow for
the other. With one repeat L is unknown and 0: the interval then is about these retrained bases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtrit

Array = NDArray[np.float64]

SMALLEST_P = 1e-100  # A smaller p-value is 0.


@dataclasses.dataclass(frozen=True)
class Error:
    """A source of error of a mean.

    Args:
        variance: What it adds to the variance of the mean.
        df: Degrees of freedom of that estimate.
    """

    variance: float
    df: float


@dataclasses.dataclass(frozen=True)
class Layout:
    """The two-way layout of a table.

    Args:
        mean: Mean of the table.
        tasks: Error of the mean by tasks and noise.
        luck: Estimated variance of a repeat's luck; below 0 where chance has it so.
        num_repeats: Number of repeats.
    """

    mean: float
    tasks: Error
    luck: float
    num_repeats: int

    @classmethod
    def of(cls, values: Array) -> Layout:
        """The layout of `values` (num_tasks, num_repeats)."""
        num_tasks, num_repeats = values.shape
        mean, by_task, by_repeat = values.mean(), values.mean(axis=1), values.mean(axis=0)
        rest = values - by_task[:, None] - by_repeat[None, :] + mean
        df_tasks, df_repeats = max(num_tasks - 1, 1), max(num_repeats - 1, 1)
        luck = ((by_repeat - mean) ** 2).sum() / df_repeats
        noise = (rest**2).sum() / (df_tasks * df_repeats)
        tasks = ((by_task - mean) ** 2).sum() / df_tasks / num_tasks
        return cls(
            float(mean),
            Error(float(tasks), df_tasks),
            float(luck - noise / num_tasks),
            num_repeats,
        )

    def errors(self) -> list[Error]:
        """The sources of error of the mean: tasks with noise, and luck."""
        variance = max(self.luck, 0.0) / self.num_repeats
        return [self.tasks, Error(variance, max(self.num_repeats - 1, 1))]


def half_width(errors: Sequence[Error], confidence: float) -> float:
    """Half the width of the interval of a mean.

    Raises:
        ValueError: `confidence` is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return _half_width(errors, 1 - confidence)


def p_value(mean: float, errors: Sequence[Error]) -> float:
    """The two-sided p-value of a mean: the interval of confidence 1 − p just reaches 0."""
    if mean == 0:
        return 1.0
    if _half_width(errors, SMALLEST_P) < abs(mean):
        return 0.0
    log_p = brentq(
        lambda log_p: _half_width(errors, math.exp(log_p)) - abs(mean), math.log(SMALLEST_P), 0.0
    )
    return math.exp(log_p)


def _half_width(errors: Sequence[Error], p: float) -> float:
    squares = [
        error.variance * float(stdtrit(error.df, p / 2)) ** 2
        for error in errors
        if error.variance > 0
    ]
    return math.sqrt(sum(squares))
