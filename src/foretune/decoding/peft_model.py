"""Loading a causal language model: a model folder, or a PEFT folder over its base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foretune.adapters.config_file import read_config
from foretune.adapters.stored_adapter import StoredAdapter, read_adapter
from foretune.decoding.encoder_states import is_encoder
from foretune.errors import ForetuneError, UserError
from foretune.files import ADAPTER_CONFIG_FILE, MODULE_FILE
from foretune.models import pretrained
from foretune.models.loading import load_model, locate
from foretune.models.precision import device_around
from foretune.models.trusted_code import is_trusted
from foretune.printable import in_one_line
from foretune.training.loop import check_device


def load_generator(
    name: str | Path,
    base: nn.Module | None = None,
    *,
    allow_unverified: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Loads a causal language model, or a base with the adapter of a PEFT folder.

    It is placed on the device that `held_in` names, by default the CPU.

    Args:
        name: A model folder, a hub id, or a PEFT folder.
        base: The base of an adapter; None for the one that its folder names.
        allow_unverified: Whether to take an adapter that does not record its base.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        (model in eval mode, its tokenizer or None). With an adapter the model is a `PeftModel`,
        whose `disable_adapter()` restores the base.

    Raises:
        UserError: The model does not exist, the device is not available or has too little memory,
            or as `with_adapter`.
    """
    folder, device = Path(name).expanduser(), device_around()
    check_device(device)
    if not (folder / ADAPTER_CONFIG_FILE).is_file():
        model, tokenizer = load_model(name, head="causal-lm", trust_remote_code=trust_remote_code)
        return _placed(model, device), tokenizer
    tokenizer = None
    if base is None:
        base, tokenizer = load_model(
            _base_of(folder), head="causal-lm", trust_remote_code=trust_remote_code
        )
    model = with_adapter(base, folder, allow_unverified=allow_unverified)
    return _placed(model, device), tokenizer


def load_reader(name: str | Path, *, allow_unverified: bool = False) -> tuple[nn.Module, Any]:
    """Loads a model whose states go into a store: as `load_generator`, or an encoder as it is.

    Raises:
        UserError: As `load_generator`.
    """
    folder, trusted = Path(name).expanduser(), is_trusted(False)
    if (folder / ADAPTER_CONFIG_FILE).is_file() or (folder / MODULE_FILE).is_file():
        return load_generator(name, allow_unverified=allow_unverified)
    where = locate(str(name))
    with pretrained.quiet(), pretrained.user_errors(where):
        config = pretrained.read_config(where, trusted)
    if not is_encoder(config):
        return load_generator(name, allow_unverified=allow_unverified)
    device = device_around()
    check_device(device)
    model, tokenizer = load_model(name, trust_remote_code=trusted)
    return _placed(model, device), tokenizer


def _placed(model: nn.Module, device: str) -> nn.Module:
    """The model, moved to a device.

    Raises:
        UserError: It cannot be moved there.
    """
    try:
        return model.to(device)
    except (RuntimeError, ValueError) as error:  # too little memory, or layers that cannot move
        reason = in_one_line(str(error))[:200]
        raise UserError(f"the model cannot be placed on {device}: {reason}") from error


def with_adapter(base: nn.Module, folder: Path, *, allow_unverified: bool = False) -> nn.Module:
    """A PeftModel in eval mode: `base` with the adapter of a folder.

    Warns of an adapter that does not record its base, and of one that changes no output.

    Raises:
        UserError: The adapter is damaged, is of a kind that PEFT itself would not load from its
            folder alone, does not fit its base, or belongs to another one.
        ForetuneError: As `read_adapter`.
    """
    stored = read_adapter(folder, base, allow_unverified=allow_unverified)
    try:
        model = _wrapped(base, folder, stored)
    except ForetuneError:
        raise
    except Exception as error:  # whatever a value in its config makes of PEFT
        reason = in_one_line(str(error))[:200]
        raise UserError(f"the adapter {folder} does not fit its base: {reason}") from error
    notes = stored.notes if stored.is_zero else [*stored.notes, *_notes_on_effect(model, folder)]
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return model


def _wrapped(base: nn.Module, folder: Path, stored: StoredAdapter) -> Any:
    """The base with the adapter's layers, which hold its tensors.

    Raises:
        UserError: The adapter has tensors that the base does not have, or lacks some, or is no
            change of weights.
    """
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    config: Any = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning or config.peft_type == "XLORA":
        raise UserError(f"{folder} is a {config.peft_type.value} adapter, which is not supported")
    config.inference_mode = True
    model = PeftModel(base, config)
    result: Any = set_peft_model_state_dict(model, stored.tensors)
    parts = (model.base_model.prefix, ".modules_to_save.")
    missing = [key for key in result.missing_keys if any(part in key for part in parts)]
    if missing or result.unexpected_keys:
        what = "has no" if missing else "has, unlike its base,"
        name = (missing or result.unexpected_keys)[0].replace(".default", "")
        raise UserError(f"{folder} is not an adapter of this base: it {what} {name}")
    return model.eval()


@torch.no_grad()
def _notes_on_effect(model: Any, folder: Path) -> list[str]:
    """What to say of an adapter that changes no output for a few tokens."""
    embeddings = model.get_input_embeddings().weight
    ids = torch.arange(min(8, len(embeddings)), device=embeddings.device)[None]
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    adapted = model(**inputs).logits
    with model.disable_adapter():
        plain = model(**inputs).logits
    if not adapted.equal(plain):
        return []
    return [f"{folder}: the adapter has no effect: it changes no output for {ids.numel()} tokens"]


def _base_of(folder: Path) -> str:
    base = read_config(folder).get("base_model_name_or_path")
    if not base:
        file = folder / ADAPTER_CONFIG_FILE
        raise UserError(f"{file} names no base_model_name_or_path: give the base")
    return base
