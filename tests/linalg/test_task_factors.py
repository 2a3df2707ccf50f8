"""Models of many tasks: posteriors against the dense Gaussian, and one-hot features as inputs."""

from __future__ import annotations

import numpy as np
import pytest

from foretune.linalg.task_factors import TaskFactors, fit_factors
from foretune.linalg.task_levels import TaskLevels, fit_levels
from foretune.linalg.task_moments import FeatureMoments, SharedInputMoments
from foretune.linalg.task_ridge import TaskRidge, fit_ridge

T, D, K = 120, 20, 2


def table(rng, *, rank=K, noise=0.3, outputs=1):
    """(tasks, inputs, y) of rows in which tasks answer half of D inputs."""
    tasks = np.repeat(np.arange(T), D // 2)
    inputs = np.concatenate([rng.permutation(D)[: D // 2] for _ in range(T)])
    z, directions = rng.normal(size=(T, rank)), rng.normal(size=(outputs, D, rank))
    means, offsets = rng.normal(size=(outputs, D)), 0.5 * rng.normal(size=(outputs, T))
    y = means[:, inputs] + offsets[:, tasks] + (directions[:, inputs] * z[tasks]).sum(-1)
    return tasks, inputs, y.T + noise * rng.normal(size=(len(tasks), outputs))


def both_moments(rng, **options):
    tasks, inputs, y = table(rng, **options)
    shared = SharedInputMoments.of(tasks, inputs, y, (T, D))
    one_hot = FeatureMoments.of(tasks, np.eye(D)[inputs], y, T, np.ones(D))
    return shared, one_hot, (tasks, inputs, y)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_task_s_posterior_is_that_of_the_dense_gaussian(outputs: int) -> None:
    rng = np.random.default_rng(0)
    shared, one_hot, (tasks, inputs, y) = both_moments(rng, outputs=outputs)
    factors = TaskFactors(
        mean=rng.normal(size=(outputs, D)),
        directions=rng.normal(size=(outputs, D, K)),
        constant=np.ones(D),
        offset=0.7,
        noise=0.2,
        variances=np.ones(1 + K),
    )
    rows = tasks == 3
    design, targets = [], []
    for c in range(outputs):
        b = np.zeros((rows.sum(), outputs))
        b[:, c] = 0.7
        design.append(np.concatenate([b, factors.directions[c][inputs[rows]]], 1))
        targets.append(y[rows, c] - factors.mean[c][inputs[rows]])
    a, target = np.concatenate(design), np.concatenate(targets)
    covariance = np.linalg.inv(np.eye(outputs + K) + a.T @ a / 0.2)
    for moments in (shared, one_hot):
        means, covariances = factors.posterior(moments)
        np.testing.assert_allclose(covariances[3], covariance)
        np.testing.assert_allclose(means[3], covariance @ a.T @ target / 0.2)


@pytest.mark.parametrize("outputs", [1, 3])
def test_shared_inputs_are_one_hot_features(outputs: int) -> None:
    shared, one_hot, _ = both_moments(np.random.default_rng(1), outputs=outputs)
    first, second = (fit_factors(moments, K, updates=8) for moments in (shared, one_hot))
    for name in ("mean", "directions", "offset", "noise", "variances"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), atol=1e-8)


def log_likelihood(factors: TaskFactors, tasks, inputs, y) -> float:
    total = 0.0
    for task in range(T):
        items = inputs[tasks == task]
        error = y[tasks == task, 0] - factors.mean[0][items]
        shifts = factors.directions[0][items]
        covariance = shifts @ shifts.T + factors.offset**2 + factors.noise * np.eye(len(items))
        _, logdet = np.linalg.slogdet(covariance)
        total -= (logdet + error @ np.linalg.solve(covariance, error)) / 2
    return total


def test_updates_raise_the_likelihood_and_find_noise_and_offsets() -> None:
    shared, _, rows = both_moments(np.random.default_rng(2))
    fits = [fit_factors(shared, K, updates=n) for n in (1, 5, 20, 80)]
    likelihoods = [log_likelihood(fit, *rows) for fit in fits]
    assert likelihoods == sorted(likelihoods)
    assert fits[-1].noise == pytest.approx(0.3**2, rel=0.5)
    assert fits[-1].offset == pytest.approx(0.5, rel=0.5)


def test_a_fit_goes_on_from_one_of_lower_rank() -> None:
    shared, _, rows = both_moments(np.random.default_rng(3))
    start = fit_factors(shared, 0, updates=10)
    assert start.rank == 0
    assert log_likelihood(fit_factors(shared, K, start=start), *rows) > log_likelihood(start, *rows)


def test_without_offsets_there_are_none() -> None:
    shared, _, _ = both_moments(np.random.default_rng(4))
    assert fit_factors(shared, 1, offset=False).offset == 0


def test_ridge_of_a_task_is_the_closed_form() -> None:
    rng = np.random.default_rng(5)
    tasks, phi = np.repeat(np.arange(T), 9), rng.normal(size=(T * 9, D))
    y, mean = rng.normal(size=(T * 9, 2)), rng.normal(size=(2, D))
    moments = FeatureMoments.of(tasks, phi, y, T, np.zeros(D))
    ridge = TaskRidge(mean, np.full(D, 0.4), 0.1)
    own, target = phi[tasks == 5], y[tasks == 5] - phi[tasks == 5] @ mean.T
    expected = np.linalg.solve(own.T @ own + 0.1 / 0.4 * np.eye(D), own.T @ target)
    np.testing.assert_allclose(ridge.posterior(moments)[0][5], expected)


def test_ridge_finds_how_far_tasks_are_from_the_mean() -> None:
    rng = np.random.default_rng(6)
    tasks, phi = np.repeat(np.arange(200), 10), rng.normal(size=(2000, 4))
    phi[:, 0] = 1
    mean, shifts = rng.normal(size=4), rng.normal(size=(200, 4)) * [2.0, 0.5, 0.5, 0.5]
    y = phi @ mean + (phi * shifts[tasks]).sum(1) + 0.3 * rng.normal(size=2000)
    moments = FeatureMoments.of(tasks, phi, y[:, None], 200, np.eye(4)[0])
    ridge = fit_ridge(moments, mean[None], updates=50)
    assert ridge.variances == pytest.approx([4, 0.25, 0.25, 0.25], rel=0.3)
    assert ridge.noise == pytest.approx(0.09, rel=0.2)


def levelled(num_tasks: int = 400, num_rows: int = 30):
    """(common, labels, tasks) of tasks that shift common probabilities by their levels."""
    rng = np.random.default_rng(7)
    tasks = np.repeat(np.arange(num_tasks), num_rows)
    common = rng.dirichlet([1, 1, 1], size=len(tasks))
    shifts = 1.5 * rng.normal(size=(num_tasks, 3))
    p = TaskLevels(slope=0.8).probabilities(common, shifts[tasks])
    labels = (p.cumsum(1) < rng.random((len(tasks), 1))).sum(1)
    return common, labels, tasks


def test_levels_are_the_mode_of_their_posterior() -> None:
    common, labels, tasks = levelled(num_tasks=3)
    levels = TaskLevels(slope=0.8, variance=2.0)
    shifts = levels.shifts(common, labels, tasks, np.zeros((3, 3)), steps=400)
    p = levels.probabilities(common, shifts[tasks])
    for task in range(3):
        errors = (np.eye(3)[labels] - p)[tasks == task].sum(0)
        np.testing.assert_allclose(errors - shifts[task] / 2.0, 0, atol=1e-8)


def test_slope_and_spread_of_levels_are_found() -> None:
    common, labels, tasks = levelled()
    levels = fit_levels(common, labels, tasks, 400)
    assert levels.slope == pytest.approx(0.8, rel=0.1)
    assert levels.variance == pytest.approx(1.5**2, rel=0.35)
