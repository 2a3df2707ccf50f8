"""Loading a causal language model: a model folder, or a PEFT folder over its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from foretune.adapters.peft_format import check_base
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from foretune.models.loading import load_model


def load_generator(name: str | Path, base: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """Loads a causal language model, or a base with the adapter of a PEFT folder.

    Args:
        name: A model folder, a hub id, or a PEFT folder.
        base: The base of an adapter; None for the one that its folder names.

    Returns:
        (model in eval mode, its tokenizer or None). With an adapter the model is a `PeftModel`,
        whose `disable_adapter()` restores the base.

    Raises:
        UserError: The model does not exist, or the adapter has no safetensors file or belongs to
            another base.
    """
    folder = Path(name).expanduser()
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        return load_model(name, head="causal-lm")
    if not (folder / ADAPTER_WEIGHTS_FILE).is_file():
        raise UserError(f"{folder} has no {ADAPTER_WEIGHTS_FILE}; other formats are not supported")
    tokenizer = None
    if base is None:
        base, tokenizer = load_model(_base_of(folder), head="causal-lm")
    return with_adapter(base, folder), tokenizer


def with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """A PeftModel in eval mode: `base` with the adapter of a folder.

    Raises:
        UserError: The adapter belongs to another base, or does not fit it.
    """
    from peft import PeftModel

    check_base(folder, base)
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter {folder} does not fit its base: {reason}") from error


def _base_of(folder: Path) -> str:
    file = folder / ADAPTER_CONFIG_FILE
    base = json.loads(file.read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{file} names no base_model_name_or_path: give the base")
    return str(base)
