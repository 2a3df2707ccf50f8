"""The linear experiment: a batch of problems, solved from the second moments of their data.

Paper: Block et al., "Meta-Learning Adaptable Foundation Models", 2024, arXiv:2410.22264.

    y = (A* + R_t*) x + noise,   x ~ N(0, I_d),   R_t* = U_t* U_t*ᵀ of rank k,   t = 1..T

    symbol      here           shape           meaning
    A*          shared         (B, d, d)       symmetric weight that all tasks of a problem share
    A* + R_t*   seen_weights   (B, T, d, d)    true weight of each seen task
    A* + R_T+1* unseen_weight  (B, d, d)       true weight of the unseen task
    A           a              (B, d, d)       the base
    U_t, V_t    u, v           (B, T, d, k)    adapters; V_t is U_t if adapters are symmetric
    X Xᵀ / N    s              (B, T, d, d)    second moment of a task's inputs
    Y Xᵀ / N    c              (B, T, d, d)    cross moment of its outputs and inputs

The loss of N examples, 1/(2N) ‖W X − Y‖², depends on them only through s and c, so that a step
costs the same for every N. Its gradient in W is W s − c.

Deviations:
    - Each problem has its own ground truth; the authors' code repeats one.
    - Standard retraining is solved exactly. The authors' code takes 3000 steps and leaves an
      untrained adapter with entries of standard deviation 0.1 in the forward pass.
    - The error is the expectation over new inputs, ‖Ŵ − W*‖_F² = E‖(Ŵ − W*) x‖². The authors
      report the noise-free loss on the fine-tuning inputs, summed over them.
Silent in the paper:
    - The noise: the paper states 0.1; the authors' code uses a standard deviation of 0.1² = 0.01.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Offsets = Literal["psd", "zero-mean"]

OUTER_RATE, INNER_RATE, INNER_STEPS, ADAPT_RATE = 0.03, 0.003, 10, 0.005
START = 0.1  # standard deviation of the adapters' initial entries
TRUTH, SEEN, UNSEEN, ADAPTERS = range(4)  # random streams of one problem


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of data: `s` = X Xᵀ/N and `c` = Y Xᵀ/N, both (..., d, d)."""

    s: Array
    c: Array


@dataclass(frozen=True, eq=False)
class Problems:
    """B problems of equal shape: their ground truths and the data of their seen tasks."""

    seeds: tuple[int, ...]
    shared: Array
    seen_weights: Array
    unseen_weight: Array
    seen: Moments


@dataclass(frozen=True, eq=False)
class Solution:
    """A base a (B, d, d) and adapters u, v (B, T, d, k); v is None for symmetric adapters."""

    a: Array
    u: Array
    v: Array | None


def draw_problems(
    seeds: Sequence[int],
    *,
    d: int = 10,
    num_tasks: int = 3,
    num_examples: int = 5000,
    k: int = 1,
    noise: float = 0.01,
    offsets: Offsets = "psd",
) -> Problems:
    """Draw one problem per seed.

    A* = (G + Gᵀ)/2, where G and U_t* have standard normal entries. Problems with the same seed, d
    and k have the same ground truth, whatever the numbers of tasks and examples.

    Args:
        seeds: Random seed of each problem.
        d: Dimension of inputs and outputs.
        num_tasks: Number of seen tasks T.
        num_examples: Examples per seen task, N.
        k: Rank of a task's offset.
        noise: Standard deviation of the noise on the outputs.
        offsets: "psd": R_t* = U_t* U_t*ᵀ, as in the paper; "zero-mean": R_t* = U_t* V_t*ᵀ.
    """
    shared, weights, data = [], [], []
    for seed in seeds:
        rng = _stream(seed, TRUTH, d, k)
        g = rng.normal(size=(d, d))
        a = (g + g.T) / 2
        u = rng.normal(size=(num_tasks + 1, d, k))
        v = u if offsets == "psd" else rng.normal(size=u.shape)
        # The unseen task comes first, so that it stays the same when tasks are added.
        weights.append(a + u @ v.mT)
        shared.append(a)
        data.append(_moments(weights[-1][1:], num_examples, noise, _stream(seed, SEEN, d, k)))
    w = np.stack(weights)
    seen = Moments(np.stack([m.s for m in data]), np.stack([m.c for m in data]))
    return Problems(tuple(seeds), np.stack(shared), w[:, 1:], w[:, 0], seen)


