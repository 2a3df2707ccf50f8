"""What foretune uses of other libraries' private names is in docs/design.md, and still there."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState
from peft import LoraConfig

import tiny_models

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| `([\w.]+)` \| .* \| (`\w+\.py`(?:, `\w+\.py`)*) \| .* \|$", re.MULTILINE)
PRIVATE = re.compile(r"_[a-z]\w*")
# What they export is what their packages name themselves, or these documented modules.
LIBRARIES = ("transformers", "peft", "accelerate", "datasets", "diffusers", "bitsandbytes")
DEEP = tuple(f"{library}." for library in LIBRARIES)
DOCUMENTED = {
    "accelerate.state",
    "bitsandbytes.functional",
    "bitsandbytes.optim",
    "transformers.modeling_outputs",
}


def table() -> dict[str, list[str]]:
    """Name → files of the table in docs/design.md."""
    text = (ROOT / "docs/design.md").read_text("utf-8")
    section = text.split("## Private names of other libraries")[1].split("\n## ")[0]
    return {name: re.findall(r"`(\w+\.py)`", files) for name, files in ROW.findall(section)}


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text("utf-8")) for path in (ROOT / "src").rglob("*.py")}


def own_names() -> set[str]:
    """All that foretune itself defines, its attributes and fields among them."""
    names: set[str] = set()
    for tree in sources().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return names | {"_replace", "_fields", "_asdict", "_exit"}  # public: a named tuple's, and os'


def uses() -> dict[str, set[str]]:
    """Private name, or one imported from a module that is not public → files that use it."""
    own, found = own_names(), dict[str, set[str]]()
    for path, tree in sources().items():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = [node.value]
            names = [name for name in names if PRIVATE.fullmatch(name) and name not in own]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{one.name}" for one in node.names if not public(node, one)]
            elif isinstance(node, ast.Import):
                modules = [one.name for one in node.names]
                names = [one for one in modules if "._" in one or deep(one)]
            for name in names:
                found.setdefault(name, set()).add(path.name)
    return found


def public(node: ast.ImportFrom, imported: ast.alias) -> bool:
    module = node.module or ""
    if module.partition(".")[0] in ("foretune", "__future__"):
        return True
    if "._" in f"{module}.{imported.name}":
        return False
    return not deep(module) and module != "torch.optim.adamw"


def deep(module: str) -> bool:
    return module.startswith(DEEP) and module not in DOCUMENTED


def test_every_private_name_in_use_is_in_the_table() -> None:
    listed = {(name.rpartition(".")[2], file) for name, files in table().items() for file in files}
    used = {(name.rpartition(".")[2], file) for name, files in uses().items() for file in files}
    assert used - listed == set(), "a public name instead, or a row in docs/design.md and a test"
    assert listed - used == set(), "no longer used: take it out of docs/design.md"


def _implementation() -> bool:
    config = tiny_models.llama().config
    config._attn_implementation = "eager"
    return bool(config._attn_implementation == "eager")


def _stateful() -> bool:
    return bool(tiny_models.mamba2()._is_stateful and not tiny_models.llama()._is_stateful)


def _checkpointing() -> bool:
    model = tiny_models.llama()
    model.gradient_checkpointing_enable()
    return "_gradient_checkpointing_func" in vars(model.model.layers[0])


def _from_config() -> bool:
    config = tiny_models.llama().config
    built = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return bool(built.dtype == torch.bfloat16)


def _takes(name: str, *parameters: str) -> bool:
    module, _, attribute = name.rpartition(".")
    function: Any = getattr(importlib.import_module(module), attribute)
    return set(parameters) <= set(inspect.signature(function).parameters)


def _targets() -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(target_modules=["query"])
    answers = [check_target_module_exists(config, f"layer.{name}") for name in ("query", "key")]
    return bool(answers[0]) and not answers[1]


def _all_linear() -> bool:
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    config: Any = LoraConfig(target_modules="all-linear")
    model = tiny_models.llama()
    names = _maybe_include_all_linear_layers(config, model).target_modules
    return "model.layers.0.self_attn.q_proj" in names and "lm_head" not in names


def _mamba() -> bool:
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    with pytest.raises(ValueError, match="incompatible"):
        _check_lora_target_modules_mamba(LoraConfig(), tiny_models.mamba2(), "out_proj")
    _check_lora_target_modules_mamba(LoraConfig(), tiny_models.llama(), "out_proj")
    return True


def _pattern() -> bool:
    from peft.utils.other import get_pattern_key

    return bool(get_pattern_key(["key", "0.query"], "layer.0.query") == "0.query")


def _dummy() -> bool:
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return isinstance(DUMMY_TARGET_MODULES, str)


def _linear_pointwise() -> bool:
    x, weight = torch.ones(3, 4), torch.ones(2, 4)
    y = torch.ops.mkldnn._linear_pointwise(x, weight, torch.ones(2), "none", [], "")
    return bool((y == 5).all())


def _hooked() -> bool:
    layer = add_hook_to_module(torch.nn.Linear(2, 2), ModelHook())
    return isinstance(layer._hf_hook, ModelHook)


STILL: dict[str, Callable[[], bool]] = {
    "_attn_implementation": _implementation,
    "_is_stateful": _stateful,
    "_from_config": _from_config,
    "_gradient_checkpointing_func": _checkpointing,
    "_name_or_path": lambda: hasattr(transformers.BertConfig(), "_name_or_path"),
    "AcceleratorState._reset_state": lambda: (
        "reset_partial_state" in inspect.signature(AcceleratorState._reset_state).parameters
    ),
    "peft.tuners.tuners_utils.check_target_module_exists": _targets,
    "peft.tuners.tuners_utils._maybe_include_all_linear_layers": _all_linear,
    "peft.tuners.tuners_utils._check_lora_target_modules_mamba": _mamba,
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers": lambda: (
        _takes(
            "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
            *("peft_config", "model", "conversions"),
        )
    ),
    "peft.utils.other.get_pattern_key": _pattern,
    "peft.utils.constants.DUMMY_TARGET_MODULES": _dummy,
    "peft.utils.merge_utils.task_arithmetic": lambda: _takes(
        "peft.utils.merge_utils.task_arithmetic", "task_tensors", "weights"
    ),
    "peft.utils.merge_utils.ties": lambda: _takes(
        "peft.utils.merge_utils.ties", "task_tensors", "weights", "density"
    ),
    "torch._subclasses.fake_tensor.FakeTensorMode": lambda: _takes(
        "torch._subclasses.fake_tensor.FakeTensorMode", "allow_non_fake_inputs"
    ),
    "_linear_pointwise": _linear_pointwise,
    "_hf_hook": _hooked,
    "accelerate.hooks.remove_hook_from_module": lambda: _takes(
        "accelerate.hooks.remove_hook_from_module", "recurse"
    ),
    "_base": lambda: (base := torch.ones(2, 3)).T._base is base,
    **{
        name: lambda name=name: bool(getattr(torch.ops.aten, name).default)
        for name in (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        )
    },
    "torch.optim.adamw.adamw": lambda: _takes("torch.optim.adamw.adamw", "state_steps", "fused"),
}


@pytest.mark.parametrize("name", STILL)
def test_a_private_name_is_still_what_it_was(name: str) -> None:
    message = f"{name} has moved or changed; it is used in {', '.join(table().get(name, []))}"
    try:
        unchanged = STILL[name]()
    except (AttributeError, ImportError, TypeError) as error:
        pytest.fail(f"{message}: {error}")
    assert unchanged, message


def test_every_row_of_the_table_has_such_a_test() -> None:
    assert set(table()) == set(STILL)
