"""Task heads in the fused model: one per task, or a single one where all are equal."""

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
    """Give a model the head of every task, in place; a single head where all are equal.

    Returns:
        Task → class names by number, where heads are kept per task; LABEL_0, … where the model does
        not name them.
    """
    if not has_fresh_head(model):
        return {}
    differ = False
    states: dict[str, list[dict[str, Tensor]]] = {}
    for name in head_modules(model):
        base_state = model.get_submodule(name).state_dict()
        states[name] = []
        for expert in experts:
            tuned = {key: expert.read(f"{name}.{key}") for key in base_state}
            states[name].append({k: base_state[k] if v is None else v for k, v in tuned.items()})
        first, *rest = states[name]
        differ |= any(not _equal(first, state) for state in rest)
    for name, task_states in states.items():
        base_head = model.get_submodule(name)
        heads = [head_with(base_head, state) for state in task_states]
        replace_module(model, name, TaskHeads(heads, routing) if differ else heads[0])
    if not differ:
        return {}
    labels = {}
    for expert, state in zip(experts, next(reversed(states.values())), strict=True):
        width = _width(state)
        labels[expert.name] = {i: f"LABEL_{i}" for i in range(width)}
        if len(expert.labels) <= width:  # a head may be wider than its task has labels
            labels[expert.name] |= expert.labels
    return labels


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(v.shape == b[k].shape and torch.equal(v, b[k]) for k, v in a.items())


def _width(state: dict[str, Tensor]) -> int:
    return len(list(state.values())[-1])