def draw_shots(problems: Problems, num_shots: int, noise: float, draw: int = 0) -> Moments:
    """Draw fine-tuning data of the unseen tasks: moments (B, d, d) of `num_shots` examples each.

    Args:
        problems: The B problems.
        num_shots: Examples per unseen task, n.
        noise: Standard deviation of the noise on the outputs.
        draw: Index of the draw; each index is an independent sample.
    """
    d = problems.shared.shape[-1]
    data = [
        _moments(weight, num_shots, noise, _stream(seed, UNSEEN, num_shots, draw))
        for seed, weight in zip(problems.seeds, problems.unseen_weight, strict=True)
    ]
    assert data[0].s.shape == (d, d)
    return Moments(np.stack([m.s for m in data]), np.stack([m.c for m in data]))


def standard(seen: Moments) -> Array:
    """Standard retraining (SR): the least-squares base (B, d, d) of all tasks' pooled examples."""
    transposed: Array = np.linalg.solve(seen.s.mean(1), seen.c.mean(1).mT)
    return transposed.mT


def peft_ml(
    problems: Problems,
    k: int,
    steps: int,
    *,
    symmetric: bool = True,
    start: Solution | None = None,
) -> Solution:
    """PEFT-ML (eq. 5) by the authors' alternating gradient descent.

    Each outer step is 10 steps of all adapters (learning rate 0.003), then one of the base (0.03).

    Args:
        problems: The problems whose seen tasks are retrained on.
        k: Rank of the adapters.
        steps: Outer steps.
        symmetric: Adapters U Uᵀ, as in the paper's theory; else U Vᵀ.
        start: Initial solution; None for A = 0 and adapter entries from N(0, 0.1²).
    """
    s, c = problems.seen.s, problems.seen.c
    if start is None:
        shape = (*s.shape[1:3], k)
        drawn = [
            START * _stream(seed, ADAPTERS).normal(size=(2, *shape)) for seed in problems.seeds
        ]
        u, v = np.stack(drawn, axis=1)
        start = Solution(np.zeros_like(problems.shared), u, None if symmetric else v)
    a, u, v = start.a, start.u, start.v
    mean_s = s.mean(1)
    for _ in range(steps):
        g = a[:, None] @ s - c  # gradient in W for zero adapters
        u, v = _adapter_steps(g, s, u, v, INNER_STEPS, INNER_RATE)
        # grad_A = (1/T) Σ_t (A + U_t V_tᵀ) s_t − c_t
        right = u if v is None else v
        a = a - OUTER_RATE * (a @ mean_s + (u @ (right.mT @ s) - c).mean(1))
    return Solution(a, u, v)


def gradients(solution: Solution, seen: Moments) -> tuple[Array, Array, Array | None]:
    """Gradients of `loss` in A (B, d, d), of the per-task losses in U_t and V_t (B, T, d, k)."""
    right = solution.u if solution.v is None else solution.v
    g = (solution.a[:, None] + solution.u @ right.mT) @ seen.s - seen.c
    if solution.v is None:
        return g.mean(1), (g + g.mT) @ solution.u, None
    return g.mean(1), g @ solution.v, g.mT @ solution.u


def loss(weights: Array, seen: Moments) -> Array:
    """(B,) mean over tasks of ‖W_t X − Y‖²/(2N) − ‖Y‖²/(2N), for weights W_t (B, T, d, d)."""
    per_task = ((0.5 * weights @ seen.s - seen.c) * weights).sum((-2, -1))
    return per_task.mean(1)


def weights_of(solution: Solution) -> Array:
    """(B, T, d, d) weights A + U_t V_tᵀ of the seen tasks."""
    right = solution.u if solution.v is None else solution.v
    return solution.a[:, None] + solution.u @ right.mT


