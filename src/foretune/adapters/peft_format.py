"""Saving one slot of a bank as a folder that stock PEFT loads, and loading such a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typing_extensions import TypedDict

from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import base_record, is_base
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from foretune.formats import ADAPTER, read_json, stamped

PREFIX = "base_model.model."
FINGERPRINT_FILE = "base_fingerprint.json"


def peft_config(bank: AdapterBank, model: nn.Module, base: str | None) -> dict[str, Any]:
    """The `adapter_config.json` of every slot of this bank.

    The adapted modules are listed by their full names, so that PEFT adapts on loading exactly the
    modules that were trained.
    """
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES  # not exported; its word for none

    lora = dict(bank.lora or {})
    modules = dict(model.named_modules())
    config = LoraConfig(
        r=lora.get("r", 8),
        lora_alpha=lora.get("lora_alpha", 8),
        lora_dropout=lora.get("lora_dropout", 0.0),
        use_rslora=lora.get("use_rslora", False),
        target_modules=bank.layer_names or DUMMY_TARGET_MODULES,
        modules_to_save=list(bank.head_names) or None,
        fan_in_fan_out=any(type(modules[n]).__name__ == "Conv1D" for n in bank.layer_names),
        inference_mode=True,
        base_model_name_or_path=base,
    )
    fields = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}


def peft_tensors(bank: AdapterBank, slot: int) -> dict[str, Tensor]:
    """The tensors of one slot, by PEFT's parameter names."""
    tensors: dict[str, Tensor] = {}
    for name in bank.layer_names:
        a, b = bank.factors(name, slot)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    for name in bank.head_names:
        for key, value in bank.head_state(name, slot).items():
            tensors[f"{PREFIX}{name}.{key}"] = value
    return {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], base: Mapping[str, Any]
) -> None:
    """Writes a PEFT folder, together with the `base_record` of the base that it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG_FILE).write_text(
        json.dumps(config, indent=2, sort_keys=True, default=str)
    )
    (folder / FINGERPRINT_FILE).write_text(json.dumps(stamped(base, ADAPTER), indent=1))


def load_adapter(bank: AdapterBank, slot: int, folder: Path, model: nn.Module) -> None:
    """Loads a PEFT folder into one slot.

    Args:
        bank: A bank of the same modules and ranks as the folder's adapter.
        slot: The slot that is overwritten.
        folder: A PEFT folder, written by foretune or by PEFT.
        model: The base; if the folder records a fingerprint, it must be this model's.

    Raises:
        UserError: The folder holds no adapter, or one of another base, other modules or another
            rank.
    """
    folder = Path(folder)
    file = folder / ADAPTER_WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"{folder} is not an adapter: it has no {ADAPTER_WEIGHTS_FILE}")
    check_base(folder, model)
    tensors = load_file(file)
    slot_tensors = peft_tensors(bank, slot)
    if set(slot_tensors) != set(tensors):
        odd = sorted(set(slot_tensors) ^ set(tensors))[0]
        where = "the folder" if odd in tensors else "the bank"
        raise UserError(
            f"{folder} does not fit this bank: only {where} has {odd.removeprefix(PREFIX)}; "
            "target_modules and heads must be those of the adapter"
        )
    for key, value in tensors.items():
        if value.shape != slot_tensors[key].shape:
            raise UserError(
                f"{folder} does not fit this bank: {key.removeprefix(PREFIX)} has shape "
                f"{tuple(value.shape)}, the bank's has {tuple(slot_tensors[key].shape)}"
            )
    with torch.no_grad():
        for name in bank.layer_names:
            bank.set_factors(
                name,
                slot,
                tensors[f"{PREFIX}{name}.lora_A.weight"],
                tensors[f"{PREFIX}{name}.lora_B.weight"],
            )
        for name in bank.head_names:
            for key, value in bank.head_state(name, slot).items():
                value.copy_(tensors[f"{PREFIX}{name}.{key}"])


class BaseRecord(TypedDict):
    """The content of `base_fingerprint.json`; see `foretune.adapters.fingerprint`.

    The first version holds only `base`, one digest.
    """

    base: dict[str, str] | str
    dtypes: NotRequired[list[str]]
    without: NotRequired[list[str]]
    model_class: NotRequired[str]


class _Heads(TypedDict):
    modules_to_save: NotRequired[list[str] | None]


def read_base_record(folder: Path) -> BaseRecord | None:
    """What an adapter's folder records of its base; None where it records nothing.

    Raises:
        UserError: The record is damaged, or a newer foretune wrote it.
    """
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        return None
    record = read_json(file, BaseRecord, ADAPTER)
    if "without" not in record:
        heads = read_json(folder / ADAPTER_CONFIG_FILE, _Heads)
        record["without"] = heads.get("modules_to_save") or []
    return record


def check_base(folder: Path, model: nn.Module) -> None:
    """Refuses an adapter that was trained on another base.

    All retrained bases of one model have the same shapes, so no other check would detect it.

    Raises:
        UserError: The folder records a fingerprint that is not that of `model`.
    """
    record = read_base_record(Path(folder))
    if record is None or is_base(model, record):
        return
    expected = record["base"]
    if isinstance(expected, dict):
        expected = expected.get("float32", "")
    actual = base_record(model, record["without"])["base"]["float32"]
    raise UserError(
        f"{folder} was trained on another base (fingerprint {expected[:12]}, this base has "
        f"{actual[:12]}); load the base that it was adapted from"
    )
