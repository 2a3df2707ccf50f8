"""The sums over each task's rows from which linear models of many tasks are fitted."""

from __future__ import annotations

from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Array = NDArray[np.float64]


class Moments(Protocol):
    """The sums over each task's rows from which a model is fitted: T tasks, D features, C outputs.

    A Gram is a sum of φφᵀ over rows: (D, D), or only the diagonal, (D,), where that is all of it.

    Attributes:
        constant: (D,) coefficients with which φᵀconstant = 1 on every row; zeros if there are none.
        squares: (T,) sums of y² over rows and outputs.
        rows: (T,) numbers of rows.
    """

    constant: Array
    squares: Array
    rows: Array

    @property
    def num_outputs(self) -> int:
        """C."""
        ...

    def subset(self, tasks: NDArray[Any]) -> Self:
        """The moments of these tasks, by index or mask."""
        ...

    def quadratic(self, loadings: Array) -> Array:
        """(T, q, q) sums of (loadingsᵀφ)(loadingsᵀφ)ᵀ for loadings (D, q)."""
        ...

    def residuals(self, loadings: Array, mean: Array, output: int) -> Array:
        """(T, q) sums of loadingsᵀφ (y − φᵀmean) for one output, with mean (D,)."""
        ...

    def grams(self, weights: Array) -> Array:
        """(m, …) Grams over all rows, weighted by task with weights (T, m)."""
        ...

    def apply(self, gram: Array, vectors: Array) -> Array:
        """(…, D) Gram times each of the vectors (…, D); of several Grams (m, …), each times it."""
        ...

    def solve(self, gram: Array, ridge: float, target: Array) -> tuple[Array, Array]:
        """(Gram + ridge)⁻¹ target, (C, D) like the target, and (D,) the inverse's diagonal."""
        ...

    def products(self, weights: Array, output: int) -> Array:
        """(m, D) sums of φ y over all rows, weighted by task with weights (T, m)."""
        ...


class SharedInputMoments:
    """Moments of rows whose input is one of D that tasks share.

    Args:
        counts: (T, D) rows of each task with each input.
        sums: For each output (T, D) sums of y.
        squares: (T,) sums of y² over rows and outputs.
    """

    def __init__(
        self, counts: sparse.csr_array, sums: list[sparse.csr_array], squares: Array
    ) -> None:
        self.counts, self.sums, self.squares = counts, sums, squares
        self.rows = np.asarray(counts.sum(axis=1), dtype=float)
        self.constant = np.ones(counts.shape[1])

    @classmethod
    def of(
        cls, tasks: NDArray[np.intp], inputs: NDArray[np.intp], y: Array, shape: tuple[int, int]
    ) -> Self:
        """The moments of rows.

        Args:
            tasks: (n,) task of each row.
            inputs: (n,) input of each row.
            y: (n, C) targets.
            shape: (T, D).
        """

        def table(values: Array) -> sparse.csr_array:
            return sparse.csr_array((values, (tasks, inputs)), shape=shape)

        squares = np.bincount(tasks, (y**2).sum(1), minlength=shape[0]).astype(float)
        return cls(table(np.ones(len(tasks))), [table(column) for column in y.T], squares)

    @property
    def num_outputs(self) -> int:
        """As in `Moments`."""
        return len(self.sums)

    def subset(self, tasks: NDArray[Any]) -> Self:
        """As in `Moments`."""
        return type(self)(self.counts[tasks], [s[tasks] for s in self.sums], self.squares[tasks])

    def quadratic(self, loadings: Array) -> Array:
        """As in `Moments`."""
        q = loadings.shape[1]
        outer = (loadings[:, :, None] * loadings[:, None, :]).reshape(-1, q * q)
        return (self.counts @ outer).reshape(-1, q, q)

    def residuals(self, loadings: Array, mean: Array, output: int) -> Array:
        """As in `Moments`."""
        return self.sums[output] @ loadings - self.counts @ (mean[:, None] * loadings)

    def grams(self, weights: Array) -> Array:
        """As in `Moments`."""
        return (self.counts.T @ weights).T

    def apply(self, gram: Array, vectors: Array) -> Array:
        """As in `Moments`."""
        return gram * vectors

    def solve(self, gram: Array, ridge: float, target: Array) -> tuple[Array, Array]:
        """As in `Moments`."""
        inverse = 1 / (gram + ridge)
        return target * inverse, inverse

    def products(self, weights: Array, output: int) -> Array:
        """As in `Moments`."""
        return (self.sums[output].T @ weights).T


class FeatureMoments:
    """Moments of rows with D features.

    Args:
        gram: (T, D, D) sums of φφᵀ.
        sums: (T, D, C) sums of φ y.
        squares: (T,) sums of y² over rows and outputs.
        rows: (T,) numbers of rows.
        constant: (D,) coefficients with which φᵀconstant = 1 on every row, or zeros.
    """

    def __init__(
        self, gram: Array, sums: Array, squares: Array, rows: Array, constant: Array
    ) -> None:
        self.gram, self.sums, self.squares, self.rows = gram, sums, squares, rows
        self.constant = constant

    @classmethod
    def of(
        cls, tasks: NDArray[np.intp], features: Array, y: Array, num_tasks: int, constant: Array
    ) -> Self:
        """The moments of rows.

        Args:
            tasks: (n,) task of each row.
            features: (n, D) φ of each row.
            y: (n, C) targets.
            num_tasks: T.
            constant: (D,) coefficients with which φᵀconstant = 1 on every row, or zeros.
        """
        order = np.argsort(tasks, kind="stable")
        starts = np.searchsorted(tasks[order], np.arange(num_tasks + 1))
        num_features = features.shape[1]
        gram = np.zeros((num_tasks, num_features, num_features))
        sums = np.zeros((num_tasks, num_features, y.shape[1]))
        for task in range(num_tasks):
            of_task = order[starts[task] : starts[task + 1]]
            phi = features[of_task]
            gram[task], sums[task] = phi.T @ phi, phi.T @ y[of_task]
        squares = np.bincount(tasks, (y**2).sum(1), minlength=num_tasks).astype(float)
        return cls(gram, sums, squares, np.diff(starts).astype(float), constant)

    @property
    def num_outputs(self) -> int:
        """As in `Moments`."""
        return self.sums.shape[2]

    def subset(self, tasks: NDArray[Any]) -> Self:
        """As in `Moments`."""
        parts = (self.gram[tasks], self.sums[tasks], self.squares[tasks], self.rows[tasks])
        return type(self)(*parts, self.constant)

    def quadratic(self, loadings: Array) -> Array:
        """As in `Moments`."""
        return loadings.T @ (self.gram @ loadings)

    def residuals(self, loadings: Array, mean: Array, output: int) -> Array:
        """As in `Moments`."""
        return (self.sums[:, :, output] - self.gram @ mean) @ loadings

    def grams(self, weights: Array) -> Array:
        """As in `Moments`."""
        size = self.gram.shape[1:]
        return (weights.T @ self.gram.reshape(len(self.gram), -1)).reshape(-1, *size)

    def apply(self, gram: Array, vectors: Array) -> Array:
        """As in `Moments`."""
        return vectors @ gram

    def solve(self, gram: Array, ridge: float, target: Array) -> tuple[Array, Array]:
        """As in `Moments`."""
        inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
        return target @ inverse, np.diag(inverse)

    def products(self, weights: Array, output: int) -> Array:
        """As in `Moments`."""
        return weights.T @ self.sums[:, :, output]
