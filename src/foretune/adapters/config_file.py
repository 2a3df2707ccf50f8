"""PEFT's `adapter_config.json`: the fields that are read here, checked. Needs no PyTorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from foretune.adapters.config import check_names
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE
from foretune.formats import read_json


class AdapterConfig(TypedDict):
    """The fields of `adapter_config.json` that are read here."""

    peft_type: str
    base_model_name_or_path: NotRequired[str | None]
    r: NotRequired[int]
    lora_alpha: NotRequired[float | None]
    lora_dropout: NotRequired[float]
    use_rslora: NotRequired[bool]
    bias: NotRequired[str]
    fan_in_fan_out: NotRequired[bool]
    target_modules: NotRequired[str | list[str] | None]
    target_parameters: NotRequired[list[str] | None]
    exclude_modules: NotRequired[str | list[str] | None]
    modules_to_save: NotRequired[list[str] | None]
    layers_to_transform: NotRequired[int | list[int] | None]
    layers_pattern: NotRequired[str | list[str] | None]
    rank_pattern: NotRequired[dict[str, int]]
    alpha_pattern: NotRequired[dict[str, float]]
    megatron_config: NotRequired[dict[str, Any] | None]


def read_config(folder: Path) -> AdapterConfig:
    """The checked fields of a folder's `adapter_config.json`.

    Raises:
        UserError: The file is damaged, or a field has a value that PEFT does not take.
    """
    file = folder / ADAPTER_CONFIG_FILE
    fields = read_json(file, AdapterConfig)
    if fields.get("megatron_config"):  # for which PEFT imports a module that the file names
        raise UserError(f"{file}: adapters of Megatron layers are not read")
    names = ("target_modules", "exclude_modules", "layers_pattern")
    for name, value in ((n, fields.get(n)) for n in names):
        if value:  # PEFT also writes empty lists
            check_names(f"{file}: {name}", value, pattern=True)
    check_names(f"{file}: rank_pattern", list(fields.get("rank_pattern", ())), pattern=True)
    check_names(f"{file}: alpha_pattern", list(fields.get("alpha_pattern", ())), pattern=True)
    numbers = {"r": fields.get("r", 8), "lora_alpha": fields.get("lora_alpha", 8)}
    numbers |= {f"rank_pattern {k!r}": v for k, v in (fields.get("rank_pattern", {})).items()}
    numbers |= {f"alpha_pattern {k!r}": v for k, v in (fields.get("alpha_pattern", {})).items()}
    for name, number in numbers.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise UserError(f"{file}: {name} must be a number above 0, got {number!r}")
    return fields
