"""Gates from a few inputs of each task: the directions in which its activations stand out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.fusion.fused import Fused
from foretune.fusion.mixture import LowRankExperts, expert_layers, observe
from foretune.linalg.low_rank import leading_directions

BATCH = 8  # texts a pass
ROWS = 256  # tokens of a task that a layer remembers


def set_gates(fused: Fused, samples: Mapping[str, Sequence[Any]], rank: int, ridge: float) -> None:
    """Makes each layer's gate anew from the inputs that it gets when the task's expert answers.

    Args:
        fused: Its layers are changed in place.
        samples: Task → texts, or batches that the model is called with.
        rank: Directions of a gate, at most the layer's width.
        ridge: See `leading_directions`.

    Raises:
        UserError: Texts without a tokenizer.
    """
    inputs = {task: _Inputs() for task in fused.names}
    for task, seen in inputs.items():
        fused.set_task(task).set_experts(task)
        with torch.no_grad(), observe(fused.model, seen):
            for batch in _batches(fused, samples[task]):
                fused.model(**batch)
    fused.set_experts(None)
    for head in fused.heads.values():
        head.selected = None
    for name, layer in expert_layers(fused.model).items():
        rows = [inputs[task].of(name) for task in fused.names]
        # About the mean of all tasks, so that where a task's own mean lies counts too.
        mean = torch.stack([r.mean(0) for r in rows]).mean(0)
        gate = leading_directions([r - mean for r in rows], rank, ridge)
        layer.offset = nn.Parameter((gate @ mean).to(layer.gate))
        layer.gate = nn.Parameter(gate.to(layer.gate))


def _batches(fused: Fused, rows: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    texts = [row for row in rows if isinstance(row, str)]
    yield from (row for row in rows if not isinstance(row, str))
    if texts and fused.tokenizer is None:
        raise UserError("samples are texts and the base has no tokenizer: give tokenizer=")
    for start in range(0, len(texts), BATCH):
        yield fused.tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
        )


class _Inputs:
    """The first inputs of each layer, padding left out."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def __call__(self, name: str, layer: LowRankExperts, x: Tensor, p: Tensor) -> None:
        tokens = layer.routing.tokens(x)
        rows = (x.reshape(-1, x.shape[-1]) if tokens is None else x[tokens]).float().cpu()
        known = self.rows.get(name)
        self.rows[name] = (rows if known is None else torch.cat([known, rows]))[:ROWS]

    def of(self, name: str) -> Tensor:
        """(tokens, in)."""
        if name not in self.rows:
            raise UserError(f"the samples never reach layer {name}; leave it out: exclude_modules")
        return self.rows[name]
