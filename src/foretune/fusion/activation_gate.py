"""Gates from a few inputs per task: the directions in which the task's activations stand out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.fusion.fused import Fused
from foretune.fusion.mixture import LowRankExperts, expert_layers, observe
from foretune.linalg.low_rank import leading_directions

RIDGE = 0.1  # as a share of the mean energy per direction
BATCH_SIZE = 8  # texts per forward pass
MAX_TOKENS = 4096  # tokens per task and layer whose inputs are recorded
MIN_TOKENS = 256  # of a model so large that all its layers' inputs would not fit in MEMORY
MEMORY = 2**31  # bytes of recorded inputs


def set_gates(fused: Fused, samples: Mapping[str, Sequence[Any]], rank: int, ridge: float) -> None:
    """Remake each layer's gate from its inputs while the task's own expert answers.

    Args:
        fused: Its layers are changed in place.
        samples: Task → texts, or batches (mappings that the model is called with).
        rank: Directions per gate, at most the layer's width.
        ridge: See `leading_directions`.

    Raises:
        UserError: Texts without a tokenizer.
    """
    widths = sum(layer.gate.shape[-1] for layer in expert_layers(fused.model).values())
    fitting = MEMORY // (4 * max(1, widths) * len(fused.names))
    limit = min(MAX_TOKENS, max(MIN_TOKENS, fitting))
    recorders = {task: _InputRecorder(limit) for task in fused.names}
    for task, recorder in recorders.items():
        fused.set_task(task).set_experts(task)
        with torch.no_grad(), observe(fused.model, recorder):
            for batch in batches(fused.tokenizer, samples[task]):
                fused.model(**batch)
    fused.set_experts(None)
    for head in fused.heads.values():
        head.selected = None
    for name, layer in expert_layers(fused.model).items():
        inputs = [recorders[task].inputs_of(name) for task in fused.names]
        # Centred on the mean over all tasks, so that the position of a task's own mean counts too.
        mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
        gate = leading_directions([x - mean for x in inputs], rank, ridge)
        layer.offset = nn.Parameter((gate @ mean).to(layer.gate))
        layer.gate = nn.Parameter(gate.to(layer.gate))


def batches(tokenizer: Any, samples: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """A task's samples as batches that the model can be called with.

    Raises:
        UserError: Texts without a tokenizer.
    """
    texts = [sample for sample in samples if isinstance(sample, str)]
    yield from (sample for sample in samples if not isinstance(sample, str))
    if texts and tokenizer is None:
        raise UserError("samples are texts and the base has no tokenizer: give tokenizer=")
    for start in range(0, len(texts), BATCH_SIZE):
        yield tokenizer(
            texts[start : start + BATCH_SIZE], padding=True, truncation=True, return_tensors="pt"
        )


class _InputRecorder:
    """Records inputs of each layer, without padding; of more than `limit` tokens a random part."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inputs: dict[str, Tensor] = {}
        self.keys: dict[str, Tensor] = {}  # a random number per token: the smallest ones stay
        self.generators: dict[str, torch.Generator] = {}

    def __call__(self, name: str, layer: LowRankExperts, x: Tensor, p: Tensor) -> None:
        tokens = layer.routing.tokens(x)
        new = (x.reshape(-1, x.shape[-1]) if tokens is None else x[tokens]).float().cpu()
        if name not in self.inputs:
            self.inputs[name], self.keys[name] = new[:0], torch.empty(0)
            self.generators[name] = torch.Generator().manual_seed(0)
        keys = torch.rand(len(new), generator=self.generators[name])
        keys, rows = torch.cat([self.keys[name], keys]), torch.cat([self.inputs[name], new])
        if len(keys) > self.limit:
            keys, order = keys.topk(self.limit, largest=False)
            rows = rows[order]
        self.inputs[name], self.keys[name] = rows, keys

    def inputs_of(self, name: str) -> Tensor:
        """Recorded inputs of a layer, (tokens, in).

        Raises:
            UserError: The layer was never called.
        """
        if name not in self.inputs:
            raise UserError(
                f"the samples never reach layer {name}; leave it out with exclude_modules"
            )
        return self.inputs[name]
