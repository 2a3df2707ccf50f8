"""Is one base better than another? Paired differences over tasks and seeds, and the verdict.

The unit is the unseen task. A score is one task under one seed, so scores are crossed: tasks share
seeds and seeds share tasks. The bootstrap therefore draws tasks and seeds independently of each
other, each with replacement, and averages the scores where they cross. This counts the noise of
single cells more than once, so the intervals err on the wide side; only with two or three seeds,
whose own spread a bootstrap underestimates, can they come out too narrow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from foretune.evaluation.verdict import CONTROLS, FEW_TASKS, verdict
from foretune.evaluation.wording import shots_label, shots_order

__all__ = ["holm", "mean_interval", "paired_difference", "pairs_and_means", "verdict"]

RELATIVE_ZERO = 1e-12  # Smaller than this share of the largest score is rounding, hence a tie.
CHUNK = 2_000_000  # Drawn task numbers held in memory at a time.

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How far method a is above method b on the same tasks and seeds.

    Args:
        difference: Mean of a − b over tasks and seeds.
        low: Lower end of the bootstrap interval.
        high: Upper end of the bootstrap interval.
        p_value: Two-sided Wilcoxon signed-rank test of the tasks' mean differences.
        wins: Tasks on which a is above b.
        losses: Tasks on which a is below b.
        ties: Tasks on which they are equal.
        num_tasks: Tasks compared.
        num_seeds: Seeds compared.
        few: The tasks are so few that interval and test say little.
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
    few: bool


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Compares two methods on the same tasks and seeds.

    Args:
        a: Scores of one method, (num_tasks, num_seeds).
        b: Scores of the other on the same tasks and seeds, (num_tasks, num_seeds).
        confidence: Share of resamples that the interval holds.
        num_resamples: Bootstrap resamples.
        seed: Seeds the bootstrap.

    Returns:
        The mean difference a − b, its interval, test and wins.

    Raises:
        ValueError: The shapes differ, are not two-dimensional or empty, or a score is not finite.

    >>> one = paired_difference([[0.5], [0.6], [0.7]], [[0.4], [0.6], [0.5]])
    >>> round(one.difference, 3), one.wins, one.losses, one.ties
    (0.1, 2, 0, 1)
    """
    left, right = _scores(a, "a"), _scores(b, "b")
    if left.shape != right.shape:
        raise ValueError(
            f"a and b must hold the same tasks and seeds, got {left.shape} and {right.shape}"
        )
    difference = left - right
    low, high = _crossed_interval(difference, confidence, num_resamples, seed)
    # Equal scores averaged over seeds can differ in the last bits; such tasks are ties.
    scale = max(np.abs(left).max(), np.abs(right).max()) or 1.0
    per_task = difference.mean(axis=1) / scale
    per_task = np.round(per_task / RELATIVE_ZERO) * RELATIVE_ZERO
    moved = per_task[per_task != 0]  # with zeros scipy leaves the exact distribution
    return PairedDifference(
        difference=float(difference.mean()),
        low=low,
        high=high,
        p_value=float(stats.wilcoxon(moved).pvalue) if moved.size else 1.0,
        wins=int((per_task > 0).sum()),
        losses=int((per_task < 0).sum()),
        ties=int((per_task == 0).sum()),
        num_tasks=difference.shape[0],
        num_seeds=difference.shape[1],
        few=difference.shape[0] < FEW_TASKS,
    )


