"""The shallow network: several trials of several tasks at once, in torch.

Paper: Block et al., "Provable Meta-Learning with Low-Rank Adaptations", 2025, arXiv:2410.22264 v2.

    y = c*ᵀ sigmoid((A* + U_t* U_t*ᵀ) x) + noise

    symbol   here           shape                       meaning
    A        weight         (B, d, d)                   first layer of each of B trials
    c        head           (B, d)                      second layer
    V_t, U_t down, up       (B, T, k, d), (B, T, d, k)  adapters of the first layer
    X, y     x, y           (B, T, d, N), (B, T, N)     a column is a row of data

A stack of bases is trained as one: the losses of trials are added, and AdamW treats every entry on
its own, so that trials do not touch one another.

Deviations:
    - The error is also reported on new inputs; the authors report it on the fine-tuning inputs.
    - The authors' learning rate (1e-3), weight decay (0.01) and full batches are kept; how many
      epochs is up to the caller.
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
    """A stack of networks: `weight` (B, d, d) and `head` (B, d)."""

    weight: Tensor
    head: Tensor


@dataclass(frozen=True, eq=False)
class Data:
    """Inputs `x` (B, T, d, N) and outputs `y` (B, T, N)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Trials:
    """Data of B trials, each with a ground truth of its own.

    `shots` has noise; `shots_clean` and `held_out` have none. All three are of the unseen task,
    with T = 1.
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
    rows: int = 1000,
    shots: int = 100,
    k: int = 1,
    noise: float = 0.1,
    new_rows: int = 5000,
) -> Trials:
    """Draws one trial for each seed; every entry of A*, c*, U_t* and x is standard normal.

    Args:
        seeds: One for each trial.
        d: Dimension of inputs and width of the layer.
        num_tasks: Seen tasks, T.
        rows: Rows of each seen task, N.
        shots: Rows of the unseen task, n.
        k: Rank of a task's offset.
        noise: Standard deviation of the outputs' noise.
        new_rows: Inputs on which the held-out error is measured.
    """
    each = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        a, c = torch.randn(d, d, generator=rng), torch.randn(1, d, generator=rng)
        u = torch.randn(num_tasks + 1, d, k, generator=rng)
        truth = Network(a + u @ u.mT, c.expand(num_tasks + 1, d))
        parts = []
        for tasks, count in ((slice(1), new_rows), (slice(1), shots), (slice(1, None), rows)):
            part = Network(truth.weight[tasks], truth.head[tasks])
            x = torch.randn(len(part.weight), d, count, generator=rng)
            y = forward(part, x[:, None])[:, 0]
            parts.append((x, y, y + noise * torch.randn(y.shape, generator=rng)))
        each.append(parts)
    new, few, many = zip(*each, strict=True)

    def data(parts: Sequence[tuple[Tensor, ...]], at: int) -> Data:
        return Data(torch.stack([p[0] for p in parts]), torch.stack([p[at] for p in parts]))

    return Trials(tuple(seeds), data(many, 2), data(few, 2), data(few, 1), data(new, 1))


def forward(
    network: Network, x: Tensor, up: Tensor | None = None, down: Tensor | None = None
) -> Tensor:
    """Outputs (B, T, N) for x (B, T, d, N), with the adapters where they are given."""
    weight = network.weight[:, None]
    if up is not None and down is not None:
        weight = weight + up @ down
    hidden = torch.sigmoid(weight @ x)
    return (network.head[:, None, :, None] * hidden).sum(-2)


def fresh_network(seeds: Sequence[int], d: int) -> Network:
    """Entries uniform within ±1/√d, torch's default for a linear layer."""
    return Network(
        torch.stack([_uniform((d, d), d, seed) for seed in seeds]),
        torch.stack([_uniform((d,), d, seed, 1) for seed in seeds]),
    )


def standard(trials: Trials, epochs: int) -> Network:
    """Standard retraining (SR): one network for all tasks' rows together."""
    base = fresh_network(trials.seeds, trials.seen.x.shape[-2])
    weight, head, _, _ = _train(base, None, trials.seen, epochs, base_learns=True)
    return Network(weight, head)


