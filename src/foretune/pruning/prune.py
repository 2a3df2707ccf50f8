"""Pruning by any method: collect statistics on a task's examples, plan, apply, save."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.models.loading import load_model
from foretune.models.quantised import refuse_quantised
from foretune.pruning.budgets import counts_of
from foretune.pruning.experts import ExpertBlock, find_blocks
from foretune.pruning.plan import apply_plan
from foretune.pruning.pruned import Pruned
from foretune.pruning.statistics import Collector, ExpertStatistics
from foretune.tasks.batch import Batch
from foretune.tasks.objectives.causal_lm import CausalLM

Examples = Sequence[str | Mapping[str, Any]]


def prune_mixture(
    model: nn.Module | str | PathLike[str],
    rows: Examples,
    method: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_tokens: int = 512,
) -> Pruned:
    """Collect statistics on a task's examples and prune a copy of the model by a method.

    Args:
        model: A mixture of experts, or its Hugging Face folder, which is loaded in its own dtype. A
            model object is left unchanged; its copy needs as much memory again.
        rows: The task's examples: texts, or mappings with `text`, or `prompt` and `completion`.
        method: A record whose verb is `prune`: it has `experts`, `needs_outputs` and `plan`.
        tokenizer: Tokenizer of a model object; a folder's own by default.
        batch_size: Examples per forward pass.
        max_tokens: Maximum length of an example; longer ones are truncated.

    Raises:
        UserError: There are no examples, no tokenizer or no experts in the model, or the
            architecture cannot have that number of experts.
    """
    original, tokenizer = load_if_path(model, tokenizer)
    blocks = find_blocks(original)
    counts_of(method.experts, blocks, grouped=not method.keeps_router, budget=method.budget)
    started = time.perf_counter()
    statistics = collect_statistics(
        original,
        rows,
        tokenizer,
        outputs=method.needs_outputs,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    seconds = {"statistics_seconds": round(time.perf_counter() - started, 3)}
    pruned = prune_with(
        original,
        statistics,
        method,
        tokenizer=tokenizer,
        in_place=not isinstance(model, nn.Module),
    )
    pruned.cost = seconds | pruned.cost
    return pruned


def prune_with(
    model: nn.Module,
    statistics: dict[str, ExpertStatistics],
    method: Any,
    *,
    tokenizer: Any = None,
    in_place: bool = False,
    after_block: Callable[[ExpertBlock], None] = lambda _: None,
) -> Pruned:
    """Prune a copy of the model, or the model in place, by statistics collected earlier.

    `after_block` is called with each block that has been pruned.
    """
    started = time.perf_counter()
    refuse_quantised(model, "pruning", "prune the original")
    blocks = find_blocks(model)
    plan = method.plan(blocks, statistics)
    before = _size(model, blocks)
    smaller = model if in_place else copy.deepcopy(model)
    apply_plan(smaller, plan, after_block)
    after = {
        "parameters": sum(p.numel() for p in smaller.parameters()),
        "experts": [len(block.groups) for block in plan.values()],
    }
    tokens = next(iter(statistics.values())).num_tokens
    cost = {"tokens": tokens, "prune_seconds": round(time.perf_counter() - started, 3)}
    return Pruned(
        model=smaller.eval(),
        tokenizer=tokenizer,
        method=method,
        plan=plan,
        size={"before": before, "after": after},
        cost=cost,
        statistics=statistics,
    )


def load_if_path(model: nn.Module | str | PathLike[str], tokenizer: Any) -> tuple[nn.Module, Any]:
    """A model and its tokenizer, loaded if `model` is a folder or hub id."""
    if isinstance(model, nn.Module):
        return model, tokenizer
    loaded, folder_tokenizer = load_model(str(model), head="causal-lm", dtype="auto")
    return loaded, tokenizer or folder_tokenizer


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    examples: Examples,
    tokenizer: Any,
    *,
    outputs: bool,
    batch_size: int = 8,
    max_tokens: int = 512,
) -> dict[str, ExpertStatistics]:
    """Statistics of every block on the examples, by block name."""
    objective = CausalLM(tokenizer, max_tokens=max_tokens)
    batches = batches_of(objective, examples, batch_size)
    was_training = model.training
    model.eval()
    with Collector(find_blocks(model), outputs=outputs) as collector:
        for batch in batches:
            collector.mask, collector.decoder_mask = _masks(model, batch)
            objective.losses(model, batch.to(_device(model)))
    model.train(was_training)
    return collector.statistics


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Examples,
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_tokens: int = 512,
) -> dict[str, float]:
    """loss: mean over examples of the mean nats per token; tokens_per_s of the forward passes."""
    objective = CausalLM(tokenizer, max_tokens=max_tokens)
    model.eval()
    losses, tokens, seconds = [], 0, 0.0
    for batch in batches_of(objective, examples, batch_size):
        started = time.perf_counter()
        losses += objective.losses(model, batch.to(_device(model))).tolist()
        seconds += time.perf_counter() - started
        tokens += batch.num_tokens
    return {"loss": float(np.mean(losses)), "tokens_per_s": tokens / seconds}


def batches_of(objective: CausalLM, examples: Examples, batch_size: int) -> list[Batch]:
    """The examples in batches of similar length.

    Raises:
        UserError: There are no examples, or no tokenizer.
    """
    if objective.tokenizer is None:
        raise UserError(
            "rows are texts and need the model's tokenizer: save it in the model's folder, or give "
            "tokenizer="
        )
    if isinstance(examples, str) or not examples:
        raise UserError(f"rows must be a non-empty list of texts or mappings; got {examples!r}")
    mappings = [{"text": e} if isinstance(e, str) else e for e in examples]
    encoded = sorted((objective.encode(e, "rows") for e in mappings), key=objective.size)
    batches = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
    return [objective.collate(batch, [0] * len(batch)) for batch in batches]


def _masks(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    if getattr(model.config, "is_encoder_decoder", False) and "target" in batch.inputs:
        # The decoder reads its start token and the shifted target, as many tokens as the target.
        return batch.inputs["source_mask"], batch.inputs["target"] >= 0
    return batch.inputs["attention_mask"], None


def _size(model: nn.Module, blocks: Sequence[ExpertBlock]) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "experts": [block.num_experts for block in blocks],
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
