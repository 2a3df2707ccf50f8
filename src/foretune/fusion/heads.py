"""The heads of fine-tuned models: one beside the other in the fused model, or one for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foretune.fusion.finetuned import Finetuned
from foretune.fusion.fused import head_with
from foretune.fusion.mixture import Routing, TaskHeads, replace_module
from foretune.models.surgery import has_fresh_head, head_modules


def keep_heads(
    model: nn.Module, experts: Sequence[Finetuned], routing: Routing
) -> dict[str, dict[int, str]]:
    """Gives a model every task's head, in place; one, where all are the same.

    Returns:
        Task → names of its classes by number, where the heads are kept and their names known.
    """
    if not has_fresh_head(model):
        return {}
    differ = False
    heads: dict[str, list[dict[str, Tensor]]] = {}
    for name in head_modules(model):
        own = model.get_submodule(name).state_dict()
        heads[name] = []
        for expert in experts:
            read = {key: expert.read(f"{name}.{key}") for key in own}
            heads[name].append({k: own[k] if v is None else v for k, v in read.items()})
        first = heads[name][0]
        differ |= any(not _equal(first, other) for other in heads[name][1:])
    for name, states in heads.items():
        head = model.get_submodule(name)
        made = [head_with(head, state) for state in states]
        replace_module(model, name, TaskHeads(made, routing) if differ else made[0])
    if not differ:
        return {}
    names = {}
    for expert, state in zip(experts, next(reversed(heads.values())), strict=True):
        width = _width(state)
        names[expert.name] = {i: f"LABEL_{i}" for i in range(width)}
        if len(expert.labels) <= width:  # a head may be wider than its task has labels
            names[expert.name] |= expert.labels
    return names


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(v.shape == other[k].shape and torch.equal(v, other[k]) for k, v in one.items())


def _width(head: dict[str, Tensor]) -> int:
    return len(list(head.values())[-1])
