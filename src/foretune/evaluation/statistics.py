"""Is one base better than another? Paired differences over tasks and repeats.

The unit is the unseen task. A score belongs to one task and one repeat, which has its own seed of
the retraining; the draws of a repeat are averaged first. Tasks share repeats and repeats share
tasks, and both are random: `crossed` has the interval and its test. With one repeat the luck of a
retraining is unknown, and everything is about these retrained bases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from foretune.evaluation.crossed import Layout, half_width, p_value
from foretune.evaluation.verdict import CONTROLS, verdict
from foretune.evaluation.wording import shots_label, shots_order

__all__ = [
    "holm",
    "mean_interval",
    "paired_difference",
    "pairs_and_means",
    "signed_rank_test",
    "verdict",
]

RELATIVE_ZERO = 1e-12  # A difference below this share of the largest score is rounding: a tie.
MAX_EXACT = 500  # Differences for which the exact test takes milliseconds.

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """By how much method a is above method b on the same tasks and seeds.

    Args:
        difference: Mean of a − b over tasks and seeds.
        low: Lower end of the interval.
        high: Upper end of the interval.
        p_value: Two-sided: the larger of the interval's own p-value, which knows the luck of the
            repeats, and Wilcoxon's signed-rank test of the tasks' mean differences, which does not
            rest on normal errors.
        wins: Tasks on which a is above b.
        losses: Tasks on which a is below b.
        ties: Tasks on which they are equal.
        num_tasks: Tasks compared.
        num_seeds: Repeats compared, each with its own seed of the retraining.
    """

    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    losses: int
    ties: int
    num_tasks: int
    num_seeds: int


def paired_difference(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> PairedDifference:
    """Compares two methods on the same tasks and seeds.

    Args:
        a: Scores of one method, (num_tasks, num_seeds).
        b: Scores of the other on the same tasks and seeds, (num_tasks, num_seeds).
        confidence: How often such an interval covers the difference, between 0 and 1.

    Returns:
        The mean difference a − b, its interval, test and wins.

    Raises:
        ValueError: The shapes differ, are empty or not two-dimensional, or a score is not finite.

    >>> pair = paired_difference([[0.5], [0.6], [0.7]], [[0.4], [0.6], [0.5]])
    >>> round(pair.difference, 3), pair.wins, pair.losses, pair.ties
    (0.1, 2, 0, 1)
    """
    left, right = _scores(a, "a"), _scores(b, "b")
    if left.shape != right.shape:
        raise ValueError(
            f"a and b must hold the same tasks and seeds, got {left.shape} and {right.shape}"
        )
    difference = left - right
    layout = Layout.of(difference)
    errors = layout.errors()
    half = half_width(errors, confidence)
    low, high = layout.mean - half, layout.mean + half
    if min(left.min(), right.min()) >= 0 and max(left.max(), right.max()) <= 1:
        low, high = max(low, -1.0), min(high, 1.0)  # such as accuracies, with very few tasks
    # Means of equal scores over seeds can differ in the last bits; such tasks are ties.
    scale = max(np.abs(left).max(), np.abs(right).max()) or 1.0
    per_task = difference.mean(axis=1) / scale
    per_task = np.round(per_task / RELATIVE_ZERO) * RELATIVE_ZERO
    return PairedDifference(
        difference=layout.mean,
        low=low,
        high=high,
        p_value=max(signed_rank_test(per_task), p_value(layout.mean, errors)),
        wins=int((per_task > 0).sum()),
        losses=int((per_task < 0).sum()),
        ties=int((per_task == 0).sum()),
        num_tasks=difference.shape[0],
        num_seeds=difference.shape[1],
    )


def signed_rank_test(differences: ArrayLike) -> float:
    """Exact two-sided p-value of Wilcoxon's signed-rank test, zeros left out, ties by mid-ranks.

    Under the null hypothesis each difference is as likely positive as negative, so the rank sum of
    the positive ones is a sum of independent terms; its distribution is built term by term.
    SciPy's exact test takes seconds with ties and stops at 13 differences.

    Args:
        differences: (n,) paired differences. Above 500, the normal approximation is used.

    >>> signed_rank_test([0.1, 0.2, 0.2, 0.4, 0.5, 0.0])
    0.0625
    """
    moved = np.asarray(differences, dtype=float)
    moved = moved[moved != 0]
    if not moved.size:
        return 1.0
    if moved.size > MAX_EXACT:
        return float(stats.wilcoxon(moved, method="approx").pvalue)
    doubled = np.rint(2 * stats.rankdata(np.abs(moved))).astype(int)  # whole numbers despite ties
    probability = np.zeros(doubled.sum() + 1)
    probability[0] = 1.0
    for rank in doubled:
        probability[rank:] = (probability[rank:] + probability[:-rank]) / 2
        probability[:rank] /= 2
    rank_sum = int(doubled[moved > 0].sum())
    tail = min(probability[: rank_sum + 1].sum(), probability[rank_sum:].sum())
    return min(1.0, 2 * float(tail))


def mean_interval(scores: ArrayLike, *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean score with its interval, which stays within [0, 1] where all scores do.

    Args:
        scores: Scores of one method, (num_tasks, num_seeds).
        confidence: How often such an interval covers the mean, between 0 and 1.

    Returns:
        (mean, low, high).

    Raises:
        ValueError: The scores are not two-dimensional, empty, or not all finite.
    """
    values = _scores(scores, "scores")
    layout = Layout.of(values)
    half = half_width(layout.errors(), confidence)
    low, high = layout.mean - half, layout.mean + half
    if values.min() >= 0 and values.max() <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    return layout.mean, low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order of `p_values`.

    Raises:
        ValueError: A value is not between 0 and 1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, dtype=float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values are a list of numbers between 0 and 1, got {p_values!r}")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum(p[order] * np.arange(p.size, 0, -1), 1.0)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return [float(value) for value in adjusted]


