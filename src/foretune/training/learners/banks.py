"""The bank that a method trains: adapters, heads or both for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from foretune.adapters.bank import AdapterBank
from foretune.models.surgery import head_modules
from foretune.tasks.task import Objective


def make_bank(
    model: nn.Module,
    objective: Objective,
    keys: Sequence[str],
    seed: int,
    *,
    lora: Mapping[str, Any] | None = None,
    sparse: float | None = None,
    head_copies: bool = False,
) -> AdapterBank:
    """A bank with adapters, with one head per slot, or with both.

    Where the label sets of the tasks differ, each slot has its own, freshly initialised head. One
    that the base's checkpoint lacks (`copy_to_adapt`) is copied too.

    Args:
        model: The base.
        objective: The fitted objective.
        keys: The key of each slot.
        seed: Random seed of fresh adapters and heads.
        lora: Settings of LoRA adapters; None for none.
        sparse: Fraction of the entries that sparse adapters train; None for none.
        head_copies: Also give each slot a head where the label sets are the same; it then starts
            as a copy of the base's.
    """
    fresh = labels_differ(objective)
    head_copies = head_copies or getattr(model, "head_per_task", False)
    heads = head_modules(model) if fresh or head_copies else []
    return AdapterBank(
        model, keys, lora=lora, sparse=sparse, heads=heads, fresh_heads=fresh, seed=seed
    )


def labels_differ(objective: Objective) -> bool:
    """Whether the outputs of a head stand for other labels in each task."""
    return objective.num_outputs() is not None and objective.shared() is not objective
