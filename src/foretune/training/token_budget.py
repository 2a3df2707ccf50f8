"""How many tokens go through the model at a time where the run does not say it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Conv1D


def default_token_budget(model: nn.Module) -> int | None:
    """Tokens per chunk that keep the widest activation under 32 MB on a CPU.

    A CPU's allocator maps larger ones anew in every step, page by page, which costs more than the
    arithmetic. None on other devices, and for models that do not read tokens.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "vocab_size", None) is None or next(model.parameters()).device.type != "cpu":
        return None
    widths = [
        max(m.weight.shape)
        for m in model.modules()
        if isinstance(m, (nn.Linear, Conv1D)) and config.vocab_size not in m.weight.shape
    ]
    return 32 * 2**20 // (4 * max(widths)) if widths else None
