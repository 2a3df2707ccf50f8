"""`LabelledInputs`: the rows of tasks as the arrays that the measurement of conflict reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foretune.linalg.task_moments import Array, FeatureMoments, Moments, SharedInputMoments

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class LabelledInputs:
    """Rows of tasks with C targets each.

    An example is one row, or it is a row per candidate of which one is right: the candidates of a
    choice, or the labels of its task where tasks have labels of their own. A unit is what has
    coefficients of its own: a task, or then one label of a task.

    Args:
        units: (n,) unit of each row.
        unit_tasks: (U,) task of each unit, in ascending order.
        examples: (n,) example of each row, in ascending order.
        targets: (n, C): −1 or 1 for two labels, one-hot for more, the `y` of a regression, and with
            candidates 1 for the right one, less the example's mean.
        learnable: (examples,) whether an example may be learnt from; others are only scored.
        labels: (examples,) index of the example's label; zeros where there are none.
        allowed: (T, C) labels of each task; None where all tasks have the same.
        inputs: (n,) index of the row's input where tasks share them, else None.
        features: (n, D) features, the first of them 1, or for choices the cosine; None with
            `inputs`.
        shared: Share of the rows whose input several other tasks answer.
        has_classes: Whether targets are labels that tasks share.
        candidates: What the rows of an example are: "responses" of a choice, "labels", or None.
    """

    units: Indices
    unit_tasks: Indices
    examples: Indices
    targets: Array
    learnable: NDArray[np.bool_]
    labels: Indices
    allowed: NDArray[np.bool_] | None
    inputs: Indices | None
    features: Array | None
    shared: float
    has_classes: bool = False
    candidates: str | None = None

    @property
    def num_tasks(self) -> int:
        """T."""
        return int(self.unit_tasks[-1]) + 1

    @property
    def tasks(self) -> Indices:
        """(n,) task of each row."""
        return self.unit_tasks[self.units]

    @property
    def constant(self) -> Array:
        """(D,) coefficients that give 1 on every row; zeros for choices."""
        if self.features is None:
            return np.ones(self._num_inputs)
        constant = np.zeros(self.features.shape[1])
        constant[0] = self.candidates != "responses"
        return constant

    @property
    def _num_inputs(self) -> int:
        assert self.inputs is not None
        return int(self.inputs.max()) + 1

    def moments(self, rows: Indices) -> Moments:
        """The moments of these rows, of all units."""
        units, y = self.units[rows], self.targets[rows]
        if self.features is None:
            assert self.inputs is not None
            shape = (len(self.unit_tasks), self._num_inputs)
            return SharedInputMoments.of(units, self.inputs[rows], y, shape)
        features = self.features[rows]
        return FeatureMoments.of(units, features, y, len(self.unit_tasks), self.constant)

    def project(self, weights: Array, rows: Indices) -> Array:
        """(rows, m) φᵀweights for weights (D, m)."""
        if self.features is None:
            assert self.inputs is not None
            return weights[self.inputs[rows]]
        return self.features[rows] @ weights

    def places_of_labels(self, rows: Indices) -> Indices:
        """(rows,) index of each row's label, where targets are labels."""
        targets = self.targets[rows]
        if targets.shape[1] == 1:
            return (targets[:, 0] > 0).astype(int)
        return targets.argmax(1)

    def hits(self, predicted: Array, rows: Indices) -> Array:
        """(examples,) whether the predicted label is right; of k equal choices 1/k is.

        Args:
            predicted: (rows, C) predicted targets.
            rows: All rows of some examples, in ascending order.
        """
        targets = self.targets[rows]
        if self.candidates:
            starts, right = self._starts(rows), targets[:, 0] > 0
            of_right = np.add.reduceat(np.where(right, predicted[:, 0], 0), starts)
            best = np.maximum.reduceat(predicted[:, 0], starts)
            of_example = np.repeat(np.arange(len(starts)), np.diff([*starts, len(rows)]))
            ties = np.add.reduceat(predicted[:, 0] == best[of_example], starts, dtype=float)
            return (of_right == best) / ties
        if targets.shape[1] == 1:
            return ((predicted > 0) == (targets > 0))[:, 0].astype(float)
        if self.allowed is not None:
            predicted = np.where(self.allowed[self.tasks[rows]], predicted, -np.inf)
        return (predicted.argmax(1) == targets.argmax(1)).astype(float)

    def example_sums(self, values: Array, rows: Indices) -> Array:
        """(examples,) sums of (rows, C) values over the rows of each example."""
        return np.add.reduceat(values.sum(1), self._starts(rows))

    def task_means(self, values: Array, rows: Indices) -> Array:
        """(T,) means of (examples,) values over the examples of each task; 0 without any."""
        tasks = self.tasks[rows][self._starts(rows)]
        sums = np.bincount(tasks, values, minlength=self.num_tasks)
        return sums / np.maximum(np.bincount(tasks, minlength=self.num_tasks), 1)

    def num_examples(self, rows: Indices) -> Indices:
        """(T,) number of examples of each task that these rows belong to."""
        return np.bincount(self.tasks[rows][self._starts(rows)], minlength=self.num_tasks)

    def draw(
        self, shots: int | None, most: float, rng: np.random.Generator
    ) -> tuple[Indices, Indices]:
        """(rows to learn from, rows to score) of each task.

        Args:
            shots: Examples, per class where there are classes; None for as many as can be spared.
            most: Share of a task's examples that can be spared.
            rng: Draws the examples.
        """
        starts = self._starts(np.arange(len(self.tasks)))
        tasks = self.tasks[starts]
        learnt = np.zeros(len(tasks), dtype=bool)
        scored = np.ones(len(tasks), dtype=bool)
        for examples in np.split(np.arange(len(tasks)), np.flatnonzero(np.diff(tasks)) + 1):
            order = rng.permutation(examples[self.learnable[examples]])
            if shots is not None:
                labels = self.labels[order]
                rank = np.zeros(len(order), dtype=int)
                for label in np.unique(labels):
                    rank[labels == label] = np.arange((labels == label).sum())
                order = order[rank < shots]
            # The candidates of one split may be drawn from few responses; another has others.
            if self.candidates == "responses" and not self.learnable[examples].all():
                scored[examples] = ~self.learnable[examples]
            else:
                order = order[: int(most * len(examples))]
            learnt[order] = True
        scored &= ~learnt
        return np.flatnonzero(learnt[self.examples]), np.flatnonzero(scored[self.examples])

    def _starts(self, rows: Indices) -> Indices:
        """The places in `rows` at which examples begin."""
        return np.flatnonzero(np.diff(self.examples[rows], prepend=-1))
