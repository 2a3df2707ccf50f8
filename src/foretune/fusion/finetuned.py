"""What fine-tuning changed, read one layer at a time from a full checkpoint or a LoRA adapter.

Tensors of a folder are read on demand, so that a fine-tuned model is never in memory as a whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Conv1D

from foretune.adapters.peft_format import check_base
from foretune.errors import UserError
from foretune.files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    LABELS_FILE,
)
from foretune.fusion.mixture import TaskHeads
from foretune.models.checkpoint import tensor_files
from foretune.models.loading import load_base
from foretune.models.surgery import has_fresh_head, head_modules

Source = nn.Module | str | PathLike[str]
BASE_CHANGING_INITS = ("pissa", "olora", "corda")  # initialisations that also change the base


@dataclass
class Finetuned:
    """One fine-tuned model, as its difference from the base.

    Args:
        name: Name of its task.
        read: Maps a parameter's name to its fine-tuned value; None where it is the base's.
        factors: Linear layer → (B, A) of shapes (out, r) and (r, in), with the scaling in B.
        labels: Class names by number; empty where the model has none.
    """

    name: str
    read: Callable[[str], Tensor | None]
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)

    def delta(self, layer: str, base: nn.Module) -> Tensor | None:
        """W − W₀ of a linear layer, (out, in) in float32; None where it did not change.

        Raises:
            UserError: The shape differs from the base's.
        """
        if layer in self.factors:
            b, a = self.factors[layer]
            return b @ a
        change = self.parameter_delta(f"{layer}.weight", base.weight)
        return change.T if change is not None and isinstance(base, Conv1D) else change

    def parameter_delta(self, parameter: str, base: Any) -> Tensor | None:
        """Fine-tuned value minus the base's, in its shape and float32; None without a change.

        Raises:
            UserError: The shape differs from the base's.
        """
        value = self.read(parameter)
        if value is None:
            return None
        if value.shape != base.shape:
            raise UserError(
                f"{self.name} was not tuned from this base: {parameter} has shape "
                f"{tuple(value.shape)}, in the base {tuple(base.shape)}"
            )
        change = value.to(base.device).float() - base.detach().float()
        return change if bool(change.any()) else None


def make_skeleton(base: Source, finetuned: Mapping[str, Source]) -> tuple[nn.Module, Any]:
    """A copy of the base in the class of the fine-tuned models, and its tokenizer.

    A base without the fine-tuned models' head (BertModel under BertForSequenceClassification) gets
    the head of the first of them.

    Raises:
        UserError: A folder holds no model, or the fine-tuned models were tuned from another base.
    """
    model, tokenizer = _loaded_copy(base)
    full = [source for source in finetuned.values() if not _is_adapter(source)]
    if not full or _class_name(full[0]) == type(model).__name__:
        return model, tokenizer
    with_head, _ = _loaded_copy(full[0])
    base_type, tuned_type = (
        getattr(getattr(m, "config", None), "model_type", None) for m in (model, with_head)
    )
    if base_type != tuned_type or base_type is None:
        raise UserError(
            f"the base is a {type(model).__name__}, but the fine-tuned model is a "
            f"{type(with_head).__name__}: give the model that it was tuned from"
        )
    base_parameters = dict(model.named_parameters())
    prefix = getattr(with_head, "base_model_prefix", "")
    head_prefixes = tuple(f"{name}." for name in _heads_of(with_head))
    with torch.no_grad():
        for name, parameter in with_head.named_parameters():
            spellings = _spellings(name, prefix)
            value = next((base_parameters[n] for n in spellings if n in base_parameters), None)
            if value is not None and value.shape == parameter.shape:
                parameter.copy_(value)
            elif not name.startswith(head_prefixes) and "pooler" not in name:
                raise UserError(
                    f"the base, a {type(model).__name__}, has no {name} of shape "
                    f"{tuple(parameter.shape)}, which {type(with_head).__name__} needs: give the "
                    "model that it was tuned from"
                )
    return with_head, tokenizer


def open_finetuned(name: str, source: Source, skeleton: nn.Module) -> Finetuned:
    """Open one fine-tuned model.

    Args:
        name: Name of its task.
        source: A model, a model folder, a PEFT model or a PEFT folder.
        skeleton: The base, from `make_skeleton`.

    Raises:
        UserError: There is no model, its class is not the skeleton's, or its adapter is not plain
            LoRA.
    """
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            return _live_adapter(name, source, skeleton)
        return _live_model(name, source, skeleton)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"{name}={source}: no such folder")
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        check_base(folder, skeleton)
        return _adapter_folder(name, folder, skeleton)
    return _model_folder(name, folder, skeleton)


def change_rest(
    model: nn.Module,
    experts: Sequence[Finetuned],
    handled: Callable[[str], bool],
    *,
    average: bool,
) -> list[str]:
    """Find the parameters that differ outside the fused layers; keep the base's or average them.

    Args:
        model: The base, some of whose layers may have been replaced; changed in place.
        experts: The fine-tuned models.
        handled: Whether the parameter of a name in the base is fused or excluded already.
        average: Set the parameters to the mean of the fine-tuned models.

    Returns:
        Names of the parameters that differ.

    Raises:
        UserError: A weight differs that experts cannot represent: one of `nn.MultiheadAttention`,
            which reads its layers' weights instead of calling them, or of a mixture of experts in
            one tensor.
    """
    attention = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    heads = [n for n, m in model.named_modules() if isinstance(m, TaskHeads)]
    differing = []
    for name, parameter in model.named_parameters():
        if handled(name) or any(name.startswith(f"{head}.") for head in heads):
            continue
        changes = [_change(e, name, parameter, strict=average) for e in experts]
        if all(change is None for change in changes):
            continue
        differing.append(name)
        if any(name.startswith(f"{a}.") for a in attention):
            raise UserError(
                f"{name} belongs to an nn.MultiheadAttention, which reads its layers' weights "
                "without calling them, so experts would be ignored; use a model with separate "
                f"query, key and value layers, or exclude_modules=['{name.rpartition('.')[0]}*']"
            )
        if parameter.dim() == 3 and "expert" in name:
            raise UserError(
                f"{name} holds a mixture of experts in one tensor of 3 dimensions, which cannot be "
                f"fused; exclude_modules=['{name}'] keeps the base's"
            )
        if average:
            deltas = torch.stack([change for change in changes if isinstance(change, Tensor)])
            parameter.add_((deltas.sum(0) / len(experts)).to(parameter.dtype))
    return differing


def _change(
    expert: Finetuned, name: str, parameter: Tensor, *, strict: bool
) -> Tensor | Literal["shape"] | None:
    """The change of a parameter; "shape" where shapes differ and that is allowed (not strict)."""
    value = expert.read(name)
    if not strict and value is not None and value.shape != parameter.shape:
        return "shape"  # such as a vocabulary of another size, which stays the base's
    return expert.parameter_delta(name, parameter)


def _loaded_copy(source: Source) -> tuple[nn.Module, Any]:
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            raise UserError("the base is a PEFT model; give the model that it wraps")
        with torch.no_grad():
            return copy.deepcopy(source).eval(), None
    folder = Path(source).expanduser()
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        raise UserError(f"{folder} is an adapter, not a base: give the model it was trained on")
    if not folder.is_dir() and str(source) != "minilm":
        raise UserError(f"base {source}: no such folder")
    return load_base(folder, dtype="auto")


def _is_adapter(source: Source) -> bool:
    if isinstance(source, nn.Module):
        return bool(getattr(source, "peft_config", None))
    return (Path(source).expanduser() / ADAPTER_CONFIG_FILE).is_file()


def _class_name(source: Source) -> str:
    if isinstance(source, nn.Module):
        return type(source).__name__
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"no such folder: {source}")
    config = folder / CONFIG_FILE
    if not config.is_file():
        # A plain module, or no model at all, in which case loading says why.
        return type(load_base(folder)[0]).__name__
    fields = json.loads(config.read_text("utf-8"))
    return (fields.get("architectures") or ["AutoModel"])[0]


def _heads_of(model: nn.Module) -> list[str]:
    return head_modules(model) if has_fresh_head(model) else []


def _spellings(name: str, prefix: str) -> list[str]:
    """Names that a parameter may have, with and without the backbone's prefix."""
    if not prefix:
        return [name]
    bare = name.removeprefix(f"{prefix}.")
    return [name, bare, f"{prefix}.{bare}"]