def adapt_exactly(base: Array, shots: Moments, rank: int) -> Array:
    """The change of rank `rank` that fits the shots best, (B, d, d), by reduced-rank regression.

    min ‖(A + D) X − Y‖² over rank D ≤ r is solved by D = [E s^-½]_r s^-½ with E = c − A s and [·]_r
    the best approximation of rank r (Eckart-Young). Gradient descent on U Vᵀ converges to it.

    Raises:
        ValueError: There are fewer examples than dimensions, so that s has no inverse.
    """
    eigenvalues, vectors = np.linalg.eigh(shots.s)
    if eigenvalues.min() <= 1e-10 * eigenvalues.max():
        raise ValueError("fewer examples than dimensions: fine-tuning has no unique solution")
    whitener: Array = (vectors / np.sqrt(eigenvalues)[..., None, :]) @ vectors.mT
    left, values, right = np.linalg.svd((shots.c - base @ shots.s) @ whitener)
    change: Array = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :] @ whitener
    return change


def adapt_by_descent(
    base: Array, shots: Moments, rank: int, steps: Sequence[int], seeds: Sequence[int]
) -> Iterator[Array]:
    """Fine-tuning as published: gradient descent on U Vᵀ, learning rate 0.005, from N(0, 0.1²).

    Args:
        base: (B, d, d).
        shots: Fine-tuning data (B, d, d).
        rank: Rank of the change.
        steps: Numbers of steps after which to yield the change, in ascending order.
        seeds: Random seed of each problem's initial adapter.

    Yields:
        The change U Vᵀ (B, d, d) after each number of steps.
    """
    d = base.shape[-1]
    u, v = np.stack(
        [START * _stream(seed, ADAPTERS, rank).normal(size=(2, d, rank)) for seed in seeds], axis=1
    )
    g = base @ shots.s - shots.c
    steps_done = 0
    for num_steps in steps:
        u, v = _adapter_steps(g, shots.s, u, v, num_steps - steps_done, ADAPT_RATE)
        steps_done = num_steps
        assert v is not None
        yield u @ v.mT


def error(weight: Array, truth: Array) -> Array:
    """(B,) ‖W − W*‖_F², the expected noise-free squared error on a new input."""
    return ((weight - truth) ** 2).sum((-2, -1))


def floor(base: Array, truth: Array, rank: int) -> Array:
    """(B,) smallest error after a change of rank `rank` (Eckart-Young; Corollary 1)."""
    return (np.linalg.svd(truth - base, compute_uv=False)[..., rank:] ** 2).sum(-1)


def expected_error(d: int, k: int, n: int, noise: float) -> float:
    """noise² (2dk − k²)/n, the error of adapting the exact base at rank k: the paper's O(kd/n).

    2dk − k² is the number of free parameters of a d × d matrix of rank k. Holds for n well above d.
    """
    return noise**2 * (2 * d * k - k * k) / n


def _adapter_steps(
    g: Array, s: Array, u: Array, v: Array | None, steps: int, rate: float
) -> tuple[Array, Array | None]:
    """Gradient steps on adapters (..., d, k) with a fixed base.

    G = (A + U Vᵀ) s − c = g + U Vᵀ s, so the gradients G V and Gᵀ U, or (G + Gᵀ) U if V is U, need
    only products of d × d with d × k.
    """
    d = g.shape[-1]
    if v is None:
        stacked = np.concatenate([g + g.mT, s], axis=-2)
        for _ in range(steps):
            gu = stacked @ u
            su = gu[..., d:, :]
            u = u - rate * (gu[..., :d, :] + u @ (u.mT @ su) + su @ (u.mT @ u))
        return u, None
    stacked, gt = np.concatenate([g, s], axis=-2), np.ascontiguousarray(g.mT)
    for _ in range(steps):
        gv = stacked @ v
        sv = gv[..., d:, :]
        grad_u = gv[..., :d, :] + u @ (v.mT @ sv)
        grad_v = gt @ u + sv @ (u.mT @ u)
        u, v = u - rate * grad_u, v - rate * grad_v
    return u, v


def _moments(weights: Array, num_examples: int, noise: float, rng: np.random.Generator) -> Moments:
    """Moments (..., d, d) of examples drawn for each of the weights (..., d, d)."""
    flat = weights.reshape(-1, *weights.shape[-2:])
    s, c = np.empty_like(flat), np.empty_like(flat)
    for i, w in enumerate(flat):
        x, z = rng.normal(size=(2, len(w), num_examples))
        s[i] = x @ x.T / num_examples
        c[i] = w @ s[i] + noise * (z @ x.T) / num_examples
    return Moments(s.reshape(weights.shape), c.reshape(weights.shape))


def _stream(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
