"""Merging fine-tuned models into plain weights, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from foretune.errors import UserError
from foretune.fusion.finetuned import Finetuned, Source, make_skeleton, open_finetuned
from foretune.fusion.fused import Fused
from foretune.fusion.heads import keep_heads
from foretune.fusion.mixture import Routing, TaskHeads


def merge(
    base: Source,
    finetuned: Mapping[str, Source],
    method: dict[str, Any],
    combine: Callable[[list[Tensor]], Tensor],
) -> Fused:
    """Add to each parameter of the base the combined change of the fine-tuned models.

    Args:
        base: A model, or its folder.
        finetuned: Name → a model, a folder, a PEFT model or a PEFT folder.
        method: The method's record as a mapping, kept in the result.
        combine: Maps the changes of one parameter, one per model and all of its shape, to a single
            change.

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
    num_merged = 0
    with torch.no_grad():
        experts = [open_finetuned(name, source, model) for name, source in finetuned.items()]
        labels = keep_heads(model, experts, routing)
        heads = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, TaskHeads))
        for name, parameter in model.named_parameters():
            if name.startswith(heads):
                continue
            changes = [_change(expert, name, parameter, model) for expert in experts]
            if all(change is None for change in changes):
                continue
            deltas = [
                torch.zeros_like(parameter, dtype=torch.float32) if c is None else c
                for c in changes
            ]
            parameter.add_(combine(deltas).to(parameter.dtype))
            num_merged += 1
    if not num_merged:
        raise UserError(
            "the fine-tuned models do not differ from the base: give the model that they were "
            "tuned from"
        )
    extra = sum(p.numel() for p in model.parameters()) - total
    report = {
        "base_parameters": total,
        "extra_parameters": extra,
        "merged": num_merged,
        "notes": [],
    }
    return Fused(model.eval(), list(finetuned), method, routing, labels, report, tokenizer)


def _change(expert: Finetuned, name: str, parameter: Tensor, model: nn.Module) -> Tensor | None:
    layer, _, last = name.rpartition(".")
    if last != "weight" or layer not in expert.factors:
        return expert.parameter_delta(name, parameter)
    b, a = expert.factors[layer]
    product = (b @ a).to(parameter.device)
    return product.T if isinstance(model.get_submodule(layer), Conv1D) else product
