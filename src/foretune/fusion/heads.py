"""Task heads in the fused model: one per task, or a single one where all are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foretune.fusion.finetuned import Finetuned
from foretune.fusion.fused import head_with
from foretune.fusion.mixture import Routing, TaskHeads, replace_module
from foretune.models.surgery import has_fresh_head, head_modules


@dataclass
class Heads:
    """What became of the heads.

    Args:
        names: Names of the head modules; empty for a model whose tasks have no heads of their own.
        labels: Task → class names by number, where heads are kept per task; LABEL_0, … where the
            model does not name them.
        changed: Whether any of them differs from the base's.
    """

    names: list[str]
    labels: dict[str, dict[int, str]] = field(default_factory=dict)
    changed: bool = False

    def hold(self, parameter: str) -> bool:
        """Whether a parameter belongs to a head."""
        return parameter.startswith(tuple(f"{name}." for name in self.names))


def keep_heads(model: nn.Module, experts: Sequence[Finetuned], routing: Routing) -> Heads:
    """Give a model the head of every task, in place; a single head where all are equal."""
    heads = Heads(head_names(model, experts))
    differ = False
    states: dict[str, list[dict[str, Tensor]]] = {}
    for name in heads.names:
        base_state = model.get_submodule(name).state_dict()
        states[name] = [
            {key: expert.value(f"{name}.{key}", value) for key, value in base_state.items()}
            for expert in experts
        ]
        first, *rest = states[name]
        differ |= any(not are_equal(first, state) for state in rest)
        heads.changed |= any(not are_equal(base_state, state) for state in states[name])
    for name, task_states in states.items():
        base_head = model.get_submodule(name)
        copies = [head_with(base_head, state) for state in task_states]
        new_head = TaskHeads(copies, routing, base_head) if differ else copies[0]
        replace_module(model, name, new_head)
    if differ:
        for expert, state in zip(experts, next(reversed(states.values())), strict=True):
            heads.labels[expert.name] = labels_of(expert, state)
    return heads


def labels_of(expert: Finetuned, state: Mapping[str, Tensor]) -> dict[int, str]:
    """The names of a task's classes by number; LABEL_0, … where the model does not name them.

    Args:
        expert: The task's model.
        state: Parameters of its head; the last one has a row or entry per class.
    """
    width = len(list(state.values())[-1])
    labels = {i: f"LABEL_{i}" for i in range(width)}
    if len(expert.labels) <= width:  # a head may be wider than its task has labels
        labels |= expert.labels
    return labels


def head_names(model: nn.Module, experts: Sequence[Finetuned]) -> list[str]:
    """The modules that each task has its own copy of.

    A model that declares no head has one if an adapter brings a copy of its last layer.
    """
    copies = {name for expert in experts for name in expert.copies}
    if not has_fresh_head(model) and not copies:
        return []
    names = head_modules(model)
    if has_fresh_head(model):
        return names
    return names if any(c.startswith(f"{name}.") for name in names for c in copies) else []


def are_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two heads have the same parameters, bit for bit."""
    return all(v.shape == b[k].shape and torch.equal(v, b[k]) for k, v in a.items())
