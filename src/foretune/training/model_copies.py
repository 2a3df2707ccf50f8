"""The copies of a model that the verbs train, and the interpolation back to the original."""

from __future__ import annotations

import copy

import torch
from torch import nn

from foretune.models.surgery import head_width, match_head
from foretune.tasks.task import Objective


def fresh_copy(model: nn.Module, objective: Objective, seed: int) -> nn.Module:
    """A copy of the model with a head that fits the objective."""
    return _copy_with_head(model, objective, objective.num_outputs(), seed)


def _copy_with_head(
    model: nn.Module, objective: Objective, outputs: int | None, seed: int
) -> nn.Module:
    model = copy.deepcopy(model)
    match_head(model, outputs, seed)
    objective.freeze(model)
    return model


def copy_to_adapt(model: nn.Module, objective: Objective, seed: int) -> tuple[nn.Module, Objective]:
    """A copy of a base that can be adapted, and the form of the objective for its head.

    Where all tasks would share one head but the base's has another width, the base cannot have
    learnt it, so each task gets its own. Heads are as wide as the base's, so that stock loaders
    accept them, unless a task has more labels.
    """
    outputs = objective.num_outputs()
    if outputs is not None:
        width = head_width(model)
        local_form = objective.local()
        if width not in (None, outputs) and local_form is not objective:
            objective = local_form
            outputs = max(width or 0, objective.num_outputs() or 0)
    return _copy_with_head(model, objective, outputs, seed), objective


@torch.no_grad()
def interpolate(model: nn.Module, original: nn.Module, share: float) -> None:
    """Sets trained weights to original + share · (trained − original), in place.

    A head whose shape differs from the original's stays as it is.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903: their α.
    """
    if share == 1:
        return
    weights = dict(original.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad and name in weights and weights[name].shape == p.shape:
            p.copy_(torch.lerp(weights[name].to(p), p, share))
