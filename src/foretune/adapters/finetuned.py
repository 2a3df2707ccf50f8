"""What fine-tuning changed in a model: from a full checkpoint or a LoRA adapter, one layer a time.

A folder's tensors are read when they are asked for, so that a fine-tuned model is never in memory
as a whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Conv1D

from foretune.adapters.peft_format import LABELS_FILE, check_base
from foretune.errors import UserError
from foretune.models.loading import load_base
from foretune.models.mixture import TaskHeads
from foretune.models.surgery import has_fresh_head, head_modules

Source = nn.Module | str | PathLike[str]
ADAPTER_CONFIG = "adapter_config.json"
REBASED = ("pissa", "olora", "corda")  # initialisations that change the base as well


@dataclass
class Finetuned:
    """One fine-tuned model, seen from the base.

    Args:
        name: Of the task.
        read: A parameter's name → its fine-tuned value; None where it is the base's.
        factors: Linear layer → (B, A) with shapes (out, r), (r, in), the scaling in B.
        labels: The classes' names by number; empty where the model has none.
    """

    name: str
    read: Callable[[str], Tensor | None]
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)

    def delta(self, layer: str, base: nn.Module) -> Tensor | None:
        """W − W₀ of a linear layer, (out, in) in float32; None where it did not change.

        Raises:
            UserError: Another shape than the base's.
        """
        if layer in self.factors:
            b, a = self.factors[layer]
            return b @ a
        change = self.parameter_delta(f"{layer}.weight", base.weight)
        return change.T if change is not None and isinstance(base, Conv1D) else change

    def parameter_delta(self, parameter: str, base: Any) -> Tensor | None:
        """Its fine-tuned value − the base's, float32; None where it did not change.

        Raises:
            UserError: Another shape than the base's.
        """
        value = self.read(parameter)
        if value is None:
            return None
        if value.shape != base.shape:
            raise UserError(
                f"{self.name} was not tuned from this base: {parameter} has shape "
                f"{tuple(value.shape)}, the base's has {tuple(base.shape)}"
            )
        change = value.to(base.device).float() - base.detach().float()
        return change if bool(change.any()) else None


def make_skeleton(base: Source, finetuned: Mapping[str, Source]) -> tuple[nn.Module, Any]:
    """A copy of the base in the class of the fine-tuned models, and its tokenizer.

    A base without the fine-tuned models' head (BertModel under BertForSequenceClassification) gets
    that of the first of them.

    Raises:
        UserError: A folder is no model, or the fine-tuned models do not have the base's layers.
    """
    model, tokenizer = _loaded_copy(base)
    full = [source for source in finetuned.values() if not _is_adapter(source)]
    if not full or _class_name(full[0]) == type(model).__name__:
        return model, tokenizer
    with_head, _ = _loaded_copy(full[0])
    kinds = [getattr(getattr(m, "config", None), "model_type", None) for m in (model, with_head)]
    if kinds[0] != kinds[1] or kinds[0] is None:
        raise UserError(
            f"the base is a {type(model).__name__}, what was fine-tuned a "
            f"{type(with_head).__name__}: give the model that it was tuned from"
        )
    known = dict(model.named_parameters())
    prefix = getattr(with_head, "base_model_prefix", "")
    kept = tuple(f"{name}." for name in _heads_of(with_head))
    with torch.no_grad():
        for name, parameter in with_head.named_parameters():
            value = next((known[n] for n in _spellings(name, prefix) if n in known), None)
            if value is not None and value.shape == parameter.shape:
                parameter.copy_(value)
            elif not name.startswith(kept) and "pooler" not in name:
                raise UserError(
                    f"the base, a {type(model).__name__}, has no {name} of shape "
                    f"{tuple(parameter.shape)}, which {type(with_head).__name__} needs: give the "
                    "model that it was tuned from"
                )
    return with_head, tokenizer


def open_finetuned(name: str, source: Source, skeleton: nn.Module) -> Finetuned:
    """Opens one fine-tuned model.

    Args:
        name: How it is called.
        source: A model, a model folder, a PEFT model or a PEFT folder.
        skeleton: The base, from `make_skeleton`.

    Raises:
        UserError: No model there, of another class, or an adapter that is more than LoRA.
    """
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            return _live_adapter(name, source, skeleton)
        return _live_model(name, source, skeleton)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"{name}={source}: no such folder")
    if (folder / ADAPTER_CONFIG).is_file():
        check_base(folder, skeleton, tuple(head_modules(skeleton)))
        return _adapter_folder(name, folder, skeleton)
    return _model_folder(name, folder, skeleton)


def change_rest(
    model: nn.Module,
    experts: Sequence[Finetuned],
    handled: Callable[[str], bool],
    *,
    average: bool,
) -> list[str]:
    """What differs outside the fused layers: left as in the base, or averaged in place.

    Args:
        model: The base, some of whose layers may have been replaced.
        experts: What was fine-tuned.
        handled: Whether a parameter, by its name in the base, has been dealt with.
        average: Whether to put the mean of the models there.

    Returns:
        Names of those that differ.

    Raises:
        UserError: A weight differs that no expert can carry: of `nn.MultiheadAttention`, which
            reads its layers' weights instead of calling them, or of experts fused in one tensor.
    """
    attention = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    heads = [n for n, m in model.named_modules() if isinstance(m, TaskHeads)]
    left = []
    for name, parameter in model.named_parameters():
        if handled(name) or any(name.startswith(f"{head}.") for head in heads):
            continue
        changes = [_or_none(e, name, parameter, average) for e in experts]
        if all(change is None for change in changes):
            continue
        left.append(name)
        if any(name.startswith(f"{a}.") for a in attention):
            raise UserError(
                f"{name} belongs to an nn.MultiheadAttention, which reads its layers' weights "
                "without calling them, so that experts would be ignored; use a model with separate "
                f"query, key and value layers, or exclude_modules=['{name.rpartition('.')[0]}*']"
            )
        if parameter.dim() == 3 and "expert" in name:
            raise UserError(
                f"{name} holds a mixture of experts in one tensor of 3 dimensions, which is not "
                f"fused; exclude_modules=['{name}'] leaves it as in the base"
            )
        if average:
            known = torch.stack([change for change in changes if isinstance(change, Tensor)])
            parameter.add_((known.sum(0) / len(experts)).to(parameter.dtype))
    return left


def _or_none(expert: Finetuned, name: str, parameter: Tensor, strict: bool) -> Tensor | str | None:
    """The change of a parameter; "shape" for another shape, where that is no mistake."""
    value = expert.read(name)
    if not strict and value is not None and value.shape != parameter.shape:
        return "shape"  # a vocabulary of another size, left out with the rest
    return expert.parameter_delta(name, parameter)


def _loaded_copy(source: Source) -> tuple[nn.Module, Any]:
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            raise UserError("the base is a PEFT model; give the model beneath it")
        with torch.no_grad():
            return copy.deepcopy(source).eval(), None
    folder = Path(source).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} is an adapter, no base: give the model that it belongs to")
    if not folder.is_dir() and str(source) != "minilm":
        raise UserError(f"no base in {source}: no such folder")
    if str(source) == "minilm":
        from foretune.models.loading import load_model

        return load_model("minilm")
    return load_base(folder, dtype="auto")


def _is_adapter(source: Source) -> bool:
    if isinstance(source, nn.Module):
        return bool(getattr(source, "peft_config", None))
    return (Path(source).expanduser() / ADAPTER_CONFIG).is_file()


def _class_name(source: Source) -> str:
    if isinstance(source, nn.Module):
        return type(source).__name__
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"no such folder: {source}")
    config = folder / "config.json"
    if not config.is_file():
        return type(load_base(folder)[0]).__name__  # a plain module, or the error that says why not
    known = json.loads(config.read_text("utf-8"))
    return (known.get("architectures") or ["AutoModel"])[0]


def _heads_of(model: nn.Module) -> list[str]:
    return head_modules(model) if has_fresh_head(model) else []


def _spellings(name: str, prefix: str) -> list[str]:
    """How a parameter may be called with and without the name of the backbone before it."""
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
    known = dict(model.named_parameters(remove_duplicate=False))
    absent = [n for n, _ in skeleton.named_parameters() if n not in known]
    if absent:
        raise UserError(f"{name} was not tuned from this base: it has no {absent[0]}")
    config = getattr(model, "config", None)
    return Finetuned(
        name,
        lambda parameter: known[parameter].detach() if parameter in known else None,
        labels=dict(getattr(config, "id2label", None) or {}),
    )


def _model_folder(name: str, folder: Path, skeleton: nn.Module) -> Finetuned:
    got = _class_name(folder)
    if got != type(skeleton).__name__:
        raise UserError(
            f"{name} ({folder}) is a {got}, the others are {type(skeleton).__name__}: fuse models "
            "of one class"
        )
    where = _tensor_files(folder)
    prefix = getattr(skeleton, "base_model_prefix", "")
    spelt: dict[str, str] = {}
    for parameter, _ in skeleton.named_parameters():
        on_disk = next((n for n in _spellings(parameter, prefix) if n in where), None)
        if on_disk is None and "pooler" not in parameter:
            # Names that transformers converts on loading: let it.
            return _live_model(name, load_base(folder, dtype="auto")[0], skeleton)
        if on_disk is not None:
            spelt[parameter] = on_disk

    def read(parameter: str) -> Tensor | None:
        if parameter not in spelt:
            return None
        with safetensors.safe_open(where[spelt[parameter]], framework="pt") as stored:
            return stored.get_tensor(spelt[parameter])

    config = json.loads((folder / "config.json").read_text("utf-8"))
    labels = {int(k): v for k, v in (config.get("id2label") or {}).items()}
    return Finetuned(name, read, labels=labels)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor → the safetensors file of the folder that holds it; empty where there is none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        known = json.loads(index.read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in known.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        return {}
    try:
        with safetensors.safe_open(single, framework="pt") as stored:
            return dict.fromkeys(stored.keys(), single)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {single}: {' '.join(str(error).split())[:200]}") from error


def _adapter_folder(name: str, folder: Path, skeleton: nn.Module) -> Finetuned:
    config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"{folder} has no adapter_model.safetensors; only safetensors are read: save the "
            "adapter again with save_pretrained"
        )
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from error
    found = _adapter(name, config, tensors, skeleton)
    if (folder / LABELS_FILE).is_file():
        labels = json.loads((folder / LABELS_FILE).read_text("utf-8"))
        found.labels = {i: str(label) for i, label in enumerate(labels) if label is not None}
    return found


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
    saved: dict[str, Tensor] = {}
    for key, value in tensors.items():
        plain = key.removeprefix("base_model.model.")
        layer, is_a, _ = plain.partition(".lora_A.")
        if is_a:
            found = _named(name, layer, modules, prefix)
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            factors[found] = (b.float() * _scaling(config, layer, len(value)), value.float())
        elif ".lora_B." not in plain:
            if "lora_" in plain:
                raise UserError(
                    f"{name} has {plain}, which is no LoRA of a linear layer: merge it into its "
                    "base (merge_and_unload) and give the full model"
                )
            saved[_named(name, plain, parameters, prefix)] = value
    return Finetuned(name, saved.get, factors)


def _named(name: str, wanted: str, known: Mapping[str, Any], prefix: str) -> str:
    for spelling in _spellings(wanted, prefix):
        if spelling in known:
            return spelling
    raise UserError(
        f"{name} was not tuned from this base: it adapts {wanted}, which the base does not have"
    )


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    # Not exported by peft, but what it decides by itself: a copy could come to differ.
    from peft.utils.other import get_pattern_key

    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    default: float = config.get("lora_alpha", rank)
    alpha = patterns.get(get_pattern_key(list(patterns), layer), default)
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _check_plain_lora(name: str, config: Mapping[str, Any]) -> None:
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    start = str(config.get("init_lora_weights", True))
    odd = None
    if kind != "LORA":
        odd = f"a {kind} adapter"
    elif config.get("use_dora"):
        odd = "a DoRA adapter"
    elif config.get("lora_bias") or config.get("bias", "none") != "none":
        odd = "a LoRA adapter that trained biases"
    elif config.get("target_parameters"):
        odd = "a LoRA adapter of fused expert parameters"
    elif config.get("layer_replication"):
        odd = "a LoRA adapter that repeats layers"
    elif start.startswith(REBASED):
        odd = f"a LoRA adapter begun by {start}, which changes its base"
    if odd is not None:
        raise UserError(
            f"{name} is {odd}; only plain LoRA is an expert: merge it into its base "
            "(merge_and_unload) and give the full model"
        )
