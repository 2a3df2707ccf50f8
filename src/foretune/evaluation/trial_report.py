"""What `auto` reports of its trials: scores, cost, and how certain the choice is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.tasks.task import TaskCollection

Trial = dict[str, Any]


def label(candidate: Mapping[str, Any]) -> str:
    """A candidate's display name: its `as`, or its name and fields.

    >>> label({"name": "peft-ml", "penalty": 0.1}), label({"name": "none", "as": "control"})
    ('peft-ml penalty=0.1', 'control')
    """
    fields = [f"{key}={value}" for key, value in candidate.items() if key not in ("name", "as")]
    return str(candidate.get("as") or " ".join([str(candidate["name"]), *fields]))


def mean_score(trials: Sequence[Trial]) -> float:
    """Mean score of a candidate's trials, weighted by their steps; −∞ if one diverged."""
    if any(trial["score"] is None for trial in trials):
        return -math.inf
    return sum(t["score"] * t["steps"] for t in trials) / sum(t["steps"] for t in trials)


def report_of(
    ranked: Sequence[Mapping[str, Any]],
    trials: Sequence[Trial],
    tasks: TaskCollection,
    held: Sequence[Sequence[str]],
) -> dict[str, Any]:
    """The trials, their cost, and how certain the choice is."""
    best = label(ranked[0])
    by_name = {name: [t for t in trials if t["candidate"] == name] for name in _names(trials)}
    diverged = {n for n, part in by_name.items() if any(t["score"] is None for t in part)}
    costs = [trial["cost"] for trial in trials if "cost" in trial]
    return {
        "chosen": best,
        "scores": {n: None if n in diverged else mean_score(part) for n, part in by_name.items()},
        "rounds": {name: len(part) for name, part in by_name.items()},
        "above": [
            above
            for name in by_name
            if name != best
            for above in [_above(by_name[best], by_name[name])]
            if above
        ],
        "num_held_out": len({name for part in held for name in part}),
        "num_seen": len(tasks),
        "cost": {
            key: round(sum(cost.get(key) or 0 for cost in costs), 3)
            for key in ("seconds", "cpu_seconds", "tokens", "examples")
        },
        "trials": list(trials),
    }


def _names(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial["candidate"] for trial in trials))


def _above(best: Sequence[Trial], rival: Sequence[Trial]) -> dict[str, Any] | None:
    """How far the best is above a rival on the tasks of the rounds that both took part in."""
    from foretune.evaluation.statistics import paired_difference

    best_scores: dict[str, list[float]] = {}  # a task may be held out in several rounds
    rival_scores: dict[str, list[float]] = {}
    for best_trial, rival_trial in zip(best, rival, strict=False):
        if rival_trial["score"] is None:
            return None
        for task, scores in best_trial["by_task"].items():
            best_scores.setdefault(task, []).extend(scores)
            rival_scores.setdefault(task, []).extend(rival_trial["by_task"][task])
    difference = paired_difference(
        [[fmean(scores)] for scores in best_scores.values()],
        [[fmean(rival_scores[task])] for task in best_scores],
    )
    fields = ("difference", "low", "high", "p_value", "num_tasks")
    return {"over": rival[0]["candidate"], **{name: getattr(difference, name) for name in fields}}
