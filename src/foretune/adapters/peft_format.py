"""Saving one slot of a bank as a folder that stock PEFT loads, and loading such a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from foretune.adapters.bank import AdapterBank
from foretune.adapters.peft_names import (
    PREFIX,
    auto_fields,
    renamed_targets,
    stored_heads,
    stored_targets,
)
from foretune.adapters.stored_adapter import FINGERPRINT_FILE, StoredAdapter, read_adapter
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from foretune.formats import ADAPTER, stamped
from foretune.manifest import final_path

# What adapters of a bank share.
FIELDS = (
    *("r", "lora_alpha", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)


def peft_config(bank: AdapterBank, model: nn.Module, base: str | None) -> dict[str, Any]:
    """The `adapter_config.json` of every slot of this bank.

    The adapted modules are listed by their full names, so that PEFT adapts on loading exactly the
    modules that were trained.
    """
    lora = dict(bank.lora or {})
    modules = dict(model.named_modules())
    heads = stored_heads(bank.head_names, modules)
    renamed = renamed_targets(bank.layer_names, model)
    parameters = [f"{name}.weight" for name in bank.layer_names if name in renamed]
    config = LoraConfig(
        r=lora.get("r", 8),
        lora_alpha=lora.get("lora_alpha", 8),
        # PEFT takes no dropout beside target_parameters; it only matters to further training.
        lora_dropout=0.0 if parameters else lora.get("lora_dropout", 0.0),
        use_rslora=lora.get("use_rslora", False),
        target_modules=stored_targets(
            [name for name in bank.layer_names if name not in renamed], modules, heads
        ),
        target_parameters=parameters or None,
        modules_to_save=heads or None,
        fan_in_fan_out=any(type(modules[n]).__name__ == "Conv1D" for n in bank.layer_names),
        inference_mode=True,
        base_model_name_or_path=None if base is None else final_path(base),
        **auto_fields(model, bank.head_names),
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


def bank_like(model: nn.Module, stored: StoredAdapter, keys: Sequence[str]) -> AdapterBank:
    """A bank whose slots have the layers and heads of a stored adapter, not yet its values.

    Raises:
        UserError: It is not LoRA of one rank, or heads alone.
    """
    config = stored.config
    if (feature := stored.beyond_plain_lora()) is not None:
        raise UserError(f"the bank has no adapters with {feature}")
    lora = {name: config[name] for name in FIELDS if config.get(name) is not None}
    names = [name for name, _ in model.named_modules()]
    heads = [  # PEFT lists those that a classifier may have
        head
        for head in (name.removeprefix(PREFIX) for name in config.get("modules_to_save") or ())
        if any(name == head or name.endswith(f".{head}") for name in names)
    ]
    has_layers = any(".lora_A." in name for name in stored.tensors)
    return AdapterBank(model, keys, lora=lora if has_layers else None, heads=heads)


def load_adapter(
    bank: AdapterBank, slot: int, folder: Path, model: nn.Module, *, allow_unverified: bool = False
) -> None:
    """Loads a PEFT folder into one slot.

    Args:
        bank: A bank of the same modules and ranks as the folder's adapter.
        slot: The slot that is overwritten.
        folder: A PEFT folder, written by foretune or by PEFT.
        model: The base; if the folder records a fingerprint, it must be this model's.
        allow_unverified: Whether to take a folder that records none.

    Raises:
        UserError: As `read_adapter`, or the adapter has other modules or another rank.
    """
    folder = Path(folder)
    tensors = read_adapter(folder, model, allow_unverified=allow_unverified).tensors
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
