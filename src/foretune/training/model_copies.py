"""The copies of a model that the verbs train, and the interpolation back to the original."""

from __future__ import annotations

import copy

import torch
from torch import nn

from foretune.models.checkpoint import unstored_modules
from foretune.models.surgery import (
    has_fresh_head,
    head_labels,
    head_modules,
    head_width,
    is_in_head,
    match_head,
    reset_head,
)
from foretune.tasks.labels import label_text
from foretune.tasks.task import Objective


def fresh_copy(model: nn.Module, objective: Objective, seed: int) -> nn.Module:
    """A copy of the model with a head that fits the objective.

    A head that has learnt other labels is drawn anew, even if it has the right width.
    """
    copied = _copy_with_head(model, objective, objective.num_outputs(), seed)
    if has_other_labels(copied, objective):
        reset_head(copied, objective.num_outputs(), seed)
    return copied


def has_drawn_head(model: nn.Module) -> bool:
    """Whether the checkpoint that the model names does not hold its head, which was drawn."""
    return not set(head_modules(model)).isdisjoint(unstored_modules(model))


def has_other_labels(model: nn.Module, objective: Objective) -> bool:
    """Whether the model's head has learnt labels, and other ones than the objective's."""
    return head_labels(model) is not None and not answers(model, objective)


def answers(model: nn.Module, objective: Objective) -> bool:
    """Whether the outputs of the model's head are the objective's ids: their labels are the same.

    An objective without labels, and a plain module without a task head, are taken at their word.
    """
    if objective.shared().space is None or not has_fresh_head(model):
        return True
    names, space = head_labels(model), objective.space
    if names is None or space is None:
        return False
    return len(names) == len(space) and all(
        name is None or label_text(name) == label_text(label)
        for name, label in zip(names, space, strict=True)
    )


def _copy_with_head(
    model: nn.Module, objective: Objective, outputs: int | None, seed: int
) -> nn.Module:
    model = copy.deepcopy(model)
    match_head(model, outputs, seed)
    objective.freeze(model)
    return model


def copy_to_adapt(model: nn.Module, objective: Objective, seed: int) -> tuple[nn.Module, Objective]:
    """A copy of a base that can be adapted, and the form of the objective for its head.

    Where the base's head has not learnt the labels of the tasks, by their names, or has another
    width, each task gets its own, which is drawn. Heads are as wide as the base's, so that stock
    loaders accept them, unless a task has more labels. A head that the base's checkpoint lacks is
    copied for each task, so that it travels with the adapter.
    """
    outputs, width = objective.num_outputs(), None
    local_form, fits = objective.local(), True
    if outputs is not None and local_form is not objective:
        width = head_width(model)
        fits = width in (None, outputs) and answers(model, objective)
    if not fits:
        objective = local_form
        outputs = max(width or 0, objective.num_outputs() or 0)
    copied = _copy_with_head(model, objective, outputs, seed)
    if outputs is None or not has_fresh_head(copied):
        return copied, objective
    if not fits and width is not None:
        reset_head(copied, outputs, seed)
    if missing := unstored_modules(model):
        # A pooler that was drawn for the head is a part of it.
        parts = dict.fromkeys([*missing, *head_modules(copied)])
        copied.head_modules = list(parts)  # type: ignore[assignment]
        copied.head_per_task = True  # type: ignore[assignment]
    return copied, objective


@torch.no_grad()
def interpolate(
    model: nn.Module, original: nn.Module, share: float, *, fresh_head: bool = False
) -> None:
    """Sets trained weights to original + share · (trained − original), in place.

    A head whose shape differs from the original's stays as it is, and so does a `fresh_head`.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903: their α.
    """
    if share == 1:
        return
    weights = dict(original.named_parameters())
    for name, p in model.named_parameters():
        if fresh_head and is_in_head(model, name):
            continue
        if p.requires_grad and name in weights and weights[name].shape == p.shape:
            p.copy_(torch.lerp(weights[name].to(p), p, share))
