"""The shallow network: a batch of trials, each of several tasks, in torch.

Paper: Block et al., "Provable Meta-Learning with Low-Rank Adaptations", 2025, arXiv:2410.22264 v2.

    y = c*ᵀ sigmoid((A* + U_t* U_t*ᵀ) x) + noise

    symbol   here           shape                       meaning
    A        weight         (B, d, d)                   first layer of each of B trials
    c        head           (B, d)                      second layer
    V_t, U_t down, up       (B, T, k, d), (B, T, d, k)  adapters of the first layer
    X, y     x, y           (B, T, d, N), (B, T, N)     one column per example

The bases of all trials are trained together: their losses are summed, and since AdamW is
elementwise, the trials do not influence one another.

Deviations:
    - The error is also reported on new inputs; the authors report it on the fine-tuning inputs.
    - The authors' learning rate (1e-3), weight decay (0.01) and full batches are kept; the number
      of epochs is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, eq=False)
class Network:
    """A batch of networks: `weight` (B, d, d) and `head` (B, d)."""

    weight: Tensor
    head: Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs `x` (B, T, d, N) and outputs `y` (B, T, N)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Trials:
    """Data of B trials, each with its own ground truth.

    Attributes:
        seeds: Random seed of each trial.
        seen: Noisy data of the seen tasks.
        shots: Noisy fine-tuning data of the unseen task (T = 1).
        shots_clean: The same with noise-free outputs.
        held_out: Noise-free data of the unseen task on new inputs.
    """

    seeds: tuple[int, ...]
    seen: Data
    shots: Data
    shots_clean: Data
    held_out: Data


def draw_trials(
    seeds: Sequence[int],
    *,
    d: int = 10,
    num_tasks: int = 3,
    num_examples: int = 1000,
    num_shots: int = 100,
    k: int = 1,
    noise: float = 0.1,
    num_held_out: int = 5000,
) -> Trials:
    """Draw one trial per seed; all entries of A*, c*, U_t* and x are standard normal.

    Args:
        seeds: Random seed of each trial.
        d: Dimension of inputs and width of the layer.
        num_tasks: Number of seen tasks T.
        num_examples: Examples per seen task, N.
        num_shots: Fine-tuning examples of the unseen task, n.
        k: Rank of a task's offset.
        noise: Standard deviation of the noise on the outputs.
        num_held_out: New inputs on which the held-out error is measured.
    """
    by_seed = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        a, c = torch.randn(d, d, generator=rng), torch.randn(1, d, generator=rng)
        u = torch.randn(num_tasks + 1, d, k, generator=rng)
        truth = Network(a + u @ u.mT, c.expand(num_tasks + 1, d))
        samples = []  # (x, noise-free y, noisy y); the first task is the unseen one
        for tasks, count in (
            (slice(1), num_held_out),
            (slice(1), num_shots),
            (slice(1, None), num_examples),
        ):
            networks = Network(truth.weight[tasks], truth.head[tasks])
            x = torch.randn(len(networks.weight), d, count, generator=rng)
            y = forward(networks, x[:, None])[:, 0]
            samples.append((x, y, y + noise * torch.randn(y.shape, generator=rng)))
        by_seed.append(samples)
    held_out, shots, seen = zip(*by_seed, strict=True)

    def data(samples: Sequence[tuple[Tensor, ...]], output: int) -> Data:
        return Data(torch.stack([s[0] for s in samples]), torch.stack([s[output] for s in samples]))

    return Trials(tuple(seeds), data(seen, 2), data(shots, 2), data(shots, 1), data(held_out, 1))


def forward(
    network: Network, x: Tensor, up: Tensor | None = None, down: Tensor | None = None
) -> Tensor:
    """Outputs (B, T, N) for inputs x (B, T, d, N), with optional adapters."""
    weight = network.weight[:, None]
    if up is not None and down is not None:
        weight = weight + up @ down
    hidden = torch.sigmoid(weight @ x)
    return (network.head[:, None, :, None] * hidden).sum(-2)


def fresh_network(seeds: Sequence[int], d: int) -> Network:
    """Networks with entries uniform in ±1/√d, torch's default for a linear layer."""
    return Network(
        torch.stack([_uniform((d, d), d, seed) for seed in seeds]),
        torch.stack([_uniform((d,), d, seed, 1) for seed in seeds]),
    )