def mean_interval(
    scores: ArrayLike,
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean score with its crossed bootstrap interval.

    Args:
        scores: Scores of one method, (num_tasks, num_seeds).
        confidence: Share of resamples that the interval holds.
        num_resamples: Bootstrap resamples.
        seed: Seeds the bootstrap.

    Returns:
        (mean, low, high).

    Raises:
        ValueError: The scores are not two-dimensional, are empty or not all finite.
    """
    values = _scores(scores, "scores")
    return float(values.mean()), *_crossed_interval(values, confidence, num_resamples, seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

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
    """Every base against every other at each number of shots, and every base's mean.

    A pair reads a − b. A control stands on the right (the first control against all others), and
    two bases that are no controls keep their order. Holm's correction runs over all pairs of the
    same number of shots.

    Args:
        scores_records: The comparison's `scores`: base, task, shots, seed, score.
        bases: The comparison's `bases`, of which `name` and `method` are read.
        controls: Methods that are controls, the most basic first.

    Returns:
        The comparison's `pairs` and `means`.

    Raises:
        ValueError: A base lacks a task under one of its seeds, has one twice, is not among `bases`,
            or shares nothing with another; the message names the cells.
    """
    cells = _cells(scores_records, [base["name"] for base in bases])
    ordered = _pair_order(bases, controls)
    pairs: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for shots in sorted({key[1] for key in cells}, key=shots_order):
        present = [name for name in ordered if (name, shots) in cells]
        found = []
        for a, b in combinations(present, 2):
            compared = paired_difference(*_shared(cells, a, b, shots))
            fields = dataclasses.asdict(compared)
            fields.pop("few")
            found.append({"a": a, "b": b, "shots": shots, **fields})
        for pair, adjusted in zip(found, holm([pair["p_value"] for pair in found]), strict=True):
            pairs.append({**pair, "p_holm": adjusted})
        for base in bases:
            if (base["name"], shots) in cells:
                own = cells[base["name"], shots]
                mean, low, high = mean_interval(_matrix(own, *_axes(own), base["name"], shots))
                row = {"base": base["name"], "shots": shots, "mean": mean, "low": low, "high": high}
                means.append(row)
    return pairs, means


Cells = dict[tuple[str, int], float]  # (task, seed) -> score


def _scores(values: ArrayLike, name: str) -> Array:
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must have the shape (num_tasks, num_seeds), got {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} holds {bad} scores that are not finite, shape {array.shape}")
    return array


def _crossed_interval(
    values: Array, confidence: float, num_resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` (T, S), rows and columns drawn independently."""
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            "confidence must lie between 0 and 1 and num_resamples be at least 1, "
            f"got {confidence} and {num_resamples}"
        )
    num_tasks, num_seeds = values.shape
    rng = np.random.default_rng(seed)
    at_a_time = max(1, CHUNK // num_tasks)
    means = []
    for start in range(0, num_resamples, at_a_time):
        rows = min(at_a_time, num_resamples - start)
        tasks, seeds = _draws(rng, rows, num_tasks), _draws(rng, rows, num_seeds)
        means.append(((tasks @ values) * seeds).sum(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def _draws(rng: np.random.Generator, rows: int, size: int) -> Array:
    """How often each of `size` things is drawn in each of `rows` resamples, as shares."""
    drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size) / size


def _cells(
    records: Iterable[Mapping[str, Any]], names: Sequence[str]
) -> dict[tuple[str, int | None], Cells]:
    found: dict[tuple[str, int | None], Cells] = {}
    for record in records:
        base, task, seed, shots = (record[key] for key in ("base", "task", "seed", "shots"))
        if base not in names:
            raise ValueError(f"a score belongs to base {base!r}; the bases are {', '.join(names)}")
        own = found.setdefault((base, shots), {})
        if (task, seed) in own:
            raise ValueError(f"two scores for {_place(base, shots)}, task {task!r}, seed {seed}")
        own[task, seed] = float(record["score"])
    return found


def _pair_order(bases: Sequence[Mapping[str, Any]], controls: Sequence[str]) -> list[str]:
    """Names such that the first of any two is the left side of their pair."""
    rank = {control: len(controls) - index for index, control in enumerate(controls)}
    return [base["name"] for base in sorted(bases, key=lambda base: rank.get(base["method"], 0))]


def _axes(cells: Cells) -> tuple[list[str], list[int]]:
    return sorted({task for task, _ in cells}), sorted({seed for _, seed in cells})


def _shared(
    cells: Mapping[tuple[str, int | None], Cells], a: str, b: str, shots: int | None
) -> tuple[Array, Array]:
    (tasks_a, seeds_a), (tasks_b, seeds_b) = _axes(cells[a, shots]), _axes(cells[b, shots])
    tasks = [task for task in tasks_a if task in set(tasks_b)]
    seeds = [seed for seed in seeds_a if seed in set(seeds_b)]
    if not tasks or not seeds:
        raise ValueError(f"{_place(a, shots)} and base {b!r} share no task and seed")
    return (
        _matrix(cells[a, shots], tasks, seeds, a, shots),
        _matrix(cells[b, shots], tasks, seeds, b, shots),
    )


def _matrix(
    cells: Cells, tasks: Sequence[str], seeds: Sequence[int], base: str, shots: int | None
) -> Array:
    missing = [(task, seed) for task in tasks for seed in seeds if (task, seed) not in cells]
    if missing:
        named = ", ".join(f"task {task!r} seed {seed}" for task, seed in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{_place(base, shots)} has no score for {named}{more}")
    return np.array([[cells[task, seed] for seed in seeds] for task in tasks], dtype=float)


def _place(base: str, shots: int | None) -> str:
    return f"base {base!r} ({shots_label(shots)})"
