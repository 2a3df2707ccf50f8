"""What differs outside the layers that get experts: embeddings, norms, convolutions, statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.fusion.finetuned import Finetuned, persistent_buffers
from foretune.fusion.merging import add_change, average_buffer
from foretune.fusion.tied_weights import changed_apart, tied_names, untie


def tensor_names(model: nn.Module) -> list[str]:
    """The names of a model's parameters, tied ones under each name, and of its saved buffers."""
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return [*parameters, *persistent_buffers(model)]


def change_rest(
    model: nn.Module, experts: Sequence[Finetuned], names: Sequence[str], *, average: bool
) -> list[str]:
    """Find the tensors that differ outside the fused layers; keep the base's or average them.

    Args:
        model: The base, some of whose layers may have been replaced; changed in place.
        experts: The fine-tuned models.
        names: Names of the parameters and buffers outside the fused layers.
        average: Set them to the mean of the fine-tuned models.

    Returns:
        Names of those that differ.

    Raises:
        UserError: A weight differs that experts cannot represent: one of `nn.MultiheadAttention`,
            which reads its layers' weights instead of calling them, or of a mixture of experts in
            one tensor.
    """
    attention = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)
    )
    apart = {n: first for n, first in changed_apart(model, experts).items() if n in names}
    if average:
        untie(model, apart)
    aliases = {alias for group in tied_names(model) for alias in group[1:]} - set(apart)
    buffers = persistent_buffers(model)
    differing = []
    for name in names:
        if name in aliases:
            continue  # changes as the name that it is tied to
        if name in buffers:
            differs = average_buffer(name, buffers[name], experts, keep=not average)
        else:
            differs = _change(name, model.get_parameter(name), experts, average=average)
        if not differs:
            continue
        differing.append(name)
        if name.startswith(attention):
            raise UserError(
                f"{name} belongs to an nn.MultiheadAttention, which reads its layers' weights "
                "without calling them, so experts would be ignored; use a model with separate "
                f"query, key and value layers, or exclude_modules=['{name.rpartition('.')[0]}*']"
            )
        if name not in buffers and model.get_parameter(name).dim() == 3 and "expert" in name:
            raise UserError(
                f"{name} holds a mixture of experts in one tensor of 3 dimensions, which cannot be "
                f"fused; exclude_modules=['{name}'] keeps the base's"
            )
    return differing


def _change(name: str, parameter: Tensor, experts: Sequence[Finetuned], *, average: bool) -> bool:
    """Whether a model changes the parameter; set to the models' mean if `average`."""
    if not average and any(expert.has_other_shape(name, parameter) for expert in experts):
        for expert in experts:
            expert.skip(name)
        return True  # such as a vocabulary of another size, which stays the base's
    changes = [expert.change(name, parameter) for expert in experts]
    deltas = [change for change in changes if change is not None]
    if deltas and average:
        add_change(name, parameter, torch.stack(deltas).sum(0) / len(experts))
    return bool(deltas)
