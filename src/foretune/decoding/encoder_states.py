"""States of an encoder: a text as one vector, for stores that classify.

An encoder (BERT and its like) outputs no next token, so its store has labels alone: λ is 1. A state
is the mean of the last hidden states of all tokens, scaled to unit length, as sentence encoders
such as MiniLM are trained to be compared: squared distances are 2 − 2 cos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from foretune.decoding.generation import device_of
from foretune.decoding.side_models import bare_model
from foretune.models.calls import eval_no_grad
from foretune.models.capacity import num_positions
from foretune.tasks.objectives import text

BATCH = 64  # texts in one forward call


def is_encoder(model: Any) -> bool:
    """Whether a model, or that of a config, reads texts both ways and does not continue them."""
    config = getattr(model, "config", model)
    return (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "is_decoder", False)
    )


def room_of(model: Any) -> int | None:
    """The most tokens that a model reads at once; None for no limit."""
    bare = bare_model(model)
    if is_encoder(bare):
        return num_positions(bare)
    room: int | None = getattr(getattr(bare, "config", None), "max_position_embeddings", None)
    return room


def encoder_states(model: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """(N, d) unit vectors of N texts, float32 on the CPU.

    Args:
        model: An encoder of transformers, with or without an adapter of peft.
        texts: Token ids, with the special tokens that the model expects.
    """
    bare = bare_model(model)
    body, device = bare.base_model, device_of(model)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # little padding
    states = torch.empty(len(texts), bare.config.hidden_size)
    with eval_no_grad(bare):
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = [texts[row] for row in rows]
            padded, mask = text.pad(batch, bare.config.pad_token_id or 0), text.pad_mask(batch)
            hidden = body(input_ids=padded.to(device), attention_mask=mask.to(device))
            pooled = text.mean_pool(hidden.last_hidden_state.float().cpu(), mask)
            states[rows] = F.normalize(pooled, dim=-1)
    return states
