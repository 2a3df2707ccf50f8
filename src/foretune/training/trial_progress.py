"""The progress of one trial among several, as a part of the progress of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[int, int, dict[str, Any]], None]  # (update, updates, latest figures)
RESOLUTION = 10**6


def within(progress: Progress | None, begin: float, end: float, doing: str) -> Progress | None:
    """The callback of a trial that trains an unknown number of times.

    The first training fills half of the trial's share, and all together never more than the whole.

    Args:
        progress: The callback of all trials; None for none.
        begin: Where the trial begins, as a share of all trials.
        end: Where it ends.
        doing: What the trial is, added to its figures.

    >>> report = within(lambda *at: print(*at), 0.5, 1.0, "round 2, none")
    >>> report(1, 2, {"loss": 0.3})
    666667 1000000 {'doing': 'round 2, none', 'loss': 0.3}
    >>> report(2, 2, {})
    750000 1000000 {'doing': 'round 2, none'}
    >>> report(1, 1, {})  # another training
    833333 1000000 {'doing': 'round 2, none'}
    """
    if progress is None:
        return None
    trainings, last_update, reported = 0, 0, -1

    def report(update: int, updates: int, figures: dict[str, Any]) -> None:
        nonlocal trainings, last_update, reported
        trainings += update <= last_update
        last_update = update
        trained = trainings + update / updates
        place = round(RESOLUTION * (begin + (end - begin) * trained / (trained + 1)))
        if place > reported:
            reported = place
            progress(place, RESOLUTION, {"doing": doing, **figures})

    return report
