"""Reading a LoRA configuration: those of PEFT's fields that the bank supports."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from foretune.errors import UserError, did_you_mean

SUPPORTED_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
IGNORED_FIELDS = (
    "task_type",
    "inference_mode",
    "peft_type",
    "base_model_name_or_path",
    "fan_in_fan_out",
)
ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output embeddings


def lora_fields(lora: Any) -> dict[str, Any]:
    """The fields of a LoRA configuration that differ from PEFT's defaults, as a plain dict.

    All that can be checked without a model is checked here, before any data is read.

    Args:
        lora: A mapping of `peft.LoraConfig` fields, or a `peft.LoraConfig`.

    Raises:
        UserError: A field that PEFT does not have, or one that the bank does not support; or a
            value that the field does not take.
    """
    if not isinstance(lora, Mapping):
        lora = _changed_fields(lora)
    for name in lora:
        if name not in SUPPORTED_FIELDS:
            raise UserError(
                f'lora field "{name}" is not supported; supported are '
                f"{', '.join(SUPPORTED_FIELDS)}.{did_you_mean(name, SUPPORTED_FIELDS)}"
            )
    fields = {
        k: sorted(v) if isinstance(v, set) else list(v) if isinstance(v, tuple) else v
        for k, v in lora.items()
    }
    _check_numbers(fields)
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        check_names(f"lora {name}", fields.get(name), pattern=True)
    check_names("lora modules_to_save", fields.get("modules_to_save"), pattern=False)
    _check_layers(fields)
    return fields


def _check_numbers(fields: Mapping[str, Any]) -> None:
    r = fields.get("r", 8)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UserError(f"lora r (the rank) must be a whole number not below 1, got {r!r}")
    alpha = fields.get("lora_alpha", 8)
    if not _is_finite(alpha) or alpha <= 0:
        raise UserError(f"lora_alpha must be a number above 0, got {alpha!r}")
    dropout = fields.get("lora_dropout", 0.0)
    if not _is_finite(dropout) or not 0 <= dropout < 1:
        raise UserError(f"lora_dropout must be at least 0 and below 1, got {dropout!r}")
    rslora = fields.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise UserError(f"lora use_rslora must be true or false, got {rslora!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_names(field: str, value: Any, *, pattern: bool) -> None:
    """Checks a field that names modules: a list of names, or one string.

    Args:
        field: The field, for the message.
        value: Its value; None for a field that is not set.
        pattern: Whether a string is allowed, which PEFT reads as a regular expression.

    Raises:
        UserError: It is neither, is empty, or is not a valid regular expression.
    """
    if value is None:
        return
    if isinstance(value, list) and all(isinstance(name, str) and name for name in value):
        if not value and field.endswith("target_modules"):
            raise UserError(f"{field} is empty: name at least one module, or leave it out")
    elif not (pattern and isinstance(value, str) and value):
        kinds = "a list of names or a regular expression" if pattern else "a list of names"
        raise UserError(f"{field} must be {kinds}, got {value!r}")
    patterns = [value] if isinstance(value, str) else value if field.endswith("pattern") else []
    for regex in patterns:
        try:
            re.compile(regex)
        except re.error as error:
            raise UserError(f"{field} {regex!r} is not a regular expression: {error}") from None


def _check_layers(fields: Mapping[str, Any]) -> None:
    """Checks `layers_to_transform`, and that PEFT takes it together with the other fields.

    Raises:
        UserError: It is no layer number, or `target_modules` or `layers_pattern` do not fit it.
    """
    layers = fields.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise UserError(
            "lora layers_to_transform must be a layer's number from 0, or a list of them, got "
            f"{layers!r}"
        )
    if fields.get("layers_pattern") and not numbers:
        raise UserError(
            "lora layers_pattern only says where the numbers of layers_to_transform stand: give "
            "layers_to_transform too"
        )
    targets = fields.get("target_modules")
    if numbers and isinstance(targets, str):
        raise UserError(
            f"lora layers_to_transform does not go with target_modules={targets!r}: list names, "
            "leave target_modules out, or put the layers into the regular expression"
        )


def lora_scale(lora: Mapping[str, Any]) -> float:
    """lora_alpha / r, or lora_alpha / √r with rsLoRA (arXiv:2312.03732)."""
    r = int(lora.get("r", 8))
    return float(lora.get("lora_alpha", 8)) / (r**0.5 if lora.get("use_rslora") else r)


def _changed_fields(config: Any) -> dict[str, Any]:
    """The fields of a `peft.LoraConfig` that differ from the defaults and concern the adapter.

    Raises:
        UserError: It is something else.
    """
    peft = sys.modules.get("peft")  # not imported for a typing mistake, which takes seconds
    if peft is None or not isinstance(config, peft.LoraConfig):
        raise UserError(
            "lora must be a peft.LoraConfig or a mapping of its fields, "
            f"got {type(config).__name__}"
        )
    default = peft.LoraConfig().to_dict()
    return {
        k: v for k, v in config.to_dict().items() if v != default.get(k) and k not in IGNORED_FIELDS
    }
