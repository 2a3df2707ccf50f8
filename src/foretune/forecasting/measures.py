"""Metrics of trajectory forecasts (minADE, minFDE, miss rate), and the forecasts of a model.

symbol  shape          meaning
traj    (n, K, F, 2)   forecasts in m
scores  (n, K)         logits of the modes; of equally likely ones the first counts as likelier
truth   (n, F, 2)      true positions in m
valid   (n, F)         which steps were observed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import DivergedError
from foretune.forecasting.displacement import displacements, likeliest, min_fde
from foretune.tasks.task import Objective

MISSED_M = 2.0
ForecastsAndTruth = tuple[Tensor, Tensor, Tensor, Tensor]  # traj, scores, truth, valid


def min_ade(
    traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor, k: int | None = None
) -> Tensor:
    """(n,) smallest average displacement in m among the k likeliest modes (None: all)."""
    return displacements(likeliest(traj, scores, k), truth, valid)[0].amin(1)


def missed(
    traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor, k: int | None = None
) -> Tensor:
    """(n,) 1 where none of the k likeliest modes (None: all) ends within 2 m of the truth."""
    return (min_fde(traj, scores, truth, valid, k) > MISSED_M).float()


def brier_min_fde(traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """(n,) minFDE of all modes plus (1 - p)², where p is the probability of the best mode."""
    final = displacements(traj, truth, valid)[1]
    best = final.argmin(1, keepdim=True)
    probability = scores.softmax(1).gather(1, best)
    return (final.gather(1, best) + (1 - probability) ** 2).squeeze(1)


def constant_velocity(history: Tensor, steps: int) -> Tensor:
    """(n, 1, F, 2) forecasts in which each focal agent repeats its last step.

    Args:
        history: (n, H, 4) encoded histories of the focal agents.
        steps: Future steps F.
    """
    ahead = torch.arange(1, steps + 1, device=history.device)
    return (history[:, -1, :2][:, None] * ahead[:, None])[:, None]


def measures(forecasts: ForecastsAndTruth) -> dict[str, float]:
    """The benchmark metrics, averaged over scenes: of the likeliest mode and of the best of K."""
    modes = forecasts[0].shape[1]
    metrics = {"minADE1": min_ade(*forecasts, k=1), "minFDE1": min_fde(*forecasts, k=1)}
    if modes > 1:
        metrics |= {f"minADE{modes}": min_ade(*forecasts), f"minFDE{modes}": min_fde(*forecasts)}
    metrics[f"MR{modes}"] = missed(*forecasts)
    metrics[f"b-minFDE{modes}"] = brier_min_fde(*forecasts)
    return {name: float(values.mean()) for name, values in metrics.items()}


@torch.no_grad()
def forecast_rows(
    model: nn.Module | None,
    rows: Sequence[Mapping[str, Any]],
    objective: Objective,
    *,
    batch_size: int = 64,
) -> ForecastsAndTruth:
    """A model's forecasts of scenes, with the truth.

    Args:
        model: A Forecast-MAE with a forecaster; None for constant velocity.
        rows: Scenes in the plain format.
        objective: A `Forecast`.
        batch_size: Scenes per forward pass.

    Returns:
        traj (n, K, F, 2), scores (n, K), truth (n, F, 2), valid (n, F).

    Raises:
        DivergedError: A forecast is not finite.
    """
    if model is not None:
        model.eval()
    parts: list[ForecastsAndTruth] = []
    for start in range(0, len(rows), batch_size):
        encoded = [objective.encode(row, "") for row in rows[start : start + batch_size]]
        scene = objective.collate(encoded, [0] * len(encoded)).inputs
        future = scene["future"][:, 0]
        if model is None:
            traj = constant_velocity(scene["history"][:, 0], future.shape[1])
            scores = traj.new_zeros(len(traj), 1)
        else:
            device = next(model.parameters()).device
            forecasts = model({name: value.to(device) for name, value in scene.items()})
            traj, scores = forecasts.trajectories.float().cpu(), forecasts.scores.float().cpu()
        parts.append((traj, scores, future[..., :2], future[..., 2] > 0))
    traj, scores, truth, valid = (torch.cat(column) for column in zip(*parts, strict=True))
    finite = torch.isfinite(traj).flatten(1).all(1) & torch.isfinite(scores).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0]) + 1
        raise DivergedError(f"the forecasts of scene {first} are not finite: retrain the model")
    return traj, scores, truth, valid
