"""Labels of many tasks as pooled coefficients, an offset and a low-rank difference per task.

    y = φᵀ(m + Σ_k z_k l_k) + b + ε,    z ~ N(0, I), b ~ N(0, τ²), ε ~ N(0, σ²)

with coefficients m and directions l_k of all tasks, z and b of one task, and the features φ of a
row. Where tasks share their inputs, φ says which input it is (`SharedInputMoments`): m is then a
number per input, and the model a biased matrix factorisation. Several outputs have an m, l and b
each, and share z.

Fitted by EM as a random-effects model (Laird and Ware, "Random-Effects Models for Longitudinal
Data", Biometrics 1982), which with shared inputs is probabilistic PCA with missing values (Tipping
and Bishop, JRSS B 1999). z is whitened after every update (parameter expansion: Liu, Rubin and Wu,
Biometrika 1998); m and each l_k have Gaussian priors whose variances are estimated as well
(MacKay, "Bayesian Interpolation", Neural Computation 1992).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foretune.linalg.task_moments import Array, Moments

FIRST_VARIANCE = 0.05  # of a new direction's entries, with targets of about unit variance
LEAST_VARIANCE = 1e-9  # a direction with this prior variance is zero
LEAST_NOISE = 1e-4


@dataclass(frozen=True)
class TaskFactors:
    """The coefficients of all tasks, and how those of a task differ from them.

    Args:
        mean: (C, D) m.
        directions: (C, D, k) the l_k.
        constant: (D,) `Moments.constant`.
        offset: τ; 0 without offsets.
        noise: σ².
        variances: (1 + k,) prior variances of the entries of m and of each l_k.
    """

    mean: Array
    directions: Array
    constant: Array
    offset: float
    noise: float
    variances: Array

    @property
    def rank(self) -> int:
        """Number of directions, k."""
        return self.directions.shape[2]

    def loadings(self, output: int) -> Array:
        """(D, C + k) what multiplies a task's (b / τ, z) in the coefficients of an output."""
        num_outputs, num_features, rank = self.directions.shape
        loadings = np.zeros((num_features, num_outputs + rank))
        loadings[:, output] = self.offset * self.constant
        loadings[:, num_outputs:] = self.directions[output]
        return loadings

    def posterior(self, moments: Moments) -> tuple[Array, Array]:
        """Mean (T, C + k) and covariance (T, C + k, C + k) of (b / τ, z) after each task's rows."""
        outputs = range(moments.num_outputs)
        loadings = [self.loadings(output) for output in outputs]
        precision = np.eye(loadings[0].shape[1])
        pull = np.zeros((len(moments.rows), len(precision)))
        for output in outputs:
            precision = precision + moments.quadratic(loadings[output]) / self.noise
            pull += moments.residuals(loadings[output], self.mean[output], output) / self.noise
        covariance = np.asarray(np.linalg.inv(precision), dtype=np.float64)
        mean = np.einsum("tab,tb->ta", covariance, pull)
        return np.asarray(mean, dtype=np.float64), covariance


def fit_factors(
    moments: Moments,
    rank: int,
    *,
    start: TaskFactors | None = None,
    offset: bool = True,
    updates: int = 20,
    seed: int = 0,
) -> TaskFactors:
    """The model of this rank after a number of EM updates.

    Args:
        moments: Of the tasks to fit to.
        rank: k.
        start: A model of at most this rank to go on from.
        offset: Whether tasks have offsets.
        updates: Number of EM updates.
        seed: Random seed of the directions that `start` lacks.
    """
    num_features, num_outputs = len(moments.constant), moments.num_outputs
    if start is None:
        num_rows = moments.rows.sum()
        noise = moments.squares.sum() / (num_rows * num_outputs)
        start = TaskFactors(
            mean=np.zeros((num_outputs, num_features)),
            directions=np.zeros((num_outputs, num_features, 0)),
            constant=moments.constant,
            offset=0.3 * noise**0.5 if offset else 0.0,
            noise=noise,
            variances=np.array([noise]),
        )
    new = rank - start.rank
    variance = FIRST_VARIANCE * start.noise
    drawn = np.random.default_rng(seed).normal(size=(num_outputs, num_features, new))
    factors = TaskFactors(
        mean=start.mean,
        directions=np.concatenate([start.directions, variance**0.5 * drawn], 2),
        constant=start.constant,
        offset=start.offset,
        noise=start.noise,
        variances=np.concatenate([start.variances, np.full(new, variance)]),
    )
    for _ in range(updates):
        factors = _updated(factors, moments)
    return factors


