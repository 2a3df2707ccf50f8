"""How good forecasts of trajectories are: pure functions, and what a model gets on a task.

symbol  shape          meaning
traj    (n, K, F, 2)   forecasts in m
scores  (n, K)         logits of the modes
truth   (n, F, 2)      what happened
valid   (n, F)         which steps were observed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.forecasting.displacement import displacements
from foretune.tasks.task import Objective

MISSED_M = 2.0
Said = tuple[Tensor, Tensor, Tensor, Tensor]  # traj, scores, truth, valid


def min_ade(
    traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor, k: int | None = None
) -> Tensor:
    """(n,) average displacement in m of the mode that is best by it, among the k likeliest."""
    return displacements(_likeliest(traj, scores, k), truth, valid)[0].amin(1)


def min_fde(
    traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor, k: int | None = None
) -> Tensor:
    """(n,) displacement in m at the last observed step of the best of the k likeliest modes."""
    return displacements(_likeliest(traj, scores, k), truth, valid)[1].amin(1)


def missed(
    traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor, k: int | None = None
) -> Tensor:
    """(n,) 1 where no mode ends within 2 m of the truth."""
    return (min_fde(traj, scores, truth, valid, k) > MISSED_M).float()


def brier_min_fde(traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """(n,) minFDE of all modes plus (1 - p)², p the probability of the mode that is best by it."""
    final = displacements(traj, truth, valid)[1]
    best = final.argmin(1, keepdim=True)
    probability = scores.softmax(1).gather(1, best)
    return (final.gather(1, best) + (1 - probability) ** 2).squeeze(1)


def constant_velocity(history: Tensor, steps: int) -> Tensor:
    """(n, 1, F, 2): each focal agent goes on as in its last step.

    Args:
        history: (n, H, 4) of the focal agents, as a model sees it.
        steps: F.
    """
    ahead = torch.arange(1, steps + 1, device=history.device)
    return (history[:, -1, :2][:, None] * ahead[:, None])[:, None]


def _likeliest(traj: Tensor, scores: Tensor, k: int | None) -> Tensor:
    if k is None or k >= traj.shape[1]:
        return traj
    chosen = scores.topk(k, dim=1).indices
    return traj.gather(1, chosen[..., None, None].expand(-1, -1, *traj.shape[2:]))


def measures(said: Said) -> dict[str, float]:
    """The usual figures, means over all rows: of the likeliest mode, and of the best of K."""
    modes = said[0].shape[1]
    found = {"minADE1": min_ade(*said, k=1), "minFDE1": min_fde(*said, k=1)}
    if modes > 1:
        found |= {f"minADE{modes}": min_ade(*said), f"minFDE{modes}": min_fde(*said)}
    found[f"MR{modes}"] = missed(*said)
    found[f"b-minFDE{modes}"] = brier_min_fde(*said)
    return {name: float(values.mean()) for name, values in found.items()}


@torch.no_grad()
def forecast_rows(
    model: nn.Module | None,
    rows: Sequence[Mapping[str, Any]],
    objective: Objective,
    *,
    batch_size: int = 64,
) -> Said:
    """What a model says of scenes, and what happened.

    Args:
        model: Forecasts; None for constant velocity.
        rows: Plain scenes.
        objective: A `Forecast`.
        batch_size: Scenes at a time.

    Returns:
        traj, scores, truth, valid.
    """
    if model is not None:
        model.eval()
    parts: list[Said] = []
    for start in range(0, len(rows), batch_size):
        encoded = [objective.encode(row, "") for row in rows[start : start + batch_size]]
        scene = objective.collate(encoded, [0] * len(encoded)).inputs
        future = scene["future"][:, 0]
        if model is None:
            traj = constant_velocity(scene["history"][:, 0], future.shape[1])
            scores = traj.new_zeros(len(traj), 1)
        else:
            device = next(model.parameters()).device
            said = model({name: value.to(device) for name, value in scene.items()})
            traj, scores = said.trajectories.float().cpu(), said.scores.float().cpu()
        parts.append((traj, scores, future[..., :2], future[..., 2] > 0))
    traj, scores, truth, valid = (torch.cat(column) for column in zip(*parts, strict=True))
    return traj, scores, truth, valid
