"""How many tokens a model can read at once, and how many it has embeddings for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from foretune.models.calls import eval_no_grad
from foretune.models.digests import text_tower

POSITION_NAMES = ("position_embedding", "embed_positions", "wpe", "pos_embed", "pos_emb")
OTHER_TOWERS = ("vision", "visual", "image", "audio")


def num_positions(model: nn.Module) -> int | None:
    """The most tokens that the model reads at once; None for no limit, as with relative positions.

    That is what its table of positions holds, or what a model with rotary positions was made for.
    """
    limits = [_usable(table) for table in _position_tables(model)]
    if limits:
        return min(limits)
    config = _text_config(model)
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or getattr(config, "alibi", False):
        return None
    rotary = any(name.startswith(("rope", "rotary")) for name in vars(config))
    return stated if rotary else None


def num_embeddings(model: nn.Module) -> int | None:
    """The number of token ids that the model has an embedding for; None if unknown."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        table = None
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    stated = getattr(_text_config(model), "vocab_size", None)
    return stated if isinstance(stated, int) else None


@torch.no_grad()
def reads(model: nn.Module, ids: Sequence[int]) -> bool:
    """Whether the model reads these token ids at once without an error."""
    row = torch.tensor([list(ids)], device=next(model.parameters()).device)
    inputs: dict[str, Any] = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    if getattr(_text_config(model), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = row
    with eval_no_grad(model):
        try:
            model(**inputs)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False
    return True


def pad_within(model: nn.Module, tokenizer: Any) -> None:
    """Gives the tokenizer a pad token that the model has an embedding for, in place.

    Padding is masked, so that any token will do; one that was added to the tokenizer alone would
    be looked up beyond the end of the table.
    """
    rows = num_embeddings(model)
    if tokenizer is None or rows is None or (tokenizer.pad_token_id or 0) < rows:
        return
    end = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0 if end is None or end >= rows else end)


def _text_config(model: nn.Module) -> Any:
    tower = text_tower(model)
    config: Any = getattr(model if tower is None else tower.encoder, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _position_tables(model: nn.Module) -> list[nn.Embedding]:
    """The tables of positions in the part of the model that reads text."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and any(part in name.rpartition(".")[2] for part in POSITION_NAMES)
        and not any(tower in name for tower in OTHER_TOWERS)
    ]


def _usable(table: nn.Embedding) -> int:
    """The number of positions of a table that a text can use.

    Its first rows are not used where positions are counted from an offset, as in OPT, or from the
    padding id, as in RoBERTa.
    """
    after_padding = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(getattr(table, "offset", after_padding))
