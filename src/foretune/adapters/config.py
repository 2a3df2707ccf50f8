"""Reading a LoRA configuration: those of PEFT's fields that the bank supports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

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


def lora_fields(lora: Any) -> dict[str, Any]:
    """The fields of a LoRA configuration that differ from PEFT's defaults, as a plain dict.

    Args:
        lora: A mapping of `peft.LoraConfig` fields, or a `peft.LoraConfig`.

    Raises:
        UserError: A field that PEFT does not have, or one that the bank does not support.
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
    r = fields.get("r", 8)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise UserError(f"lora r (the rank) must be a whole number not below 1, got {r!r}")
    alpha = fields.get("lora_alpha", 8)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0:
        raise UserError(f"lora_alpha must be a number above 0, got {alpha!r}")
    dropout = fields.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"lora_dropout must be at least 0 and below 1, got {dropout!r}")
    return fields


def lora_scale(lora: Mapping[str, Any]) -> float:
    """lora_alpha / r, or lora_alpha / √r with rsLoRA (arXiv:2312.03732)."""
    r = int(lora.get("r", 8))
    return float(lora.get("lora_alpha", 8)) / (r**0.5 if lora.get("use_rslora") else r)


def matching_modules(
    model: nn.Module, lora: Mapping[str, Any], heads: Sequence[str] = ()
) -> list[str]:
    """Full names of the modules that the configuration adapts, by PEFT's own matching rule.

    Args:
        model: The base.
        lora: Fields of a LoRA configuration. `target_modules` None or "all-linear" means every
            linear layer outside the heads; None leaves out the layers whose weight is frozen.
        heads: Names of modules of which each task has a full copy; they are not adapted as well.

    Raises:
        UserError: Nothing matches (the message lists the candidates), or a grouped convolution
            does.
    """
    from peft import LoraConfig

    # Not exported by peft, but what it decides by itself: a copy could come to differ.
    from peft.tuners.tuners_utils import check_target_module_exists

    from foretune.models.surgery import linear_modules

    candidates = {
        name: module
        for name, module in linear_modules(model).items()
        if not any(name == head or name.startswith(f"{head}.") for head in heads)
    }
    targets = lora.get("target_modules")
    if targets is None or targets == "all-linear":
        names = [
            name
            for name, module in candidates.items()
            if name != "lm_head" and (targets is not None or module.weight.requires_grad)
        ]
    else:
        options = {"exclude_modules", "layers_to_transform", "layers_pattern"} & set(lora)
        config = LoraConfig(
            target_modules=targets,
            modules_to_save=list(heads) or None,
            **{name: lora[name] for name in options},
        )
        names = [
            name
            for name in candidates
            if check_target_module_exists(config, name) is True
            or getattr(check_target_module_exists(config, name), "group", None)
        ]
    for name in names:
        if getattr(candidates[name], "groups", 1) != 1:
            raise UserError(
                f"{name} is a grouped convolution, which LoRA here does not support: leave it out "
                "with target_modules or exclude_modules"
            )
    if not names:
        last_parts = dict.fromkeys(name.rsplit(".", 1)[-1] for name in candidates)
        raise UserError(
            f"no module matches target_modules={targets!r}; {type(model).__name__} has: "
            + (", ".join(last_parts) if last_parts else "no linear layer at all")
        )
    return names


def _changed_fields(config: Any) -> dict[str, Any]:
    """The fields of a `peft.LoraConfig` that differ from the defaults and concern the adapter.

    Raises:
        UserError: It is something else.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise UserError(
            "lora must be a peft.LoraConfig or a mapping of its fields, "
            f"got {type(config).__name__}"
        )
    default = LoraConfig().to_dict()
    return {
        k: v for k, v in config.to_dict().items() if v != default.get(k) and k not in IGNORED_FIELDS
    }
