"""Windows of a target that were sampled at another rate than the source's."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.run import check_positive
from foretune.tasks.task import Task


def factor_of(
    rows: str,
    length: int,
    source_length: int,
    *,
    rate: float | None,
    source_rate: float | None,
    resample: bool,
) -> float:
    """By how much windows are stretched so that a step lasts as long as one of the source's.

    Args:
        rows: Where the windows are from, for messages.
        length: Steps of a window.
        source_length: Steps of a window of the source.
        rate: Samples per second of the windows; None if unknown.
        source_rate: Samples per second of the source's windows; None if unknown.
        resample: Whether to stretch them at all.

    Raises:
        UserError: The rates differ, or one is not known and the lengths differ, and `resample` is
            off.
    """
    if rate is not None:
        check_positive("--rate", rate)
    if rate is not None and source_rate is not None:
        if rate == source_rate or resample:
            return source_rate / rate
        raise UserError(
            f"{rows} was sampled at {rate:g} Hz, but the source at {source_rate:g} Hz, and a "
            f"filter spans a number of steps: --resample brings it to {source_rate:g} Hz"
        )
    if length == source_length:
        return 1.0
    if resample:
        return source_length / length
    raise UserError(
        f"{rows} has windows of {length} steps, but the source's have {source_length}: if both "
        "last as long, use --resample; if both have one sampling rate, say so by --rate in "
        "prepare and here"
    )


def resampled(task: Task, factor: float) -> Task:
    """The task with windows of `factor` times as many steps, in all splits."""
    if factor == 1:
        return task
    return dataclasses.replace(
        task,
        train=[_stretched(row, factor) for row in task.train],
        validation=[_stretched(row, factor) for row in task.validation],
        test=[_stretched(row, factor) for row in task.test],
    )


def _stretched(row: Any, factor: float) -> dict[str, Any]:
    x = np.asarray(row["x"], dtype=np.float32)
    return {**row, "x": stretched(x, max(round(x.shape[-1] * factor), 1))}


def stretched(x: np.ndarray, length: int) -> np.ndarray:
    """A window with another number of steps over the same time.

    Each new step is the mean of the signal, taken as linear between samples, over the time that the
    step lasts where there are fewer of them (so that what is too fast for them averages out), and
    its value in the middle of that time otherwise. It is constant beyond its first and last sample.

    Args:
        x: (channels, steps).
        length: The new number of steps.

    Returns:
        (channels, length), float32.

    >>> stretched(np.array([[0.0, 2.0, 4.0, 6.0]]), 2).tolist()
    [[1.125, 4.875]]
    """
    steps = x.shape[-1]
    fine = max(round(8 * steps / length), 1) if length < steps else 1
    times = (np.arange(length * fine) + 0.5) * steps / (length * fine) - 0.5
    dense = np.stack([np.interp(times, np.arange(steps), channel) for channel in x])
    means: np.ndarray = dense.reshape(len(x), length, fine).mean(-1).astype(np.float32)
    return means
