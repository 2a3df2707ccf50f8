"""Which modules of a model a LoRA configuration adapts, by PEFT's own matching rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig

# Not exported by peft, but what it decides by itself: a copy could come to differ.
from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers import Conv1D

from foretune.adapters.config import ALL_LINEAR
from foretune.errors import UserError
from foretune.models.surgery import linear_modules, takes_adapter

MAX_SHOWN = 12  # names that a message lists


def matching_modules(
    model: nn.Module, lora: Mapping[str, Any], heads: Sequence[str] = ()
) -> list[str]:
    """Full names of the modules that the configuration adapts.

    Args:
        model: The base.
        lora: Fields of a LoRA configuration. `target_modules` None means every linear layer outside
            the heads that is trainable and can be adapted; "all-linear" is PEFT's.
        heads: Names of modules of which each task has a full copy; they are not adapted as well.

    Raises:
        UserError: A name, a layer's number or a pattern matches nothing (the message lists what
            there is), or a module that cannot be adapted is named.
    """
    lora = {**lora, "layers_to_transform": _layers(lora)}
    names = [name for name, _ in model.named_modules() if name]
    targets = lora.get("target_modules")
    all_linear = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    _check_matched("exclude_modules", lora.get("exclude_modules"), names, model)
    if not all_linear:
        _check_matched("target_modules", targets, names, model)
    options: dict[str, Any] = {
        "exclude_modules": lora.get("exclude_modules"),
        "modules_to_save": list(heads) or None,
    }
    if targets is None or all_linear:
        linear = _all_linear(model) if all_linear else _default_targets(model)
        config = LoraConfig(target_modules=linear, **options)
        in_any_layer = [n for n in linear if is_target(config, n)]
    else:
        config = LoraConfig(target_modules=targets, **options)
        in_any_layer = [n for n in names if is_target(config, n)]
        _check_adaptable(model, in_any_layer, targets)
    matched = _in_layers(in_any_layer, lora, targets, options)
    if not matched:
        last_parts = dict.fromkeys(n.rsplit(".", 1)[-1] for n in _outside(_adaptable(model), heads))
        raise UserError(
            f"no module matches target_modules={targets!r}"
            f"{' outside exclude_modules' if lora.get('exclude_modules') else ''}; "
            f"{type(model).__name__} has: "
            + (", ".join(last_parts) if last_parts else "no layer that LoRA can adapt")
        )
    return matched


def copied_modules(model: nn.Module, heads: Sequence[str], saved: Sequence[str]) -> list[str]:
    """Full names of the modules that `modules_to_save` names, apart from those inside a head.

    PEFT takes every module whose name ends with one of the names.

    Args:
        model: The base.
        heads: Names of modules of which each task has a copy anyway.
        saved: The names of `modules_to_save`.

    Raises:
        UserError: A head or a name matches nothing, or a module of which no copy can be made.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    matches = {entry: [n for n in modules if n.endswith(entry)] for entry in saved}
    matches |= {head: [head] if head in modules else [] for head in heads}
    for entry, names in matches.items():
        if not names:
            raise UserError(
                f"no module {entry!r} to copy for each task; the model has: {_listed(modules)}"
            )
    matched = {name for names in matches.values() for name in names}
    names = _outside([name for name in modules if name in matched], heads)
    inside = [n for n in names if not _outside([n], list(matched - {n}))]
    if inside:
        raise UserError(
            f"modules_to_save={list(saved)!r} includes {inside[0]} and a module that contains it: "
            "name one of the two"
        )
    for name in names:
        module = modules[name]
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise UserError(
                f"modules_to_save includes {name}, a {type(module).__name__}, which is never "
                "called: name what it contains"
            )
        if not any(True for _ in module.parameters()):
            raise UserError(
                f"modules_to_save includes {name}, a {type(module).__name__} without weights: "
                "there is nothing to train"
            )
    return names


