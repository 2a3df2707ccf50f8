"""Distances between predicted and true trajectories."""

from __future__ import annotations

import torch
from torch import Tensor


def displacements(trajectories: Tensor, truth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Average and final displacement error (ADE, FDE) of every mode.

    Args:
        trajectories: (n, K, F, 2) in m.
        truth: (n, F, 2) in m; unobserved steps may hold any value.
        valid: (n, F) true where a step was observed; at least one step per scene.

    Returns:
        (n, K) mean over the observed steps and (n, K) value at the last observed step, in m.
    """
    difference = trajectories - torch.where(valid[..., None], truth, 0)[:, None]
    distance = difference.norm(dim=-1) * valid[:, None]
    average = distance.sum(-1) / valid.sum(-1)[:, None]
    step = torch.arange(valid.shape[-1], device=valid.device)
    last = torch.where(valid, step, -1).amax(-1)
    final = distance.gather(-1, last[:, None, None].expand(*distance.shape[:2], 1)).squeeze(-1)
    return average, final


def min_fde(
    traj: Tensor, scores: Tensor, truth: Tensor, valid: Tensor, k: int | None = None
) -> Tensor:
    """(n,) smallest final displacement in m among the k likeliest modes (None: all)."""
    return displacements(likeliest(traj, scores, k), truth, valid)[1].amin(1)


def likeliest(traj: Tensor, scores: Tensor, k: int | None) -> Tensor:
    """(n, k, F, 2) the k modes of traj (n, K, F, 2) with the highest scores; None for all."""
    if k is None or k >= traj.shape[1]:
        return traj
    chosen = scores.topk(k, dim=1).indices
    return traj.gather(1, chosen[..., None, None].expand(-1, -1, *traj.shape[2:]))
