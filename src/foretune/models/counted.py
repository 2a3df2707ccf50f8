"""Logits at selected positions only: the vocabulary is the widest layer of a small decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foretune.models.calls import replaced_forward


def logits_at(model: Any, counted: Tensor, **inputs: Any) -> Tensor:
    """The logits at the counted positions, computed for these alone where possible.

    During the call the model's output layer sees only these positions. A layer that carries
    adapters (its `forward` is replaced) needs all of them, to know which task owns each.

    Args:
        model: A language model.
        counted: (n, L) bool, true at the positions that count.
        **inputs: Arguments of the call; the model's hidden states have the shape (n, L, d).

    Returns:
        (K, vocabulary) for the K counted positions, row by row.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or "forward" in vars(head):
        return _logits(model(**inputs))[counted]
    real = head.forward

    def forward(hidden: Tensor) -> Tensor:
        # Another shape: the rows are computed in groups and put together afterwards.
        return real(hidden[counted] if hidden.shape[:-1] == counted.shape else hidden)

    with replaced_forward(head, forward):
        logits = _logits(model(**inputs))
    return logits if logits.dim() == 2 else logits[counted]


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
