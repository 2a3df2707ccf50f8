"""Logits at the positions that count alone: a vocabulary is the widest layer of a small decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foretune.models.calls import replaced_forward


def logits_at(model: Any, counted: Tensor, **inputs: Any) -> Tensor:
    """The model's logits at the positions that count, computed nowhere else where that can be.

    For the length of the call the model's output layer sees those positions only. A layer that
    carries adapters (its `forward` is replaced) needs to see all of them, to know whose they are.

    Args:
        model: A language model.
        counted: (n, L) bool.
        **inputs: Of the call; the model's hidden states have the shape (n, L, d).

    Returns:
        (K, vocabulary), K the number of positions that count, row after row.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or "forward" in vars(head):
        return _logits(model(**inputs))[counted]
    real = head.forward

    def forward(hidden: Tensor) -> Tensor:
        # Another shape: the rows are computed in groups, and put together afterwards.
        return real(hidden[counted] if hidden.shape[:-1] == counted.shape else hidden)

    with replaced_forward(head, forward):
        logits = _logits(model(**inputs))
    return logits if logits.dim() == 2 else logits[counted]


def _logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found
