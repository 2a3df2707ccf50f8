"""A causal language model from a folder: a model's own, or a PEFT folder over its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from foretune.adapters.peft_format import check_base
from foretune.errors import UserError
from foretune.models.loading import load_model

CONFIG = "adapter_config.json"


def load_generator(name: str | Path, base: nn.Module | None = None) -> tuple[nn.Module, Any]:
    """Loads a causal language model, or a base with the adapter of a PEFT folder on it.

    Args:
        name: A model folder, a hub id, or a PEFT folder.
        base: What an adapter goes on; None for the base that its folder names.

    Returns:
        (model in eval mode, its tokenizer or None). With an adapter the model is a `PeftModel`,
        whose `disable_adapter()` gives the base back.

    Raises:
        UserError: No such model, an adapter without safetensors, or one of another base.
    """
    folder = Path(name).expanduser()
    if not (folder / CONFIG).is_file():
        return load_model(name, head="causal-lm")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors; no other format is read")
    tokenizer = None
    if base is None:
        base, tokenizer = load_model(_base_of(folder), head="causal-lm")
    return with_adapter(base, folder), tokenizer


def with_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """A PeftModel of `base` with the adapter of a folder, which must fit.

    Raises:
        UserError: The adapter belongs to another base.
    """
    from peft import PeftModel

    config = json.loads((folder / CONFIG).read_text("utf-8"))
    check_base(folder, base, tuple(config.get("modules_to_save") or ()))
    try:
        return PeftModel.from_pretrained(base, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter {folder} does not fit its base: {reason}") from error


def _base_of(folder: Path) -> str:
    named = json.loads((folder / CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    if not named:
        raise UserError(f"{folder / CONFIG} names no base_model_name_or_path: give its base")
    return str(named)