def pairs_and_means(
    scores_records: Iterable[Mapping[str, Any]],
    bases: Sequence[Mapping[str, Any]],
    controls: Sequence[str] = CONTROLS,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All pairs of bases at each number of shots, and the mean of each base.

    A pair reads a − b. Controls are on the right (the first control in all its pairs), and two
    bases that are not controls keep their order. Holm's correction covers all pairs at the same
    number of shots.

    Args:
        scores_records: The comparison's `scores`: base, task, shots, seed, score, and the number of
            the `repeat`, whose draws are averaged; without it each seed is a repeat.
        bases: The comparison's `bases`, of which `name` and `method` are read.
        controls: Methods that are controls, the most basic first.

    Returns:
        The comparison's `pairs` and `means`.

    Raises:
        ValueError: A base has no score or two scores for a task and seed, is not among `bases`, or
            shares no task and seed with another; the message names the scores.
    """
    records = list(scores_records)
    cells = _cells(records, [base["name"] for base in bases])
    repeats = {row["seed"]: row.get("repeat", row["seed"]) for row in records}
    ordered = _pair_order(bases, controls)
    pairs: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for shots in sorted({key[1] for key in cells}, key=shots_order):
        present = [name for name in ordered if (name, shots) in cells]
        tables = {(a, b): _shared(cells, a, b, shots, repeats) for a, b in combinations(present, 2)}
        compared = compare_pairs(tables)
        for (a, b), pair in compared.items():
            pairs.append({"a": a, "b": b, "shots": shots, **pair})
        for base in bases:
            if (base["name"], shots) in cells:
                scores = cells[base["name"], shots]
                matrix = _matrix(scores, *_axes(scores), base["name"], shots, repeats)
                mean, low, high = mean_interval(matrix)
                row = {"base": base["name"], "shots": shots, "mean": mean, "low": low, "high": high}
                means.append(row)
    return pairs, means


def compare_pairs(
    tables: Mapping[tuple[str, str], tuple[Array, Array]],
) -> dict[tuple[str, str], dict[str, Any]]:
    """All pairs of one comparison, with Holm's correction.

    Args:
        tables: (a, b) → scores of a and of b, both (num_tasks, num_repeats).

    Returns:
        (a, b) → the fields of `PairedDifference`, and `p_holm`.
    """
    pairs = {
        pair: dataclasses.asdict(paired_difference(left, right))
        for pair, (left, right) in tables.items()
    }
    p_holm = holm([pair["p_value"] for pair in pairs.values()])
    return {
        names: {**pair, "p_holm": adjusted}
        for (names, pair), adjusted in zip(pairs.items(), p_holm, strict=True)
    }


Cells = dict[tuple[str, int], float]  # (task, seed) -> score


def _scores(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have the shape (num_tasks, num_seeds), got {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} has {bad} scores that are not finite, shape {array.shape}")
    return array


def _cells(
    records: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> dict[tuple[str, int | None], Cells]:
    cells: dict[tuple[str, int | None], Cells] = {}
    for record in records:
        base, task, seed, shots = (record[key] for key in ("base", "task", "seed", "shots"))
        if base not in names:
            raise ValueError(f"a score belongs to base {base!r}; the bases are {', '.join(names)}")
        scores = cells.setdefault((base, shots), {})
        if (task, seed) in scores:
            raise ValueError(f"two scores for {_place(base, shots)}, task {task!r}, seed {seed}")
        scores[task, seed] = float(record["score"])
    return cells


def _pair_order(bases: Sequence[Mapping[str, Any]], controls: Sequence[str]) -> list[str]:
    """Names ordered so that of any two, the first is the left side of their pair."""
    rank = {control: len(controls) - index for index, control in enumerate(controls)}
    return [base["name"] for base in sorted(bases, key=lambda base: rank.get(base["method"], 0))]


def _axes(cells: Cells) -> tuple[list[str], list[int]]:
    return sorted({task for task, _ in cells}), sorted({seed for _, seed in cells})


def _shared(
    cells: Mapping[tuple[str, int | None], Cells],
    a: str,
    b: str,
    shots: int | None,
    repeats: Mapping[int, int],
) -> tuple[Array, Array]:
    (tasks_a, seeds_a), (tasks_b, seeds_b) = _axes(cells[a, shots]), _axes(cells[b, shots])
    tasks = [task for task in tasks_a if task in set(tasks_b)]
    seeds = [seed for seed in seeds_a if seed in set(seeds_b)]
    if not tasks or not seeds:
        raise ValueError(f"{_place(a, shots)} and base {b!r} share no task and seed")
    return (
        _matrix(cells[a, shots], tasks, seeds, a, shots, repeats),
        _matrix(cells[b, shots], tasks, seeds, b, shots, repeats),
    )


def _matrix(
    cells: Cells,
    tasks: Sequence[str],
    seeds: Sequence[int],
    base: str,
    shots: int | None,
    repeats: Mapping[int, int],
) -> Array:
    """Scores (num_tasks, num_repeats), the mean over the draws of each repeat.

    Raises:
        ValueError: A score is missing.
    """
    missing = [(task, seed) for task in tasks for seed in seeds if (task, seed) not in cells]
    if missing:
        named = ", ".join(f"task {task!r} seed {seed}" for task, seed in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{_place(base, shots)} has no score for {named}{more}")
    draws: dict[int, list[int]] = {}
    for seed in seeds:
        draws.setdefault(repeats[seed], []).append(seed)
    return np.array(
        [
            [np.mean([cells[task, seed] for seed in members]) for members in draws.values()]
            for task in tasks
        ],
        dtype=float,
    )


def _place(base: str, shots: int | None) -> str:
    return f"base {base!r} ({shots_label(shots)})"
