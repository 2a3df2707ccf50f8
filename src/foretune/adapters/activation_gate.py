"""Gates from a few inputs of each task: the directions in which its activations stand out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.linalg.low_rank import leading_directions
from foretune.models.fused import Fused
from foretune.models.mixture import LowRankExperts, expert_layers, observe

BATCH = 8  # texts a pass


def set_gates(
    fused: Fused, samples: Mapping[str, Sequence[Any]], rank: int, ridge: float
) -> None:
    """Makes each layer's gate anew from the inputs that it gets when the task's expert answers.

    Args:
        fused: Its layers are changed in place.
        samples: Task → texts, or batches that the model is called with.
        rank: Directions of a gate, at most the layer's width.
        ridge: See `leading_directions`.

    Raises:
        UserError: Texts without a tokenizer.
    """
    moments = {task: _Moments() for task in fused.names}
    for task, moment in moments.items():
        fused.set_task(task).set_experts(task)
        with torch.no_grad(), observe(fused.model, moment):
            for batch in _batches(fused, samples[task]):
                fused.model(**batch)
    fused.set_experts(None)
    for head in fused.heads.values():
        head.selected = None
    for name, layer in expert_layers(fused.model).items():
        found = [moments[task].of(name) for task in fused.names]
        mean = torch.stack([mean for mean, _ in found]).mean(0)
        # Second moments about the mean of all tasks: where a task's own mean lies counts too.
        about = [
            second - torch.outer(own, mean) - torch.outer(mean, own) + torch.outer(mean, mean)
            for own, second in found
        ]
        pooled = torch.stack(about).mean(0)
        gate = torch.stack([leading_directions(m, pooled, rank, ridge) for m in about])
        kind = {"device": layer.gate.device, "dtype": layer.gate.dtype}
        layer.gate = nn.Parameter(gate.to(**kind))
        layer.offset = nn.Parameter((gate @ mean.float()).to(**kind))


def _batches(fused: Fused, rows: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    texts = [row for row in rows if isinstance(row, str)]
    yield from (row for row in rows if not isinstance(row, str))
    if texts and fused.tokenizer is None:
        raise UserError("samples are texts and the base has no tokenizer: give tokenizer=")
    for start in range(0, len(texts), BATCH):
        yield fused.tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
        )


class _Moments:
    """Sums of x and x xᵀ for each layer over the tokens that are no padding."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, Tensor, Tensor]] = {}

    def __call__(self, name: str, layer: LowRankExperts, x: Tensor, p: Tensor) -> None:
        tokens = layer.routing.tokens(x)
        rows = (x.reshape(-1, x.shape[-1]) if tokens is None else x[tokens]).cpu().double()
        count, first, second = self.sums.get(name, (0.0, 0.0, 0.0))
        self.sums[name] = (count + len(rows), first + rows.sum(0), second + rows.T @ rows)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """(mean, second moment) of a layer's inputs."""
        if name not in self.sums:
            raise UserError(f"the samples never reach layer {name}; leave it out: exclude_modules")
        count, first, second = self.sums[name]
        return first / count, second / count
