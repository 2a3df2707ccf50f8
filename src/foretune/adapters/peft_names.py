"""Names in `adapter_config.json` by which stock PEFT adapts what was trained and nothing else."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import transformers
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES  # not exported; its word for none
from torch import nn

from foretune.adapters.targets import is_target

PREFIX = "base_model.model."
PEFT_PARTS = ("base_layer", "default", "lora_dropout", "lora_A", "lora_B")  # of an adapted layer
CLASSIFIERS = ("classifier", "score")  # what PEFT saves as a whole where the task type is SEQ_CLS


def stored_targets(
    names: Sequence[str], modules: Mapping[str, nn.Module], heads: Sequence[str]
) -> list[str] | str:
    """`target_modules` that match these modules and no others.

    PEFT takes a listed name for each module that ends with it: "0" also for "1.0". Where that
    matches more, the names are a regular expression.
    """
    if not names:
        return str(DUMMY_TARGET_MODULES)
    config = LoraConfig(target_modules=list(names), modules_to_save=list(heads) or None)
    matched = [name for name in modules if name and is_target(config, name)]
    return list(names) if set(matched) == set(names) else "|".join(map(re.escape, names))


def stored_heads(heads: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """`modules_to_save` that match these modules and no others.

    PEFT takes a name for each module that ends with it, even if only the last letters do, such as
    "out" for its own "lora_dropout". Where that matches more, names are written from PEFT's root.
    """
    return [
        f"{PREFIX}{head}"
        if any(name.endswith(head) and name not in heads for name in (*modules, *PEFT_PARTS))
        else head
        for head in heads
    ]


def renamed_targets(names: Sequence[str], model: nn.Module) -> set[str]:
    """Those of the adapted modules that PEFT would look for in the experts of a mixture.

    Reading an adapter for transformers 5, PEFT takes each "down_proj" of some mixtures of experts
    for that of the experts, which are one tensor now, and drops the tensors of dense and shared
    layers (peft#3711). It leaves alone what is listed as a parameter.
    """
    last_parts = {name.rsplit(".", 1)[-1] for name in names}
    renamed = {part for part in last_parts if _is_renamed(part, model)}
    return {name for name in names if name.rsplit(".", 1)[-1] in renamed}


def _is_renamed(name: str, model: nn.Module) -> bool:
    if not hasattr(getattr(model, "config", None), "model_type"):
        return False
    try:  # not exported by peft, and not in every version
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return False
    config: Any = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # experts are one tensor, of which this is a part
        return True
    return name not in config.target_modules


def auto_fields(model: nn.Module, heads: Collection[str]) -> dict[str, Any]:
    """`task_type` or `auto_mapping`, by which `peft.AutoPeftModel…` chooses the class of the base.

    SEQ_CLS, under which PEFT reads the classifier from the adapter, is only written where it is
    there.
    """
    cls = type(model)
    config: Any = getattr(model, "config", None)
    if not cls.__module__.startswith("transformers.") or config is None:
        return {}
    classifiers = {name for name, _ in model.named_modules() if name.endswith(CLASSIFIERS)}
    mappings = {
        "CAUSAL_LM": transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        "SEQ_2_SEQ_LM": transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "SEQ_CLS": transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    }
    for task_type, mapping in mappings.items():
        if type(config) not in mapping:
            continue
        classes = mapping[type(config)]
        if cls in (classes if isinstance(classes, tuple) else (classes,)) and (
            task_type != "SEQ_CLS" or (classifiers and classifiers <= set(heads))
        ):
            return {"task_type": task_type}
    return {"auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}
