"""Merges the comparisons of several repeats of a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

OF_EACH_REPEAT = {
    "validation_score": "validation_scores",
    "curve": "curves",
    "by_shots": "by_repeat",
}
AVERAGED = ("seconds", "cpu_seconds", "tokens", "examples", "validation_tokens")


def merge_repeats(repeats: Sequence[dict[str, Any]], turns: int = 1) -> dict[str, Any]:
    """One comparison over the scores of all repeats; costs are means over the repeats.

    Args:
        repeats: Comparisons of the same bases under different random seeds.
        turns: Number of consecutive repeats with different unseen tasks that make up one seed.
    """
    from foretune.evaluation.statistics import pairs_and_means, verdict

    first = repeats[0]
    draws = 1 + max(score["seed"] for score in first["scores"])
    scores = [
        # The draws of each repeat are numbered from 0; an offset keeps repeats apart.
        {**score, "repeat": number // turns, "seed": number // turns * draws + score["seed"]}
        for number, repeat in enumerate(repeats)
        for score in repeat["scores"]
    ]
    bases = [
        _mean_base([repeat["bases"][i] for repeat in repeats]) for i in range(len(first["bases"]))
    ]
    pairs, means = pairs_and_means(scores, bases)
    sentence = verdict(
        pairs,
        means,
        bases,
        metric=first["metric"]["name"],
        shots_unit=first["adapt"].get("shots_unit", "rows"),
    )
    return {
        **first,
        "bases": bases,
        "scores": scores,
        "pairs": pairs,
        "means": means,
        "verdict": sentence,
    }


def _mean_base(bases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The base of the first repeat, with mean costs and the choices of all repeats.

    `learning_rate`, `searched`, and what `OF_EACH_REPEAT` names are those of the first repeat;
    `learning_rates`, `validation_scores`, `curves` and `by_repeat` are those of all.
    """
    merged = dict(bases[0])
    if merged.pop("choice", None) is not None:
        merged["choices"] = [
            {key: value for key, value in base["choice"].items() if key != "trials"}
            for base in bases
        ]
    for stage in ("retrain", "adapt"):
        costs = [base[stage] for base in bases if base.get(stage)]
        if len(costs) < 2:
            continue
        means = {
            key: statistics.fmean(cost[key] for cost in costs)
            for key in AVERAGED
            if all(isinstance(cost.get(key), int | float) for cost in costs)
        }
        peaks = [cost["peak_memory_mb"] for cost in costs if cost.get("peak_memory_mb")]
        merged[stage] = {**costs[0], **means, **({"peak_memory_mb": max(peaks)} if peaks else {})}
        merged[stage]["learning_rates"] = [cost.get("learning_rate") for cost in costs]
        for key, name in OF_EACH_REPEAT.items():
            if key in costs[0]:
                merged[stage][name] = [cost[key] for cost in costs]
    return merged
