"""How far tasks contradict one another, and whether retraining with adapters would pay for it.

Tasks are held out in turn. The labels of their rows are predicted with what the other tasks
teach, after a few labelled rows of the held-out task, in three steps:

    pooled         what all tasks say about the input
    + offset       a level of the task's own
    + low rank     a difference of the task's own, in the few directions in which tasks differ

The third is the assumption of PEFT-ML (arXiv:2410.22264): every task is a common model plus a
low-rank change. Where it predicts better than the first two, retraining that leaves the change to
adapters should gain over pooling; where it does not, there is nothing to gain. Nothing is trained:
the steps are linear (`foretune.linalg.task_factors`), over inputs that tasks share, else over
frozen features. A task's own rows alone on these features, and pooled coefficients moved by its own
rows in any direction, are controls.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foretune.evaluation.conflict_reading import Inputs, read_rows
from foretune.evaluation.conflict_rows import Indices, LabelledInputs
from foretune.evaluation.statistics import mean_interval
from foretune.linalg.task_factors import TaskFactors, fit_factors
from foretune.linalg.task_moments import Array, FeatureMoments, Moments
from foretune.linalg.task_ridge import TaskRidge, fit_ridge
from foretune.tasks.rows import CLASSES
from foretune.tasks.task import TaskCollection

KINDS = (*CLASSES, "regression", "choice")  # objectives whose conflict can be measured
RANKS = (1, 2, 4, 8)
FOLDS = 5
DRAWS = 2  # of the rows that a held-out task is given
LEARNT_SHARE = 0.8  # of a task's rows at most; the others are scored
WORTH = 0.01  # the least gain that is worth a retraining: a point of accuracy
# The gain of PEFT-ML over standard retraining by the gain of the low-rank step over the others.
CALIBRATION = 1.0
Estimator = TaskFactors | TaskRidge
Interval = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class StepScores:
    """The steps at one number of shots.

    Args:
        shots: Rows (per class where there are classes) that a held-out task is given; None for all
            that can be spared.
        rows: Median number of rows that this came to.
        rank: Rank of the low-rank step, chosen on other tasks than the scored ones.
        scores: Step → (mean over tasks, low, high) of the accuracy, or of R² without classes.
        r2: Step → share of the labels' variance that it predicts.
        gain: (mean, low, high) expected gain of PEFT-ML: how far the low-rank step is above the
            best other one, or 0; None where each task has labels of its own.
    """

    shots: int | None
    rows: int
    rank: int
    scores: dict[str, Interval]
    r2: dict[str, float]
    gain: Interval | None


@dataclass(frozen=True, kw_only=True)
class Conflict:
    """What the three steps say about tasks.

    Args:
        num_tasks: Number of tasks.
        num_rows: Number of their rows that were used.
        shared_inputs: Share of the rows whose input several other tasks answer.
        over: "inputs" that tasks share, or "features".
        own_labels: Whether each task has labels of its own, so that no label can be pooled.
        metric: "accuracy" or "R²".
        unit: What shots count: "rows per class" or "rows".
        rank: Rank of the low-rank step that was chosen most often.
        by_shots: The steps at each number of shots.
        expected_gain: (mean, low, high) expected gain of PEFT-ML over pooling: mean over the
            numbers of shots, in the metric; None where each task has labels of its own.
        advice: "keep the model", "pool" or "PEFT-ML".
    """

    num_tasks: int
    num_rows: int
    shared_inputs: float
    over: str
    own_labels: bool
    metric: str
    unit: str
    rank: int
    by_shots: list[StepScores]
    expected_gain: Interval | None
    advice: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return dataclasses.asdict(self)


def measure_conflict(
    tasks: TaskCollection,
    inputs: Inputs | None = None,
    *,
    shots: Sequence[int | None] = (4, None),
    seed: int = 0,
) -> Conflict:
    """Measures how much a low-rank difference per task adds to pooled labels.

    Args:
        tasks: Seen tasks with their objective; their test rows are not read.
        inputs: How inputs that tasks do not share become features; None for arrays as they are.
        shots: Numbers of rows that a held-out task is given, per class where there are classes;
            None for all that can be spared.
        seed: Random seed of the folds and of the rows.

    Raises:
        UserError: The conflict of these tasks cannot be measured.
    """
    assert tasks.objective is not None
    kind = tasks.objective.kind
    rows = read_rows(tasks, kind, inputs or Inputs(), seed)
    folds = np.random.default_rng(seed).permutation(rows.num_tasks) % min(FOLDS, rows.num_tasks)
    scores = _scored(rows, folds, shots, seed)
    metric = "R²" if kind == "regression" else "accuracy"
    return _summary(rows, folds, shots, scores, metric)


@dataclass(frozen=True)
class _Scores:
    """What the steps predict of T tasks while these are held out, at S numbers of shots.

    Args:
        errors: Step → (S, T) mean squared error, with that of the other tasks' mean target as 1.
        hits: Step → (S, T) accuracy.
        num_given: (S, T) examples that were given.
    """

    errors: dict[str, Array]
    hits: dict[str, Array]
    num_given: Array


def _scored(
    rows: LabelledInputs, folds: Indices, shots: Sequence[int | None], seed: int
) -> _Scores:
    """Holds out each fold of tasks in turn and scores every step on it."""
    shape = (len(shots), rows.num_tasks)
    everything = rows.moments(np.arange(len(rows.tasks)))
    draws = [
        (place, *rows.draw(number, LEARNT_SHARE, np.random.default_rng([seed, draw])))
        for place, number in enumerate(shots)
        for draw in range(DRAWS)
    ]
    moments_given = [rows.moments(learnt) for _, learnt, _ in draws]
    errors: dict[str, Array] = {}
    hits: dict[str, Array] = {}
    spread, num_given = np.zeros(shape), np.zeros(shape)
    for fold in np.unique(folds):
        is_held_out = folds[rows.unit_tasks] == fold
        moments, held_out = everything.subset(~is_held_out), np.flatnonzero(is_held_out)
        levels = _levels(moments)
        estimators = _estimators(moments, rows)
        places = np.cumsum(is_held_out) - 1  # of the held-out units among themselves
        for (place, learnt, scored), given in zip(draws, moments_given, strict=True):
            part = scored[is_held_out[rows.units[scored]]]
            of_unit, y = places[rows.units[part]], rows.targets[part]
            for name, estimator in estimators.items():
                predicted = _predicted(estimator, given.subset(held_out), rows, part, of_unit)
                for scores, values in (
                    (errors, rows.example_sums((predicted - y) ** 2, part)),
                    (hits, rows.hits(predicted, part)),
                ):
                    scores.setdefault(name, np.zeros(shape))
                    scores[name][place] += rows.task_means(values, part) / DRAWS
            spread[place] += rows.task_means(rows.example_sums((y - levels) ** 2, part), part)
            num_given[place] = rows.num_examples(learnt)
    spread = spread.mean(1, keepdims=True) / DRAWS
    return _Scores({name: e / spread for name, e in errors.items()}, hits, num_given)


def _levels(moments: Moments) -> Array:
    """(C,) mean target of the tasks; 0 for choices, whose targets have mean 0."""
    ones, outputs = np.ones((len(moments.rows), 1)), range(moments.num_outputs)
    sums = [moments.products(ones, output)[0] @ moments.constant for output in outputs]
    return np.array(sums) / moments.rows.sum()


def _estimators(moments: Moments, rows: LabelledInputs) -> dict[str, Estimator]:
    """The steps, fitted to tasks; the low-rank one at each rank."""
    pooled = fit_factors(moments, 0, offset=False)
    estimators: dict[str, Estimator] = {"pooled": pooled}
    if rows.candidates != "responses":
        estimators["offset"] = fit_factors(moments, 0)
    simple = estimators.get("offset", pooled)
    assert isinstance(simple, TaskFactors)
    start = simple
    for rank in RANKS:
        start = fit_factors(moments, rank, start=start, offset=rows.candidates != "responses")
        estimators[f"rank {rank}"] = start
    alone = np.outer(_levels(moments), moments.constant)
    if not isinstance(moments, FeatureMoments):
        constant = dataclasses.replace(pooled, mean=alone)  # the most frequent label
        return {"alone": constant, **estimators}
    if rows.candidates == "responses":  # the cosine, as the model has it
        alone = np.zeros_like(pooled.mean)
        alone[0, 0] = moments.sums[:, 0, 0].sum() / moments.gram[:, 0, 0].sum()
    ridges = {"alone": fit_ridge(moments, alone), "own": fit_ridge(moments, pooled.mean)}
    return {**ridges, **estimators}


def _predicted(
    estimator: Estimator, given: Moments, rows: LabelledInputs, part: Indices, of_unit: Indices
) -> Array:
    """(part, C) predicted targets of rows.

    Args:
        estimator: A step.
        given: Moments of the rows that held-out units are given.
        rows: All rows.
        part: The rows to predict.
        of_unit: (part,) place of their units among those of `given`.
    """
    outputs = range(given.num_outputs)
    if isinstance(estimator, TaskRidge):
        assert isinstance(given, FeatureMoments) and rows.features is not None
        phi, shifts = rows.features[part], estimator.posterior(given)[0]
        means = phi @ estimator.mean.T
        return means + np.stack([(phi * shifts[of_unit, :, c]).sum(1) for c in outputs], 1)
    z = estimator.posterior(given)[0][of_unit]
    means = rows.project(estimator.mean.T, part)
    return means + np.stack(
        [(rows.project(estimator.loadings(c), part) * z).sum(1) for c in outputs], 1
    )


def _summary(
    rows: LabelledInputs, folds: Indices, shots: Sequence[int | None], scores: _Scores, metric: str
) -> Conflict:
    """Chooses the rank and the best control for each fold on the other folds."""
    by_metric = (
        scores.hits if metric == "accuracy" else {n: 1 - e for n, e in scores.errors.items()}
    )
    controls = [name for name in by_metric if not name.startswith("rank")]
    shape = scores.num_given.shape
    steps = {name: by_metric[name] for name in controls} | {"low rank": np.zeros(shape)}
    errors = {name: scores.errors[name] for name in controls} | {"low rank": np.zeros(shape)}
    gains = np.zeros(shape)
    ranks: list[Counter[int]] = [Counter() for _ in shots]
    for place, fold in itertools.product(range(len(shots)), np.unique(folds)):
        others, held_out = (place, folds != fold), (place, folds == fold)
        best = max(controls, key=lambda name: by_metric[name][others].mean())
        rank = min(RANKS, key=lambda k: scores.errors[f"rank {k}"][others].mean())
        ranks[place][rank] += 1
        steps["low rank"][held_out] = by_metric[f"rank {rank}"][held_out]
        errors["low rank"][held_out] = scores.errors[f"rank {rank}"][held_out]
        gains[held_out] = (by_metric[f"rank {rank}"] - by_metric[best])[held_out]
    own_labels = rows.candidates == "labels"
    by_shots = [
        StepScores(
            shots=number,
            rows=int(np.median(scores.num_given[place])),
            rank=ranks[place].most_common(1)[0][0],
            scores={name: _interval(values[place]) for name, values in steps.items()},
            r2={name: float(1 - values[place].mean()) for name, values in errors.items()},
            gain=None if own_labels else _expected(gains[place]),
        )
        for place, number in enumerate(shots)
    ]
    expected_gain = None if own_labels else _expected(gains.mean(0))
    return Conflict(
        num_tasks=rows.num_tasks,
        num_rows=len(rows.learnable),
        shared_inputs=rows.shared,
        over="features" if rows.inputs is None else "inputs",
        own_labels=own_labels,
        metric=metric,
        unit="rows per class" if rows.labels.any() else "rows",
        rank=sum(ranks, Counter()).most_common(1)[0][0],
        by_shots=by_shots,
        expected_gain=expected_gain,
        advice=_advice(expected_gain, steps),
    )


def _advice(gain: Interval | None, steps: Mapping[str, Array]) -> str:
    """What to do about the base.

    Args:
        gain: Expected gain of PEFT-ML over pooling; None where labels are tasks' own.
        steps: Step → (S, T) scores.
    """
    if gain is not None and gain[1] > 0 and gain[0] >= WORTH:
        return "PEFT-ML"
    # Where each task has labels of its own, their common directions are what pooling can learn.
    others = [values.mean(0) for name, values in steps.items() if name != "alone"]
    over_alone = _interval(max(others, key=np.mean) - steps["alone"].mean(0))
    return "pool" if over_alone[1] > 0 and over_alone[0] >= WORTH else "keep the model"


def _expected(gains: Array) -> Interval:
    """(mean, low, high) gain of PEFT-ML, which can always do without the low-rank step."""
    mean, low, high = (max(0.0, CALIBRATION * bound) for bound in _interval(gains))
    return mean, low, high


def _interval(values: Array) -> Interval:
    """(mean, low, high) over tasks (T,)."""
    return mean_interval(values[:, None])