def peft_ml(trials: Trials, k: int, epochs: int) -> Network:
    """PEFT-ML (eq. 5): base and one adapter of rank k for each task, learned at once; the base."""
    _, num_tasks, d, _ = trials.seen.x.shape
    base = fresh_network(trials.seeds, d)
    adapters = fresh_adapters(trials.seeds, num_tasks, d, k)
    weight, head, _, _ = _train(base, adapters, trials.seen, epochs, base_learns=True)
    return Network(weight, head)


def adapt(
    base: Network, shots: Data, seeds: Sequence[int], rank: int, epochs: int
) -> Callable[[Tensor], Tensor]:
    """Fine-tunes a LoRA of that rank on the first layer, the rest at rest.

    Returns:
        The adapted networks, from x (B, 1, d, N) to (B, 1, N).
    """
    adapters = fresh_adapters(seeds, 1, base.weight.shape[-1], rank)
    _, _, up, down = _train(base, adapters, shots, epochs, base_learns=False)
    return lambda x: forward(base, x, up, down)


def adapt_fully(base: Network, shots: Data, epochs: int) -> Callable[[Tensor], Tensor]:
    """Fine-tunes every weight; what it returns is as with `adapt`."""
    weight, head, _, _ = _train(base, None, shots, epochs, base_learns=True)
    return lambda x: forward(Network(weight, head), x)


def fresh_adapters(seeds: Sequence[int], num_tasks: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    """(up, down): up is zero and down uniform within ±1/√d, as LoRA begins."""
    down = torch.stack([_uniform((num_tasks, k, d), d, seed, 2) for seed in seeds])
    return torch.zeros(len(seeds), num_tasks, d, k), down


def gradients(
    network: Network, adapters: tuple[Tensor, Tensor] | None, data: Data
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of Σ_t mean_j (f(x_j) − y_j)² in weight, head, up and down.

    Written out, since a third of the time of automatic differentiation is enough for it.
    """
    up, down = (None, None) if adapters is None else adapters
    weight = network.weight[:, None]
    if up is not None and down is not None:
        weight = weight + up @ down
    head = network.head[:, None, :, None]
    hidden = torch.matmul(weight, data.x).sigmoid_()
    off = (head * hidden).sum(-2).sub_(data.y).mul_(2 / data.y.shape[-1])[..., None, :]
    in_head = (hidden * off).sum(-1).sum(1)
    slope = torch.addcmul(hidden, hidden, hidden, value=-1).mul_(off)  # σ' = σ − σ²
    in_weight = (slope @ data.x.mT) * head  # (B, T, d, d)
    if up is None or down is None:
        return in_weight.sum(1), in_head, None, None
    return in_weight.sum(1), in_head, in_weight @ down.mT, up.mT @ in_weight


def _train(
    base: Network,
    adapters: tuple[Tensor, Tensor] | None,
    data: Data,
    epochs: int,
    *,
    base_learns: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Full-batch AdamW on adapters, and on the base where it learns; (weight, head, up, down)."""
    weight, head = base.weight.clone(), base.head.clone()
    up, down = (None, None) if adapters is None else (adapters[0].clone(), adapters[1].clone())
    state = (weight, head, up, down)
    learn = [*((weight, head) if base_learns else ()), *(p for p in (up, down) if p is not None)]
    optimizer = torch.optim.AdamW(learn, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    now = None if up is None or down is None else (up, down)
    for _ in range(epochs):
        found = gradients(Network(weight, head), now, data)
        for parameter, gradient in zip(state, found, strict=True):
            if parameter is not None:
                parameter.grad = gradient
        optimizer.step()
    return state


def _uniform(shape: tuple[int, ...], fan_in: int, seed: int, stream: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(1_000_003 * (stream + 1) + seed)
    return (2 * torch.rand(shape, generator=rng) - 1) / fan_in**0.5
