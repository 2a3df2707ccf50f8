"""Scores of held-out tasks after adapting: the best of a path, and what is level with the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping


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
    behind = [best[task] - score for task, score in scores.items()]
    if len(behind) < 2:
        return sum(behind) <= 0
    standard_error = statistics.stdev(behind) / math.sqrt(len(behind))
    return statistics.fmean(behind) <= standard_error
