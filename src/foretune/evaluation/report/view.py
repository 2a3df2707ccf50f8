"""What the page, the figures and the terminal show of a comparison, in their order."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from foretune.evaluation.verdict import CONTROLS, Contrast, contrast
from foretune.evaluation.wording import AS_IT_IS, Scale, rows_drawn, shots_label, shots_order


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean with its interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """Held-out scores during a retraining.

    Args:
        points: (step, score) of each validation.
        chosen: Which of them is the base that was taken; None if none is.
    """

    points: list[tuple[int, float]]
    chosen: int | None

    @classmethod
    def of(cls, history: Sequence[Mapping[str, Any]], score: float | None) -> Curve:
        """The curve of a history, whose last state with this score was taken."""
        points = [
            (row["step"], row["adapted_score"])
            for row in history
            if row.get("adapted_score") is not None
        ]
        level = [index for index, point in enumerate(points) if point[1] == score]
        return cls(points, level[-1] if level else None)


class View:
    """A read-only comparison with the lookups that all parts of a report share.

    Args:
        comparison: The content of `comparison.json`.
    """

    def __init__(self, comparison: Mapping[str, Any]) -> None:
        self.comparison = comparison
        self.scale = Scale(comparison["metric"]["name"])
        self.chance: float | None = comparison["metric"].get("chance")
        self.bases: list[Mapping[str, Any]] = list(comparison["bases"])
        self.names: list[str] = [base["name"] for base in self.bases]
        self.labels: dict[str, str] = {base["name"]: str(base["label"]) for base in self.bases}
        self.methods: dict[str, str] = {base["name"]: base["method"] for base in self.bases}
        self.means = {
            (row["base"], row["shots"]): Mean(row["mean"], row["low"], row["high"])
            for row in comparison["means"]
        }
        self.shots: list[int | None] = sorted({key[1] for key in self.means}, key=shots_order)
        self.judged: int | None = comparison["verdict"]["shots"]
        self.best: str | None = comparison["verdict"]["best"]
        self.shots_unit: str = comparison["adapt"].get("shots_unit", "rows")

    @property
    def controls(self) -> list[str]:
        """The names of the controls, the unmodified model first."""
        return [name for m in CONTROLS for name in self.names if self.methods[name] == m]

    def rival(self, name: str) -> str:
        """The label of a base after 'over' or 'against'."""
        return AS_IT_IS if self.methods[name] == "none" else self.labels[name]

    def shots_label(self, shots: int | None) -> str:
        """The title of the column for a number of shots."""
        return shots_label(shots, self.shots_unit)

    def rows_drawn(self) -> list[str]:
        """What the numbers of shots came to; empty where they are the rows of every task."""
        numbers: dict[int | None, set[int]] = defaultdict(set)
        for row in self.comparison["scores"]:
            if "num_train" in row:
                numbers[row["shots"]].add(row["num_train"])
        in_order = {shots: numbers[shots] for shots in self.shots if shots in numbers}
        return rows_drawn(in_order, self.shots_unit)

    def leader(self, shots: int | None) -> str | None:
        """The base with the highest mean at `shots`."""
        measured = [name for name in self.names if (name, shots) in self.means]
        return max(measured, key=lambda name: self.means[name, shots].mean, default=None)

    def contrast(self, a: str, b: str, shots: int | None) -> Contrast | None:
        """The pair of two bases, read as a − b."""
        return contrast(self.comparison["pairs"], a, b, shots)

    def difference_text(self, pair: Contrast) -> str:
        """A difference with its interval: '+5.5 (+2.9 to +8.1)'."""
        interval = self.scale.interval(pair.low, pair.high)
        return f"{self.scale.signed(pair.difference)} ({interval})"

    def against_controls(self, shots: int | None) -> list[tuple[str, list[Contrast]]]:
        """For each control, the pairs of other bases with it; without controls, all pairs."""
        groups: dict[str, list[Contrast]] = {}
        rivals = self.controls or self.names
        for index, b in enumerate(rivals):
            excluded = {b, *rivals[:index]}
            pairs = [self.contrast(a, b, shots) for a in self.names if a not in excluded]
            groups[b] = [pair for pair in pairs if pair is not None]
        return [(b, members) for b, members in groups.items() if members]

    def focus(self) -> Contrast | None:
        """The pair that is shown task by task: the recommended base against the best control."""
        candidates = [name for name in self.names if self.methods[name] != "none"]
        proven = [name for name in candidates if name == self.best and name not in self.controls]
        peft_ml = [name for name in candidates if self.methods[name] == "peft-ml"]
        others = [name for name in candidates if name not in self.controls]
        for a in proven + peft_ml + others + candidates:
            for b in [*reversed(self.controls), *self.names]:
                pair = self.contrast(a, b, self.judged) if a != b else None
                if pair is not None:
                    return pair
        return None

    def task_differences(self, a: str, b: str, shots: int | None) -> list[tuple[str, float]]:
        """(task, mean of a − b over the seeds of both), in descending order."""
        left, right = self._cells(a, shots), self._cells(b, shots)
        by_task = _by_task({key: left[key] - right[key] for key in left.keys() & right.keys()})
        return sorted(by_task.items(), key=lambda item: (-item[1], item[0]))

    def task_means(self, name: str, shots: int | None) -> dict[str, float]:
        """The mean score of a base on each task."""
        return _by_task(self._cells(name, shots))

    def _cells(self, name: str, shots: int | None) -> dict[tuple[str, int], float]:
        return {
            (row["task"], row["seed"]): row["score"]
            for row in self.comparison["scores"]
            if row["base"] == name and row["shots"] == shots
        }

    def rank_scores(self) -> dict[tuple[str, int], list[float]]:
        """The scores of the tasks in the spectrum by (base, rank)."""
        scores: dict[tuple[str, int], list[float]] = defaultdict(list)
        for row in (self.comparison.get("spectrum") or {}).get("rows") or []:
            scores[row["base"], row["rank"]].append(row["score"])
        return dict(scores)

    def retraining_curves(self) -> dict[str, list[Curve]]:
        """The held-out scores of each repeat by base; of bases that were scored twice or more."""
        curves: dict[str, list[Curve]] = {}
        for base in self.bases:
            record = base.get("retrain") or {}
            histories = record.get("curves") or [record.get("curve") or []]
            taken_at = record.get("validation_scores") or [record.get("validation_score")]
            scored = [
                Curve.of(history, score)
                for history, score in zip_longest(histories, taken_at[: len(histories)])
            ]
            if any(len(curve.points) > 1 for curve in scored):
                curves[base["name"]] = [curve for curve in scored if curve.points]
        return curves

    def singular_values(self) -> dict[str, list[float]]:
        """Singular values by base relative to the largest, averaged over modules and tasks."""
        curves: dict[str, list[Sequence[float]]] = defaultdict(list)
        for row in (self.comparison.get("spectrum") or {}).get("changes") or []:
            if row["values"] and row["values"][0] > 0:
                curves[row["base"]].append([value / row["values"][0] for value in row["values"]])
        return {base: _ragged_mean(members) for base, members in curves.items()}


def _by_task(cells: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """The means over the seeds of {(task, seed): value}."""
    by_task: dict[str, list[float]] = defaultdict(list)
    for (task, _), value in sorted(cells.items()):
        by_task[task].append(value)
    return {task: sum(values) / len(values) for task, values in by_task.items()}


def _ragged_mean(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean at each index over the curves that are long enough."""
    longest = max(len(curve) for curve in curves)
    columns = [[curve[i] for curve in curves if i < len(curve)] for i in range(longest)]
    return [sum(column) / len(column) for column in columns]
