"""What a language model could do before: the likelihood of general texts, before and after.

A base that is retrained on a pile of tasks, and then adapted, may become worse at everything else.
The score is the mean log-likelihood per token of texts that have nothing to do with the tasks; the
difference to the model as it was is taken text by text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from foretune.errors import UserError
from foretune.evaluation.statistics import mean_interval
from foretune.models.calls import eval_no_grad
from foretune.models.capacity import num_positions
from foretune.models.routing import routed
from foretune.tasks.objectives.causal_lm import CausalLM

BATCH = 8  # texts at once


def text_scores(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = 128
) -> np.ndarray:
    """The mean log-likelihood per token of each text.

    Args:
        model: A decoder.
        tokenizer: Its tokenizer.
        texts: n texts of two tokens or more.
        max_tokens: Longer texts lose their end.

    Returns:
        Shape (n,), float64, in nats.

    Raises:
        UserError: The model does not predict tokens, or a text is too short.
    """
    rows = encoded_texts(model, tokenizer, texts, max_tokens)
    objective = CausalLM(tokenizer, max_tokens=max_tokens)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    scores = np.zeros(len(rows))
    with eval_no_grad(model), routed(None, None):
        device = next(model.parameters()).device
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            batch = objective.collate([rows[i] for i in places], [0] * len(places)).to(device)
            scores[places] = objective.scores(model, batch).double().cpu().numpy()
    return scores


def encoded_texts(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_tokens: int = 128
) -> list[dict[str, Any]]:
    """The token ids of texts, cut to `max_tokens` and to what the model reads.

    Raises:
        UserError: As `text_scores`.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or tokenizer is None or model.config.is_encoder_decoder:  # type: ignore[union-attr]
        raise UserError(
            f"forgetting scores texts by a decoder that predicts tokens, which "
            f"{type(model).__name__} is not: leave forgetting out"
        )
    most = min(max_tokens, num_positions(model) or max_tokens)
    objective = CausalLM(tokenizer, max_tokens=most)
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            rows.append(objective.encode({"text": text}, ""))
        except UserError as error:
            reason = str(error).partition(": ")[2] or str(error)
            raise UserError(f"forgetting, text {number}: {reason}") from error
    return rows


def change(after: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """The mean difference of two (n,) scores of the same texts, with its 95 % interval."""
    mean, low, high = mean_interval((after - before)[:, None])
    return {"mean": mean, "low": low, "high": high}