def _live_model(name: str, model: nn.Module, skeleton: nn.Module) -> Finetuned:
    if type(model) is not type(skeleton):
        raise UserError(
            f"{name} is a {type(model).__name__}, the others are {type(skeleton).__name__}: fuse "
            "models of one class"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [n for n, _ in skeleton.named_parameters() if n not in parameters]
    if missing:
        raise UserError(f"{name} was not tuned from this base: it has no {missing[0]}")
    config = getattr(model, "config", None)
    return Finetuned(
        name,
        lambda key: parameters[key].detach() if key in parameters else None,
        labels=dict(getattr(config, "id2label", None) or {}),
    )


def _model_folder(name: str, folder: Path, skeleton: nn.Module) -> Finetuned:
    class_name = _class_name(folder)
    if class_name != type(skeleton).__name__:
        raise UserError(
            f"{name} ({folder}) is a {class_name}, the others are {type(skeleton).__name__}: fuse "
            "models of one class"
        )
    files = tensor_files(folder)
    prefix = getattr(skeleton, "base_model_prefix", "")
    stored_names: dict[str, str] = {}
    for parameter, _ in skeleton.named_parameters():
        stored_name = next((n for n in _spellings(parameter, prefix) if n in files), None)
        if stored_name is None and "pooler" not in parameter:
            # transformers renames this architecture's tensors on loading.
            return _live_model(name, load_base(folder, dtype="auto")[0], skeleton)
        if stored_name is not None:
            stored_names[parameter] = stored_name

    def read(parameter: str) -> Tensor | None:
        if parameter not in stored_names:
            return None
        stored_name = stored_names[parameter]
        with safetensors.safe_open(files[stored_name], framework="pt") as file:
            return file.get_tensor(stored_name)

    config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    labels = {int(k): v for k, v in (config.get("id2label") or {}).items()}
    return Finetuned(name, read, labels=labels)


def _adapter_folder(name: str, folder: Path, skeleton: nn.Module) -> Finetuned:
    config = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
    file = folder / ADAPTER_WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has no {ADAPTER_WEIGHTS_FILE}; only safetensors are read: save the "
            "adapter again with save_pretrained"
        )
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from error
    finetuned = _adapter(name, config, tensors, skeleton)
    if (folder / LABELS_FILE).is_file():
        labels = json.loads((folder / LABELS_FILE).read_text("utf-8"))
        finetuned.labels = {i: str(label) for i, label in enumerate(labels) if label is not None}
    return finetuned


