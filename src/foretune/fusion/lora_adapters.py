"""Opening a LoRA adapter, in memory or in a PEFT folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Conv1D

from foretune.adapters.peft_names import PREFIX
from foretune.adapters.stored_adapter import read_adapter
from foretune.errors import UserError
from foretune.files import LABELS_FILE
from foretune.fusion.finetuned import Finetuned, LowRank
from foretune.fusion.full_models import adapter_labels, spellings

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Initialisations of LoRA that leave the base as it is.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields of an adapter's config that say where it came from, or how it was trained.
INDIFFERENT_FIELDS = (
    *("peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "init_lora_weights"),
    *("megatron_config", "megatron_core", "eva_config", "runtime_config"),
)
VARIANTS = {
    "use_dora": "a DoRA adapter",
    "lora_bias": "a LoRA adapter with trained biases",
    "target_parameters": "a LoRA adapter of fused expert parameters",
    "layer_replication": "a LoRA adapter with layer replication",
    "trainable_token_indices": "a LoRA adapter with trained tokens",
    "ensure_weight_tying": "a LoRA adapter of tied weights",
    "alora_invocation_tokens": "an activated LoRA adapter, which acts on some tokens only",
}


def adapter_folder(
    name: str, folder: Path, skeleton: nn.Module, *, allow_unverified: bool
) -> Finetuned:
    """The adapter of a PEFT folder.

    Raises:
        UserError: As `read_adapter`, or it is not plain LoRA.
    """
    stored = read_adapter(folder, skeleton, allow_unverified=allow_unverified)
    adapter = _adapter(name, stored.config, stored.tensors, skeleton)
    adapter.notes += stored.notes
    if (folder / LABELS_FILE).is_file():
        adapter.labels = adapter_labels(folder / LABELS_FILE)
    return adapter


def live_adapter(name: str, model: Any, skeleton: nn.Module) -> Finetuned:
    """The active adapter of a `PeftModel`.

    Raises:
        UserError: Several adapters are active, or it is not plain LoRA.
    """
    from peft import get_peft_model_state_dict

    active = model.active_adapters if isinstance(model.active_adapters, list) else None
    if active is not None and len(active) != 1:
        raise UserError(f"{name} has {len(active)} active adapters; activate one")
    config = (
        next(iter(model.peft_config.values())) if active is None else model.peft_config[active[0]]
    )
    tensors = get_peft_model_state_dict(model, adapter_name=(active or ["default"])[0])
    detached = {key: value.detach() for key, value in tensors.items()}
    return _adapter(name, config.to_dict(), detached, skeleton)


def _adapter(
    name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], skeleton: nn.Module
) -> Finetuned:
    _check_plain_lora(name, config)
    prefix = getattr(skeleton, "base_model_prefix", "")
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    modules = dict(skeleton.named_modules())
    downs, ups = _factors(tensors, "A"), _factors(tensors, "B")
    copies: dict[str, Tensor] = {}
    for key in tensors.keys() - {key for key, _ in (*downs.values(), *ups.values())}:
        plain = key.removeprefix(PREFIX)
        if "lora_" in plain:
            raise UserError(
                f"{name} has {plain}, which is not plain LoRA: merge it into its base "
                "(merge_and_unload) and give the full model"
            )
        # PEFT adds the embeddings to the file where they are adapted or were resized.
        parameter = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        copies[_base_name(name, parameter, parameters, prefix)] = tensors[key]
    for layer in {*downs, *ups}:
        if layer not in downs or layer not in ups:
            part = "A" if layer in ups else "B"
            raise UserError(f"{name} is half an adapter: {layer} has no lora_{part}")
    low_rank = {}
    for layer, (_, down) in downs.items():
        module_name = _base_name(name, layer, modules, prefix)
        module, parameter = modules[module_name], f"{module_name}.weight"
        up = ups[layer][1].float() * _scaling(name, config, layer, down)
        weight = copies.get(parameter, getattr(module, "weight", None))
        low_rank[parameter] = _low_rank(name, module_name, module, weight, up, down.float())
    return Finetuned(name, copies.get, frozenset({*copies, *low_rank}), low_rank, frozenset(copies))


def _factors(tensors: Mapping[str, Tensor], factor: str) -> dict[str, tuple[str, Tensor]]:
    """Layer → (name of the tensor, its factor "A" or "B")."""
    ends = (f".lora_{factor}.weight", f".lora_embedding_{factor}")
    return {
        key.removeprefix(PREFIX).removesuffix(end): (key, value)
        for key, value in tensors.items()
        for end in ends
        if key.endswith(end)
    }


def _low_rank(
    name: str, layer: str, module: nn.Module, weight: Any, up: Tensor, down: Tensor
) -> LowRank:
    """The factors of a layer as matrices.

    Raises:
        UserError: The layer is of a kind whose LoRA is not a change of its weight, or the factors
            do not have its size.
    """
    is_conv = isinstance(module, CONVOLUTIONS)
    if not isinstance(module, (nn.Linear, Conv1D, nn.Embedding, *CONVOLUTIONS)):
        raise UserError(f"{name} adapts {layer}, a {type(module).__name__}, which cannot be fused")
    if is_conv and module.groups != 1:
        raise UserError(
            f"{name} adapts {layer}, a grouped convolution, which cannot be fused: leave it out "
            "with exclude_modules when fine-tuning"
        )
    transposed = isinstance(module, (Conv1D, nn.Embedding))
    shape = tuple(weight.T.shape if transposed else weight.flatten(1).shape)
    up, down = up.flatten(1), down.flatten(1)
    if (len(up), down.shape[1]) != shape or up.shape[1] != len(down):
        raise UserError(
            f"{name} was not tuned from this base: {layer} has factors of shapes "
            f"{tuple(up.shape)} and {tuple(down.shape)}, but a weight of {shape}"
        )
    return LowRank(up, down, transposed)


def _base_name(task: str, adapter_name: str, in_base: Mapping[str, Any], prefix: str) -> str:
    """The base's name of a module or parameter that an adapter names.

    Raises:
        UserError: The base does not have it.
    """
    for spelling in spellings(adapter_name, prefix):
        if spelling in in_base:
            return spelling
    raise UserError(
        f"{task} was not tuned from this base: it adapts {adapter_name}, which the base does not "
        "have"
    )


def _scaling(name: str, config: Mapping[str, Any], layer: str, down: Tensor) -> float:
    """lora_alpha / r, or lora_alpha / √r with rsLoRA.

    Raises:
        UserError: lora_alpha or r is no number, or the factors do not have rank r.
    """
    alpha = _of_layer(config, "alpha_pattern", layer, config.get("lora_alpha", 8))
    rank = _of_layer(config, "rank_pattern", layer, config.get("r", 8))
    for field, value in (("lora_alpha", alpha), ("r", rank)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise UserError(f"{name}: {field} must be a number above 0, got {value!r}")
    if len(down) != rank:
        raise UserError(
            f"{name}: the config has r={rank} for {layer}, but its factors have rank {len(down)}"
        )
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _of_layer(config: Mapping[str, Any], patterns: str, layer: str, default: Any) -> Any:
    # Not exported by peft, but what it decides by itself: a copy could come to differ.
    from peft.utils.other import get_pattern_key

    by_pattern = config.get(patterns) or {}
    return by_pattern.get(get_pattern_key(list(by_pattern), layer), default)


def _check_plain_lora(name: str, config: Mapping[str, Any]) -> None:
    from peft import LoraConfig

    peft_type = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    init = config.get("init_lora_weights", True)
    variants = [text for field, text in VARIANTS.items() if config.get(field)]
    defaults = LoraConfig().to_dict()
    unknown = [
        field
        for field, value in config.items()
        if field not in INDIFFERENT_FIELDS and value and value != defaults.get(field)
    ]
    variant = None
    if peft_type != "LORA":
        variant = f"a {peft_type} adapter"
    elif variants:
        variant = variants[0]
    elif config.get("bias", "none") != "none":
        variant = "a LoRA adapter with trained biases"
    elif init not in PLAIN_INITS:
        variant = f"a LoRA adapter initialised by {init}, which may also change the base"
    elif unknown:
        variant = f"a LoRA adapter with {unknown[0]}={str(config[unknown[0]])[:60]}"
    if variant is not None:
        raise UserError(
            f"{name} is {variant}; of adapters only plain LoRA can be fused: merge it into its "
            "base (merge_and_unload) and give the full model"
        )