def obstacle(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why LoRA cannot adapt this module of a model, in stock PEFT or here; None where it can."""
    try:
        last_part = name.rsplit(".", 1)[-1]
        _check_lora_target_modules_mamba(LoraConfig(), model, last_part)
    except ValueError:
        return "a layer whose weight Mamba's kernels read without calling it"
    if isinstance(module, nn.Conv1d):
        if module.groups != 1:
            return "a grouped convolution"
        if module.dilation != (1,) or module.padding_mode != "zeros":
            return "a convolution with dilation or a padding mode"  # PEFT's factors have neither
        return None
    if isinstance(module, nn.Linear | Conv1D):
        return None
    return f"a {type(module).__name__}"


def _layers(lora: Mapping[str, Any]) -> list[int] | None:
    layers = lora.get("layers_to_transform")
    return [layers] if isinstance(layers, int) else layers or None


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    layers = linear_modules(model)
    return {n: m for n, m in layers.items() if n and obstacle(model, n, m) is None}


def _outside(names: Iterable[str], heads: Sequence[str]) -> list[str]:
    return [n for n in names if not any(n == h or n.startswith(f"{h}.") for h in heads)]


def _default_targets(model: nn.Module) -> list[str]:
    """Every trainable linear layer, apart from language model heads."""
    return [
        name
        for name, module in _adaptable(model).items()
        if name != "lm_head" and takes_adapter(module)
    ]


def _all_linear(model: nn.Module) -> list[str]:
    """What PEFT adapts for "all-linear", apart from what it fails with."""
    config: Any = _maybe_include_all_linear_layers(LoraConfig(target_modules=ALL_LINEAR), model)
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if name in config.target_modules and obstacle(model, name, module) is None
    ]


def is_target(config: LoraConfig, name: str) -> bool:
    """Whether a configuration chooses the module of this name, by PEFT's own rule."""
    return bool(check_target_module_exists(config, name))


def _in_layers(
    names: list[str], lora: Mapping[str, Any], targets: Any, options: Mapping[str, Any]
) -> list[str]:
    """Those of the matched modules that are in the layers of `layers_to_transform`.

    Raises:
        UserError: A layer or a pattern matches none of them.
    """
    layers = lora["layers_to_transform"]
    if layers is None:
        return names
    pattern = lora.get("layers_pattern") or None
    numbers: set[int] = set()
    for p in [pattern] if isinstance(pattern, str) else pattern or [None]:
        # as in PEFT, which without a pattern asks for a name before that of the list of layers
        before = r".*?\.[^.]*" if p is None else rf"(?:^|.*?\.){p}"
        matches = [re.match(rf"{before}\.(?P<idx>\d+)\.", name) for name in names]
        if not any(matches):
            lists = {m[1] for name in names for m in re.finditer(r"([^.]+)\.\d+\.", name)}
            raise UserError(
                f"lora layers_pattern={p!r} does not say where the number of an adapted module's "
                f"layer stands; it may be: {_listed(sorted(lists)) or 'none, there are no layers'}"
            )
        numbers |= {int(match["idx"]) for match in matches if match}
    # PEFT takes a module that is named in full whatever its layer.
    last_parts = sorted({n.rsplit(".", 1)[-1] for n in names if "." in n})
    config = LoraConfig(
        target_modules=last_parts if targets is None else targets,
        layers_to_transform=layers,
        layers_pattern=pattern,
        **options,
    )
    absent = [n for n in layers if n not in numbers]
    if absent:
        raise UserError(
            f"lora layers_to_transform names layer {absent[0]}, which the adapted modules do not "
            f"have; their layers are {_listed(sorted(numbers))}"
        )
    return [n for n in names if is_target(config, n) and (targets is not None or "." in n)]


def _check_matched(field: str, value: Any, names: Sequence[str], model: nn.Module) -> None:
    """Checks that every name, or the regular expression, matches a module.

    Raises:
        UserError: One does not.
    """
    if value is None:
        return
    for entry in [value] if isinstance(value, str) else value:
        config = LoraConfig(target_modules=value if isinstance(value, str) else [entry])
        if not any(is_target(config, n) for n in names):
            last_parts = dict.fromkeys(n.rsplit(".", 1)[-1] for n in linear_modules(model))
            raise UserError(
                f"no module matches {field}={entry!r}; {type(model).__name__} has: "
                f"{_listed(last_parts) or 'no linear layer at all'}"
            )


def _check_adaptable(model: nn.Module, names: Sequence[str], targets: Any) -> None:
    """Checks that all modules that are named can be adapted, as PEFT does.

    Raises:
        UserError: One cannot.
    """
    modules = dict(model.named_modules())
    for name in names:
        reason = obstacle(model, name, modules[name])
        if reason is not None:
            raise UserError(
                f"target_modules={targets!r} includes {name}, {reason}, which LoRA here does not "
                "adapt: name linear layers only, or leave it out with exclude_modules"
            )


def _listed(items: Iterable[Any]) -> str:
    texts = [str(item) for item in items]
    return ", ".join(texts[:MAX_SHOWN]) + (" …" if len(texts) > MAX_SHOWN else "")