def standard(trials: Trials, epochs: int) -> Network:
    """Standard retraining (SR): one network per trial for the pooled examples of all tasks."""
    base = fresh_network(trials.seeds, trials.seen.x.shape[-2])
    weight, head, _, _ = _train(base, None, trials.seen, epochs, train_base=True)
    return Network(weight, head)


def peft_ml(trials: Trials, k: int, epochs: int) -> Network:
    """PEFT-ML (eq. 5): the bases after joint training with one adapter of rank k per task."""
    _, num_tasks, d, _ = trials.seen.x.shape
    base = fresh_network(trials.seeds, d)
    adapters = fresh_adapters(trials.seeds, num_tasks, d, k)
    weight, head, _, _ = _train(base, adapters, trials.seen, epochs, train_base=True)
    return Network(weight, head)


def adapt(
    base: Network, shots: Data, seeds: Sequence[int], rank: int, epochs: int
) -> Callable[[Tensor], Tensor]:
    """Fine-tune a LoRA of rank `rank` on the first layer; everything else is frozen.

    Returns:
        The adapted networks, as a function from x (B, 1, d, N) to outputs (B, 1, N).
    """
    adapters = fresh_adapters(seeds, 1, base.weight.shape[-1], rank)
    _, _, up, down = _train(base, adapters, shots, epochs, train_base=False)
    return lambda x: forward(base, x, up, down)


def adapt_fully(base: Network, shots: Data, epochs: int) -> Callable[[Tensor], Tensor]:
    """Fine-tune all weights; returns the adapted networks as `adapt` does."""
    weight, head, _, _ = _train(base, None, shots, epochs, train_base=True)
    return lambda x: forward(Network(weight, head), x)


def fresh_adapters(seeds: Sequence[int], num_tasks: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    """LoRA's initial (up, down): up (B, T, d, k) zero, down (B, T, k, d) uniform in ±1/√d."""
    down = torch.stack([_uniform((num_tasks, k, d), d, seed, 2) for seed in seeds])
    return torch.zeros(len(seeds), num_tasks, d, k), down


def gradients(
    network: Network, adapters: tuple[Tensor, Tensor] | None, data: Data
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of Σ_t mean_j (f(x_j) − y_j)² in weight, head, up and down, in their shapes.

    Written by hand: this takes a third of the time of automatic differentiation.
    """
    up, down = (None, None) if adapters is None else adapters
    weight = network.weight[:, None]
    if up is not None and down is not None:
        weight = weight + up @ down
    head = network.head[:, None, :, None]
    hidden = torch.matmul(weight, data.x).sigmoid_()
    residual = (head * hidden).sum(-2).sub_(data.y).mul_(2 / data.y.shape[-1])[..., None, :]
    grad_head = (hidden * residual).sum(-1).sum(1)
    slope = torch.addcmul(hidden, hidden, hidden, value=-1).mul_(residual)  # σ' = σ − σ²
    grad_weight = (slope @ data.x.mT) * head  # (B, T, d, d)
    if up is None or down is None:
        return grad_weight.sum(1), grad_head, None, None
    return grad_weight.sum(1), grad_head, grad_weight @ down.mT, up.mT @ grad_weight


def _train(
    base: Network,
    adapters: tuple[Tensor, Tensor] | None,
    data: Data,
    epochs: int,
    *,
    train_base: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(weight, head, up, down) after full-batch AdamW on the adapters and, optionally, the base."""
    weight, head = base.weight.clone(), base.head.clone()
    up, down = (None, None) if adapters is None else (adapters[0].clone(), adapters[1].clone())
    state = (weight, head, up, down)
    trained = [*((weight, head) if train_base else ()), *(p for p in (up, down) if p is not None)]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    adapters = None if up is None or down is None else (up, down)
    for _ in range(epochs):
        state_gradients = gradients(Network(weight, head), adapters, data)
        for parameter, gradient in zip(state, state_gradients, strict=True):
            if parameter is not None:
                parameter.grad = gradient
        optimizer.step()
    return state


def _uniform(shape: tuple[int, ...], fan_in: int, seed: int, stream: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(1_000_003 * (stream + 1) + seed)
    return (2 * torch.rand(shape, generator=rng) - 1) / fan_in**0.5