def _updated(factors: TaskFactors, moments: Moments) -> TaskFactors:
    """The model after one EM update."""
    num_outputs, num_rows = moments.num_outputs, moments.rows.sum()
    means, covariances = factors.posterior(moments)
    second = covariances + means[:, :, None] * means[:, None, :]
    # m is one more direction, whose z is 1 in every task
    z = np.concatenate([np.ones((len(means), 1)), means[:, num_outputs:]], 1)
    products = z[:, :, None] * z[:, None, :]
    products[:, 1:, 1:] = second[:, num_outputs:, num_outputs:]
    grams = moments.grams(products.reshape(len(z), -1))
    grams = grams.reshape(*products.shape[1:], *grams.shape[1:])

    targets = np.stack([moments.products(z, output) for output in range(num_outputs)], 1)
    levels = targets[0] @ moments.constant / num_rows
    squares, offset_variance = moments.squares.sum(), 0.0
    for output in range(num_outputs):
        offsets = factors.offset * means[:, [output]]
        offset_squares = factors.offset**2 * second[:, output, output]
        squares += moments.rows @ offset_squares
        squares -= 2 * moments.products(offsets, output)[0] @ moments.constant
        offset_variance += offset_squares.mean() / num_outputs
        both = np.concatenate([offsets, factors.offset * second[:, output, num_outputs:]], 1)
        targets[:, output] -= moments.apply(moments.grams(both), moments.constant)

    directions, variances, num_fitted = _regression(factors, moments, grams, targets, levels)
    squares += sum(
        np.vdot(direction, _fitted(moments, row, directions) - 2 * target)
        for direction, row, target in zip(directions, grams, targets, strict=True)
    )
    noise = squares / (num_rows * num_outputs) + factors.noise * num_fitted / num_rows
    # With z white and of mean 0 its prior is the right one.
    mean_z = z[:, 1:].mean(0)
    spread = products[:, 1:, 1:].mean(0) - np.outer(mean_z, mean_z)
    root = np.linalg.cholesky(spread + LEAST_VARIANCE * np.eye(len(spread)))
    return TaskFactors(
        mean=directions[0] + np.tensordot(mean_z, directions[1:], 1),
        directions=np.tensordot(directions[1:], root, (0, 0)),
        constant=factors.constant,
        offset=offset_variance**0.5,
        noise=max(float(noise), LEAST_NOISE),
        variances=variances * np.concatenate([[1.0], np.diag(spread)]),
    )


def _regression(
    factors: TaskFactors, moments: Moments, grams: Array, targets: Array, levels: Array
) -> tuple[Array, Array, float]:
    """Fits m and the directions to the targets, one after the other.

    Args:
        factors: The model before.
        moments: Of the tasks.
        grams: (1 + k, 1 + k, …) Grams weighted by the products of z.
        targets: (1 + k, C, D) sums of z φ (y − b).
        levels: (C,) means of y: without a reason to be another, an entry of m is the constant's.

    Returns:
        (1 + k, C, D) m and directions, (1 + k,) variances of their entries, and the number of
        entries that the data determine.
    """
    directions = np.concatenate([factors.mean[None], factors.directions.transpose(2, 0, 1)])
    variances, num_fitted = np.empty(len(directions)), 0.0
    prior_means = np.zeros_like(directions)
    prior_means[0] = np.outer(levels, moments.constant)
    for j, row in enumerate(grams):
        others = directions.copy()
        others[j] = 0
        ridge = factors.noise / max(factors.variances[j], LEAST_VARIANCE)
        target = targets[j] - _fitted(moments, row, others) + ridge * prior_means[j]
        directions[j], inverse = moments.solve(row[j], ridge, target)
        deviations = (directions[j] - prior_means[j]) ** 2 + factors.noise * inverse
        variances[j] = deviations.mean()
        num_fitted += len(inverse) - ridge * inverse.sum()
    return directions, variances, num_fitted


def _fitted(moments: Moments, grams: Array, directions: Array) -> Array:
    """(C, D) sum of Gram times direction, for Grams (1 + k, …) and directions (1 + k, C, D)."""
    terms = [moments.apply(gram, d) for gram, d in zip(grams, directions, strict=True)]
    return np.sum(terms, axis=0)