def _live_adapter(name: str, model: Any, skeleton: nn.Module) -> Finetuned:
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
    modules = dict(skeleton.named_modules())
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    prefix = getattr(skeleton, "base_model_prefix", "")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    full_values: dict[str, Tensor] = {}
    for key, value in tensors.items():
        plain = key.removeprefix("base_model.model.")
        layer, is_a, _ = plain.partition(".lora_A.")
        if is_a:
            module_name = _base_name(name, layer, modules, prefix)
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            factors[module_name] = (b.float() * _scaling(config, layer, len(value)), value.float())
        elif ".lora_B." not in plain:
            if "lora_" in plain:
                raise UserError(
                    f"{name} has {plain}, which is not LoRA of a linear layer: merge it into its "
                    "base (merge_and_unload) and give the full model"
                )
            full_values[_base_name(name, plain, parameters, prefix)] = value
    return Finetuned(name, full_values.get, factors)


def _base_name(task: str, adapter_name: str, in_base: Mapping[str, Any], prefix: str) -> str:
    """The base's name of a module or parameter that an adapter names.

    Raises:
        UserError: The base does not have it.
    """
    for spelling in _spellings(adapter_name, prefix):
        if spelling in in_base:
            return spelling
    raise UserError(
        f"{task} was not tuned from this base: it adapts {adapter_name}, which the base does not "
        "have"
    )


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    # Not exported by peft, but what it decides by itself: a copy could come to differ.
    from peft.utils.other import get_pattern_key

    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    default: float = config.get("lora_alpha", rank)
    alpha = patterns.get(get_pattern_key(list(patterns), layer), default)
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _check_plain_lora(name: str, config: Mapping[str, Any]) -> None:
    peft_type = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    init = str(config.get("init_lora_weights", True))
    variant = None
    if peft_type != "LORA":
        variant = f"a {peft_type} adapter"
    elif config.get("use_dora"):
        variant = "a DoRA adapter"
    elif config.get("lora_bias") or config.get("bias", "none") != "none":
        variant = "a LoRA adapter with trained biases"
    elif config.get("target_parameters"):
        variant = "a LoRA adapter of fused expert parameters"
    elif config.get("layer_replication"):
        variant = "a LoRA adapter with layer replication"
    elif init.startswith(BASE_CHANGING_INITS):
        variant = f"a LoRA adapter initialised by {init}, which also changes the base"
    if variant is not None:
        raise UserError(
            f"{name} is {variant}; of adapters only plain LoRA can be fused: merge it into its "
            "base (merge_and_unload) and give the full model"
        )
