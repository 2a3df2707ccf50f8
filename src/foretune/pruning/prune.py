"""What all methods of pruning a mixture share: statistics on a task's rows, a plan, its outcome."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.files import claim_model_folder, whole_folder
from foretune.models.loading import load_model, save_base
from foretune.pruning.experts import ExpertBlock, find_blocks
from foretune.pruning.plan import (
    PLAN_FILE,
    Plan,
    apply_plan,
    counts_of,
    loads_in_transformers,
    save_special,
)
from foretune.pruning.statistics import Collector, ExpertStatistics
from foretune.tasks.batch import Batch
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.training.record import environment

Rows = Sequence[str | Mapping[str, Any]]


@dataclass
class Pruned:
    """The result of `prune`.

    Args:
        model: The smaller model.
        tokenizer: Saved beside it, if any.
        method: The method's record.
        plan: What became of the experts of each block.
        size: parameters and experts, before and after.
        cost: seconds of collecting statistics and of pruning, tokens read.
        statistics: Of each block, on the rows.
        scores: Held-out losses, where the caller measured some; kept in experts.json.
    """

    model: nn.Module
    tokenizer: Any
    method: Any
    plan: Plan
    size: dict[str, Any]
    cost: dict[str, Any]
    statistics: dict[str, ExpertStatistics] = field(repr=False)
    scores: dict[str, Any] = field(default_factory=dict)

    @property
    def loads_with(self) -> str:
        """ "transformers" where its config can say what was made of the model, else "foretune"."""
        return "transformers" if loads_in_transformers(self.model, self.plan) else "foretune"

    def record(self) -> dict[str, Any]:
        """What experts.json holds."""
        return {
            "format": "foretune-experts-1",
            "loads_with": self.loads_with,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "method": self.method.to_dict(),
            "size": self.size,
            "cost": self.cost,
            "scores": self.scores,
            "blocks": {name: block.to_dict() for name, block in self.plan.items()},
            "environment": environment(),
        }

    def save(self, folder: Path | str, *, overwrite: bool = False) -> Path:
        """Writes a model folder and the list of experts beside it, whole or not at all.

        Returns:
            The folder. `AutoModelForCausalLM.from_pretrained` loads it where `loads_with` is
            "transformers"; `foretune.load_model(folder, head="causal-lm")` loads either kind.

        Raises:
            UserError: Something is in the folder and `overwrite` is not set, or it is set and the
                folder holds no pruned model.
        """
        folder = Path(folder)
        claim_model_folder(folder, PLAN_FILE, overwrite=overwrite)
        with whole_folder(folder) as part:
            if self.loads_with == "transformers":
                save_base(self.model, self.tokenizer, part)
            else:
                save_special(self.model, part)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(part)
            (part / PLAN_FILE).write_text(json.dumps(self.record(), indent=1) + "\n", "utf-8")
        return folder


def prune_mixture(
    model: nn.Module | str | PathLike[str],
    rows: Rows,
    method: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_tokens: int = 512,
) -> Pruned:
    """Collects statistics on the rows and prunes a copy of the model as the method says.

    Args:
        model: A mixture of experts, or its Hugging Face folder, which is read in its own dtype. A
            model is left as it is; its copy needs as much memory again.
        rows: Texts, or mappings with `text`, or `prompt` and `completion`.
        method: A record whose verb is `prune`: it has `experts`, `needs_outputs` and `plan`.
        tokenizer: Of a model that is given as such.
        batch_size: Rows in one forward pass.
        max_tokens: Longest row; what is beyond is cut.

    Raises:
        UserError: No rows, no tokenizer, a model without experts, or a number of experts that the
            architecture cannot have.
    """
    given, tokenizer = opened(model, tokenizer)
    blocks = find_blocks(given)
    counts_of(method.experts, blocks, grouped=not method.keeps_router)
    started = time.perf_counter()
    found = statistics_of(
        given,
        rows,
        tokenizer,
        outputs=method.needs_outputs,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    seconds = {"statistics_seconds": round(time.perf_counter() - started, 3)}
    pruned = prune_with(
        given, found, method, tokenizer=tokenizer, in_place=not isinstance(model, nn.Module)
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
) -> Pruned:
    """Prunes by statistics that are known already."""
    started = time.perf_counter()
    blocks = find_blocks(model)
    plan = method.plan(blocks, statistics)
    before = _size(model, blocks)
    smaller = model if in_place else copy.deepcopy(model)
    apply_plan(smaller, plan)
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


def opened(model: nn.Module | str | PathLike[str], tokenizer: Any) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, read from a folder if need be."""
    if isinstance(model, nn.Module):
        return model, tokenizer
    loaded, own = load_model(str(model), head="causal-lm", dtype="auto")
    return loaded, tokenizer or own


@torch.no_grad()
def statistics_of(
    model: nn.Module,
    rows: Rows,
    tokenizer: Any,
    *,
    outputs: bool,
    batch_size: int = 8,
    max_tokens: int = 512,
) -> dict[str, ExpertStatistics]:
    """The statistics of every block on the rows, by the block's name."""
    objective = CausalLM(tokenizer, max_tokens=max_tokens)
    batches = batches_of(objective, rows, batch_size)
    was_training = model.training
    model.eval()
    with Collector(find_blocks(model), outputs=outputs) as collector:
        for batch in batches:
            collector.mask, collector.decoder_mask = _masks(model, batch)
            objective.losses(model, batch.to(_device(model)))
    model.train(was_training)
    return collector.found


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    rows: Rows,
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_tokens: int = 512,
) -> dict[str, float]:
    """loss: mean over rows of the mean nats per token; tokens_per_s of those forward passes."""
    objective = CausalLM(tokenizer, max_tokens=max_tokens)
    model.eval()
    losses, tokens, seconds = [], 0, 0.0
    for batch in batches_of(objective, rows, batch_size):
        started = time.perf_counter()
        losses += objective.losses(model, batch.to(_device(model))).tolist()
        seconds += time.perf_counter() - started
        tokens += batch.num_tokens
    return {"loss": float(np.mean(losses)), "tokens_per_s": tokens / seconds}


def batches_of(objective: CausalLM, rows: Rows, batch_size: int) -> list[Batch]:
    """The rows in batches, those of like length together.

    Raises:
        UserError: No rows, or no tokenizer.
    """
    if objective.tokenizer is None:
        raise UserError(
            "rows are texts and need the model's tokenizer: save it in the model's folder, or give "
            "tokenizer="
        )
    if isinstance(rows, str) or not rows:
        raise UserError(f"rows must be a list of texts or mappings, and not empty; got {rows!r}")
    examples = [{"text": row} if isinstance(row, str) else row for row in rows]
    encoded = sorted((objective.encode(row, "rows") for row in examples), key=objective.size)
    parts = [encoded[i : i + batch_size] for i in range(0, len(encoded), batch_size)]
    return [objective.collate(part, [0] * len(part)) for part in parts]


def _masks(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
    if getattr(model.config, "is_encoder_decoder", False) and "target" in batch.inputs:
        # the decoder reads its start token and the target shifted by one: as many as the target
        return batch.inputs["source_mask"], batch.inputs["target"] >= 0
    return batch.inputs["attention_mask"], None


def _size(model: nn.Module, blocks: Sequence[ExpertBlock]) -> dict[str, Any]:
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "experts": [block.num_experts for block in blocks],
    }


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
