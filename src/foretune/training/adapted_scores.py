"""Scores of held-out tasks after adapting: the best of a path, and what is level with the best.

The one-standard-error rule (Breiman et al., "Classification and Regression Trees", 1984, section
3.4.3), by which a search over few tasks is not decided by luck.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def best_scores(path: Mapping[int, Mapping[tuple[str, int], float]]) -> dict[str, float]:
    """The scores by task, averaged over draws, at the step of a path with the highest mean.

    >>> best_scores({0: {("a", 0): 0.5, ("b", 0): 0.7}, 8: {("a", 0): 0.9, ("b", 0): 0.1}})
    {'a': 0.5, 'b': 0.7}
    """
    best = max(path.values(), key=lambda scores: statistics.fmean(scores.values()))
    by_task: dict[str, list[float]] = {}
    for (task, _), score in best.items():
        by_task.setdefault(task, []).append(score)
    return {task: statistics.fmean(scores) for task, scores in by_task.items()}


def standard_error(differences: Scores) -> Any:
    """Standard error of the mean over the last axis, which holds tasks; 0 for a single one."""
    num_tasks = differences.shape[-1]
    if num_tasks == 1:
        return np.zeros(differences.shape[:-1])
    return differences.std(axis=-1, ddof=1) / math.sqrt(num_tasks)


def simplest(scores: Scores) -> int:
    """The first setting that is not worse than the best by more than one standard error.

    Args:
        scores: (num_settings, num_tasks), the simplest setting first. With a single task the
            standard error is unknown, and the best is taken.

    >>> tied = [[0.5, 0.7, 0.6], [0.6, 0.5, 0.8]]
    >>> simplest(np.array(tied)), simplest(np.array([[0.1, 0.2, 0.1], *tied]))
    (0, 1)
    """
    behind = scores[int(scores.mean(axis=1).argmax())] - scores
    return int((behind.mean(axis=1) <= standard_error(behind)).argmax())


def is_level(scores: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether scores are not below the best by more than one standard error of the difference.

    Args:
        scores: Task → score.
        best: The same tasks with the scores of the highest mean.

    >>> best = {"a": 0.9, "b": 0.6, "c": 0.7}
    >>> is_level({"a": 0.7, "b": 0.7, "c": 0.7}, best), is_level({**best, "a": 0.89}, best)
    (True, True)
    >>> is_level({"a": 0.8, "b": 0.5, "c": 0.6}, best)
    False
    """
    behind = np.array([best[task] - score for task, score in scores.items()])
    return bool(behind.mean() <= standard_error(behind))
