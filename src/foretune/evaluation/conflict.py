"""How far tasks contradict one another, and whether retraining with adapters would pay for it.

Tasks are held out in turn. The labels of their rows are predicted with what the other tasks
teach, after a few labelled rows of the held-out task, in three steps:

    pooled         what all tasks say about the input
    + offset       a level of the task's own
    + low rank     a difference of the task's own, in the few directions in which tasks differ

The third is the assumption of PEFT-ML (arXiv:2410.22264): every task is a common model plus a
low-rank change. Where it predicts better than the first two, retraining that leaves the change to
adapters should gain over pooling; where it does not, there is nothing to gain. Nothing is trained:
the steps are linear (`foretune.linalg.task_factors`; offsets of labels are logistic), over inputs
that tasks share, else over frozen features. There are three controls: "blank" knows no row of the
task (the most frequent label; for choices the model as it is), "alone" is a task's own rows on the
features, without other tasks, and "own" the pooled coefficients, moved by its own rows in any
direction.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.evaluation.conflict_reading import Inputs, read_rows
from foretune.evaluation.conflict_rows import Indices, LabelledInputs
from foretune.evaluation.conflict_steps import RANKS, Given, fit_steps, mean_targets
from foretune.evaluation.statistics import mean_interval
from foretune.linalg.task_moments import Array
from foretune.tasks.rows import CLASSES
from foretune.tasks.task import TaskCollection
from foretune.training.adapted_scores import simplest

KINDS = (*CLASSES, "regression", "choice")  # objectives whose conflict can be measured
WITHOUT = ("blank", "alone")  # the steps without other tasks
FOLDS = 5
DRAWS = 2  # of the rows that a held-out task is given
LEARNT_SHARE = 0.8  # of a task's rows at most; the others are scored
WORTH = 0.01  # the least gain that is worth a retraining: a point of accuracy
# The gain of PEFT-ML over standard retraining, as a share of that of the low-rank step over the
# others: fitted to the collections of docs/conflict.md, on which it is 0.65.
REALISED = 0.65
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
        gain: (mean, low, high) expected gain of PEFT-ML; None where each task has labels of its
            own.
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
        over: "inputs" that tasks share, "features", or "responses" (features of choices).
        own_labels: Whether each task has labels of its own, so that no label can be pooled.
        metric: "accuracy" or "R²".
        unit: What shots count: "rows per class" or "rows".
        rank: Rank of the low-rank step that was chosen most often.
        by_shots: The steps at each number of shots.
        low_rank_gain: (mean, low, high) of how far the low-rank step is above the best other one,
            or 0: mean over the numbers of shots, in the metric; None where each task has labels of
            its own.
        expected_gain: (mean, low, high) expected gain of PEFT-ML over pooling: the share of it that
            trained bases have realised.
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
    low_rank_gain: Interval | None
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
    """Holds out each fold of tasks in turn and scores every step on it.

    Raises:
        UserError: All answers are the same.
    """
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
        moments = everything.subset(~is_held_out)
        steps = fit_steps(rows, moments, np.flatnonzero(~is_held_out[rows.units]))
        places = np.cumsum(is_held_out) - 1  # of the held-out units among themselves
        for (place, learnt, scored), of_all in zip(draws, moments_given, strict=True):
            part, learnt = (which[is_held_out[rows.units[which]]] for which in (scored, learnt))
            shot_rows = Given(rows, learnt, of_all.subset(is_held_out), places)
            y = rows.targets[part]
            for name, step in steps.items():
                predicted = step(shot_rows, part)
                for scores, values in (
                    (errors, rows.example_sums((predicted - y) ** 2, part)),
                    (hits, rows.hits(predicted, part)),
                ):
                    scores.setdefault(name, np.zeros(shape))
                    scores[name][place] += rows.task_means(values, part) / DRAWS
            distances = rows.example_sums((y - mean_targets(moments)) ** 2, part)
            spread[place] += rows.task_means(distances, part) / DRAWS
            num_given[place] += rows.num_examples(learnt) / DRAWS
    spread = spread.mean(1, keepdims=True)
    if not (spread > 0).all():
        raise UserError("all answers are the same")
    return _Scores({name: e / spread for name, e in errors.items()}, hits, num_given)


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
        # the lowest rank that is within a standard error of the best
        rank = RANKS[simplest(-np.stack([scores.errors[f"rank {k}"][others] for k in RANKS]))]
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
            gain=None if own_labels else _realised(_gain(gains[place])),
        )
        for place, number in enumerate(shots)
    ]
    low_rank_gain = None if own_labels else _gain(gains.mean(0))
    expected_gain = None if low_rank_gain is None else _realised(low_rank_gain)
    over = "responses" if rows.candidates == "responses" else "features"
    return Conflict(
        num_tasks=rows.num_tasks,
        num_rows=len(rows.learnable),
        shared_inputs=rows.shared,
        over=over if rows.inputs is None else "inputs",
        own_labels=own_labels,
        metric=metric,
        unit="rows per class" if rows.has_classes or own_labels else "rows",
        rank=sum(ranks, Counter()).most_common(1)[0][0],
        by_shots=by_shots,
        low_rank_gain=low_rank_gain,
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
    means = {name: values.mean(0) for name, values in steps.items()}
    without = max((means.pop(name) for name in WITHOUT if name in means), key=np.mean)
    over = _interval(max(means.values(), key=np.mean) - without)
    return "pool" if over[1] > 0 and over[0] >= WORTH else "keep the model"


def _gain(gains: Array) -> Interval:
    """(mean, low, high) gain of the low-rank step, without which one can always do."""
    mean, low, high = (max(0.0, bound) for bound in _interval(gains))
    return mean, low, high


def _realised(gain: Interval) -> Interval:
    """(mean, low, high) gain of PEFT-ML where the low-rank step has this one."""
    mean, low, high = gain
    return REALISED * mean, REALISED * low, REALISED * high


def _interval(values: Array) -> Interval:
    """(mean, low, high) over tasks (T,)."""
    return mean_interval(values[:, None])
