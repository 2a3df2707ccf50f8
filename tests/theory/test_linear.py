"""The linear experiment: gradients, closed forms, and what the paper's theorems say."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from foretune.theory import linear
from foretune.theory.linear import Moments, Problems, Solution

NOISE = 0.01


@cache
def problem(num_tasks: int = 3) -> Problems:
    return linear.draw_problems(range(3), num_tasks=num_tasks, noise=NOISE)


@cache
def base(name: str, num_tasks: int = 3) -> np.ndarray:
    drawn = problem(num_tasks)
    return linear.standard(drawn.seen) if name == "SR" else linear.peft_ml(drawn, 1, 1500).a


def error(name: str, rank: int, num_tasks: int = 3) -> float:
    drawn = problem(num_tasks)
    shots = linear.draw_shots(drawn, 100, NOISE)
    adapted = base(name, num_tasks) + linear.adapt_exactly(base(name, num_tasks), shots, rank)
    return float(np.median(linear.error(adapted, drawn.unseen_weight)))


def ranks(name: str, num_tasks: int) -> list[int]:
    values = np.linalg.svd(base(name, num_tasks) - problem(num_tasks).shared, compute_uv=False)
    return [int((values_of_seed > 0.01).sum()) for values_of_seed in values]


def solution(symmetric: bool) -> tuple[Solution, Moments]:
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 2, 3, 4, 2))
    x, y = rng.normal(size=(2, 2, 3, 4, 20))
    moments = Moments(x @ x.mT / 20, y @ x.mT / 20)
    return Solution(rng.normal(size=(2, 4, 4)), u, None if symmetric else v), moments


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_loss(symmetric: bool) -> None:
    point, seen = solution(symmetric)
    a, u = (torch.tensor(p, requires_grad=True) for p in (point.a, point.u))
    v = u if symmetric else torch.tensor(point.v, requires_grad=True)
    w = a[:, None] + u @ v.mT
    s, c = torch.tensor(seen.s), torch.tensor(seen.c)
    per_task = ((0.5 * w @ s - c) * w).sum((-2, -1))
    assert np.allclose(per_task.mean(1).detach(), linear.loss(linear.weights_of(point), seen))
    by_hand = linear.gradients(point, seen)
    [grad_a] = torch.autograd.grad(per_task.mean(1).sum(), [a], retain_graph=True)
    adapter_grads = torch.autograd.grad(per_task.sum(), [u] if symmetric else [u, v])
    assert all(
        np.allclose(gradient, automatic)
        for gradient, automatic in zip(by_hand, [grad_a, *adapter_grads, None], strict=False)
        if automatic is not None
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_outer_step_is_the_published_one(symmetric: bool) -> None:
    drawn = problem()
    start = linear.peft_ml(drawn, 1, 0, symmetric=symmetric)
    point = start
    for _ in range(10):
        _, grad_u, grad_v = linear.gradients(point, drawn.seen)
        v = None if point.v is None else point.v - 0.003 * grad_v
        point = Solution(point.a, point.u - 0.003 * grad_u, v)
    a = point.a - 0.03 * linear.gradients(point, drawn.seen)[0]
    fast = linear.peft_ml(drawn, 1, 1, symmetric=symmetric)
    assert np.allclose(fast.u, point.u, rtol=1e-10)
    assert np.allclose(fast.a, a, rtol=1e-10)


def test_moments_are_those_of_many_examples() -> None:
    shots = linear.draw_shots(problem(), 200_000, NOISE)
    assert np.allclose(shots.s, np.eye(10), atol=0.02)
    assert np.allclose(shots.c, problem().unseen_weight @ shots.s, atol=1e-3)


def test_problems_of_a_batch_are_those_of_single_runs() -> None:
    alone = linear.draw_problems([2], noise=NOISE)
    assert np.array_equal(alone.seen.s[0], problem().seen.s[2])
    single, batch = linear.peft_ml(alone, 1, 20), linear.peft_ml(problem(), 1, 20)
    assert np.allclose(single.a[0], batch.a[2], rtol=1e-12)


def test_the_truth_does_not_change_with_the_number_of_tasks() -> None:
    assert np.array_equal(problem(2).unseen_weight, problem(3).unseen_weight)
    assert np.array_equal(problem(2).seen_weights, problem(3).seen_weights[:, :2])


def test_standard_is_least_squares_of_the_pooled_examples() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 3, 4, 50))
    pooled = np.linalg.lstsq(np.hstack(list(x)).T, np.hstack(list(y)).T)[0].T
    moments = Moments((x @ x.mT / 50)[None], (y @ x.mT / 50)[None])
    assert np.allclose(linear.standard(moments)[0], pooled)


def test_reduced_rank_regression_is_no_worse_than_brute_force() -> None:
    """For d = 2 and rank 1 every direction of the row space is tried."""
    rng = np.random.default_rng(2)
    x, y, a = rng.normal(size=(2, 30)), rng.normal(size=(2, 30)), rng.normal(size=(2, 2))
    rest = y - a @ x

    def squares(change: np.ndarray) -> float:
        return float(((change @ x - rest) ** 2).sum())

    def best(angle: float) -> float:
        z = np.array([np.cos(angle), np.sin(angle)]) @ x
        return squares(np.outer(rest @ z / (z @ z), [np.cos(angle), np.sin(angle)]))

    exact = linear.adapt_exactly(a, Moments(x @ x.T / 30, y @ x.T / 30), 1)
    assert np.linalg.matrix_rank(exact) == 1
    assert squares(exact) == pytest.approx(min(map(best, np.linspace(0, np.pi, 20_001))), rel=1e-6)


@pytest.mark.parametrize(("name", "rank"), [("ML", 1), ("SR", 1), ("SR", 4)])
def test_descent_ends_at_the_closed_form(name: str, rank: int) -> None:
    shots = linear.draw_shots(problem(), 100, NOISE)
    exact = linear.adapt_exactly(base(name), shots, rank)
    [by_descent] = linear.adapt_by_descent(base(name), shots, rank, [20_000], range(3))
    assert np.allclose(by_descent, exact, atol=1e-3)


def test_fewer_examples_than_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer examples"):
        linear.adapt_exactly(base("SR"), linear.draw_shots(problem(), 8, NOISE), 1)


def test_peft_ml_reaches_the_rate_of_the_theory() -> None:
    assert error("ML", 1) < 2 * linear.expected_error(10, 1, 100, NOISE) < 1e-4


def test_standard_retraining_stays_on_its_floor() -> None:
    floor = np.median(linear.floor(base("SR"), problem().unseen_weight, 1))
    assert 10 < floor < error("SR", 1) < 1.2 * floor


def test_standard_retraining_is_off_by_rank_k_times_tasks() -> None:
    assert ranks("SR", 3) == [3] * 3
    assert ranks("SR", 2) == [2] * 3


def test_peft_ml_is_off_by_rank_2k_with_two_tasks_and_by_nothing_with_three() -> None:
    assert max(ranks("ML", 2)) == 2
    assert ranks("ML", 3) == [0] * 3
    assert linear.error(base("ML"), problem().shared).max() < 1e-5


def test_standard_retraining_needs_k_times_tasks_plus_one() -> None:
    errors = [error("SR", rank) for rank in range(1, 5)]
    assert all(lower_rank > higher_rank for lower_rank, higher_rank in pairwise(errors))
    assert errors[2] > 1e-1
    assert errors[3] < 1e-3


def test_two_tasks_at_rank_3k_tell_nothing() -> None:
    assert error("ML", 3, 2) < 1e-3
    assert error("SR", 3, 2) < 1e-3


def test_without_adapters_peft_ml_would_be_standard_retraining() -> None:
    """What the acceptance numbers would say if the adapters were dropped from the forward."""
    drawn = problem()
    nothing = np.zeros((3, 3, 10, 1))
    broken = linear.peft_ml(drawn, 1, 1500, start=Solution(0 * drawn.shared, nothing, None))
    assert np.allclose(broken.a, base("SR"), atol=1e-2)
    assert linear.error(broken.a, drawn.shared).min() > 1


def test_zero_mean_offsets_need_asymmetric_adapters() -> None:
    drawn = linear.draw_problems(range(2), noise=NOISE, offsets="zero-mean")
    off = {
        symmetric: linear.error(linear.peft_ml(drawn, 1, 1500, symmetric=symmetric).a, drawn.shared)
        for symmetric in (True, False)
    }
    assert off[False].max() < 1e-4
    assert off[True].min() > 1
