"""Merging fine-tuned models into plain weights, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.fusion.finetuned import Finetuned, Source, check_all_used, persistent_buffers
from foretune.fusion.fused import Fused
from foretune.fusion.heads import Heads, keep_heads
from foretune.fusion.mixture import Routing
from foretune.fusion.skeleton import make_skeleton, open_finetuned
from foretune.fusion.tied_weights import changed_apart, untie

Combine = Callable[[list[Tensor]], Tensor]


def merge(
    base: Source,
    finetuned: Mapping[str, Source],
    method: dict[str, Any],
    combine: Combine,
    *,
    allow_unverified: bool = False,
) -> Fused:
    """Add to each parameter of the base the combined change of the fine-tuned models.

    Args:
        base: A model, or its folder.
        finetuned: Name → a model, a folder, a PEFT model or a PEFT folder.
        method: The method's record as a mapping, kept in the result.
        combine: Maps the changes of one parameter, one per model and all of its shape, to a single
            change.
        allow_unverified: Whether to take adapters that do not record their base.

    Returns:
        A plain model, with one head per task where the heads differ.

    Raises:
        UserError: There is nothing to fuse, the models do not fit the base, or none of them differs
            from it.
    """
    if not finetuned:
        raise UserError("nothing to fuse: give at least one fine-tuned model")
    model, tokenizer = make_skeleton(base, finetuned)
    routing = Routing(list(finetuned))
    total = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        experts = [
            open_finetuned(name, source, model, allow_unverified=allow_unverified)
            for name, source in finetuned.items()
        ]
        heads = keep_heads(model, experts, routing)
        untie(model, changed_apart(model, experts))
        num_merged = _merge_parameters(model, experts, heads, combine)
        num_merged += sum(
            average_buffer(name, buffer, experts)
            for name, buffer in persistent_buffers(model).items()
            if not heads.hold(name)
        )
    check_all_used(experts)
    if not num_merged and not heads.changed:
        raise UserError(
            "the fine-tuned models do not differ from the base: give the model that they were "
            "tuned from"
        )
    extra = sum(p.numel() for p in model.parameters()) - total
    report = {
        "base_parameters": total,
        "extra_parameters": extra,
        "merged": num_merged,
        "left_out": [],
        "notes": [note for expert in experts for note in expert.notes],
    }
    return Fused(model.eval(), list(finetuned), method, routing, heads.labels, report, tokenizer)


def add_change(name: str, parameter: Tensor, change: Tensor) -> None:
    """Add a change to a parameter of the same shape (any) in place, rounding once to its dtype.

    Raises:
        UserError: The sum does not fit the dtype.
    """
    parameter.copy_(parameter.float() + change)
    if not bool(parameter.isfinite().all()):
        raise UserError(f"the fused {name} exceeds what {parameter.dtype} can hold")


def average_buffer(
    name: str, buffer: Tensor, experts: Sequence[Finetuned], *, keep: bool = False
) -> bool:
    """Set a buffer (any shape), such as batch statistics, to the models' mean; `keep` leaves it.

    Returns:
        Whether a model has another value than the base.
    """
    values = [expert.value(name, buffer) for expert in experts]
    if all(torch.equal(value, buffer) for value in values):
        return False
    if not keep:
        mean = torch.stack([value.double() for value in values]).mean(0)
        buffer.copy_(mean if buffer.is_floating_point() else mean.round())
    return True


def _merge_parameters(
    model: nn.Module, experts: Sequence[Finetuned], heads: Heads, combine: Combine
) -> int:
    num_merged = 0
    for name, parameter in model.named_parameters():
        if heads.hold(name):
            continue
        changes = [expert.change(name, parameter) for expert in experts]
        if all(change is None for change in changes):
            continue
        deltas = [
            torch.zeros_like(parameter, dtype=torch.float32) if c is None else c for c in changes
        ]
        add_change(name, parameter, combine(deltas))
        num_merged += 1
    return num_merged
