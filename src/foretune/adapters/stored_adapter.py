"""`read_adapter`: the one reader of PEFT folders, ours and others', for every verb.

Whatever such a folder holds, it is checked here once: the types of its config, the base that it
belongs to, and that its tensors are finite, whole and of the sizes that the config says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

from peft import LoraConfig
from peft.utils.other import get_pattern_key  # not exported; what PEFT decides by itself
from torch import Tensor, nn
from transformers import Conv1D
from typing_extensions import TypedDict

from foretune.adapters.config import ALL_LINEAR
from foretune.adapters.config_file import AdapterConfig, read_config
from foretune.adapters.fingerprint import base_record, is_base
from foretune.adapters.peft_names import PREFIX
from foretune.adapters.targets import is_target
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from foretune.formats import ADAPTER, read_json, read_tensors

FINGERPRINT_FILE = "base_fingerprint.json"
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")
LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class BaseRecord(TypedDict):
    """The content of `base_fingerprint.json`; see `foretune.adapters.fingerprint`.

    The first version holds only `base`, one digest.
    """

    base: dict[str, str] | str
    dtypes: NotRequired[list[str]]
    without: NotRequired[list[str]]
    model_class: NotRequired[str]


CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # values of init_lora_weights
BEYOND_PLAIN_LORA = ("rank_pattern", "alpha_pattern", "use_dora")  # fields of a config


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it was read from a folder.

    Args:
        config: The content of `adapter_config.json`.
        tensors: Its tensors, by PEFT's names.
        notes: What the user should know about it.
        is_zero: Whether it changes nothing, because one factor of each layer is zero.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    is_zero: bool = False

    def beyond_plain_lora(self) -> str | None:
        """What it is or has that is not LoRA of one rank and alpha; None if nothing."""
        if self.config.get("peft_type") != "LORA":
            return str(self.config.get("peft_type"))
        start = str(self.config.get("init_lora_weights")).casefold()
        if start.startswith(CHANGES_BASE):  # when PEFT loads it
            return f"init_lora_weights {start}"
        return next((name for name in BEYOND_PLAIN_LORA if self.config.get(name)), None)


def read_adapter(
    folder: Path, model: nn.Module, *, allow_unverified: bool = False
) -> StoredAdapter:
    """Reads and checks a PEFT folder.

    Args:
        folder: A folder that foretune or PEFT wrote.
        model: The base that it is to be used on.
        allow_unverified: Whether to take a folder that does not record its base, as none does that
            PEFT wrote.

    Raises:
        UserError: The folder holds no adapter or half of one, a file is damaged, sizes disagree
            with the config, or it was trained on another base or does not say on which.
    """
    folder = Path(folder)
    fields = read_config(folder)
    file = folder / ADAPTER_WEIGHTS_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} has no {ADAPTER_WEIGHTS_FILE}; only safetensors are read: save the adapter "
            "again with save_pretrained"
        )
    tensors = read_tensors(file)
    config = read_json(folder / ADAPTER_CONFIG_FILE, dict[str, Any])
    check_base(folder, model)
    notes, is_zero = [], False
    if fields["peft_type"] == "LORA":
        layers = _whole_layers(file, tensors)
        _check_ranks(file, fields, layers)
        _check_copies(file, fields, tensors, model)
        _check_targets(file, fields, list(layers), model)
        config = _without_listed_weights(config, model)
        nonzero = (bool(a.any()) and bool(b.any()) for a, b in layers.values())
        is_zero = len(tensors) == 2 * len(layers) and not any(nonzero)
        if is_zero:
            notes.append(f"{folder}: the adapter has no effect: one factor of each layer is zero")
    if not (folder / FINGERPRINT_FILE).is_file():
        if not allow_unverified:
            raise UserError(
                f"{folder} does not record which base it was trained on (it has no "
                f"{FINGERPRINT_FILE}, as no adapter has that PEFT wrote): if it is this one, use "
                "--allow-unverified (allow_unverified=True)"
            )
        notes.append(f"{folder} does not record its base: taken for an adapter of this one")
    return StoredAdapter(config, tensors, notes, is_zero)


def read_base_record(folder: Path) -> BaseRecord | None:
    """What an adapter's folder records of its base; None where it records nothing.

    Raises:
        UserError: The record is damaged, or a newer foretune wrote it.
    """
    file = folder / FINGERPRINT_FILE
    if not file.is_file():
        return None
    record = read_json(file, BaseRecord, ADAPTER)
    if isinstance(record["base"], dict) and not {"dtypes", "without"} <= record.keys():
        raise UserError(f"{file} is damaged: dtypes or without is missing")
    if "without" not in record:
        record["without"] = read_config(folder).get("modules_to_save") or []
    return record


def check_base(folder: Path, model: nn.Module) -> None:
    """Refuses an adapter that was trained on another base.

    All retrained bases of one model have the same shapes, so no other check would detect it.

    Raises:
        UserError: The folder records a fingerprint that is not that of `model`.
    """
    record = read_base_record(Path(folder))
    if record is None or is_base(model, record):
        return
    expected = record["base"]
    if isinstance(expected, dict):
        expected = expected.get("float32", "")
    actual = base_record(model, record["without"])["base"]["float32"]
    raise UserError(
        f"{folder} was trained on another base (fingerprint {expected[:12]}, this base has "
        f"{actual[:12]}); load the base that it was adapted from"
    )


def _whole_layers(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer → its factors (A, B).

    Raises:
        UserError: There is no tensor at all, or a layer has only one factor.
    """
    if not tensors:
        raise UserError(f"{file} holds no tensors")
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match:
            factors.setdefault(match[1], {})[match[3]] = tensor
    for layer, pair in factors.items():
        if len(pair) == 1:
            missing = "B" if "A" in pair else "A"
            raise UserError(f"{file} is half an adapter: {layer} has no lora_{missing}")
    return {layer: (pair["A"], pair["B"]) for layer, pair in factors.items()}


def _check_ranks(
    file: Path, fields: AdapterConfig, layers: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Checks that the factors have the rank that the config says.

    Raises:
        UserError: Those of a layer do not.
    """
    patterns = fields.get("rank_pattern", {})
    experts = [p for p in fields.get("target_parameters") or () if not p.endswith(".weight")]
    for layer, (a, b) in layers.items():
        if a.dim() < 2 or b.dim() < 2 or len(a) != b.shape[1]:
            raise UserError(
                f"{file}: the factors of {layer} do not fit each other: lora_A has shape "
                f"{tuple(a.shape)}, lora_B {tuple(b.shape)}"
            )
        rank = patterns.get(get_pattern_key(list(patterns), layer), fields.get("r", 8))
        if len(a) != rank and not experts:  # one tensor of several experts has a multiple
            raise UserError(
                f"{file}: the config has r={rank} for {layer}, but its factors have rank {len(a)}"
            )


def _check_copies(
    file: Path, fields: AdapterConfig, tensors: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Checks that there are tensors of every module that the config saves as a whole.

    Raises:
        UserError: One is missing.
    """
    held = {key.removeprefix(PREFIX) for key in tensors}
    for entry in fields.get("modules_to_save") or ():
        exact = entry.startswith(PREFIX)
        for name, module in model.named_modules():
            if name == entry.removeprefix(PREFIX) or (not exact and name.endswith(entry)):
                for parameter, _ in module.named_parameters():
                    if not _is_among(f"{name}.{parameter}", held):
                        raise UserError(
                            f"{file} is half an adapter: it has no {name}.{parameter}, which its "
                            "config saves"
                        )


def _check_targets(file: Path, fields: AdapterConfig, layers: list[str], model: nn.Module) -> None:
    """Checks that there are factors of every module of the model that the config adapts.

    Raises:
        UserError: There are none of one of them.
    """
    names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    options: dict[str, Any] = {name: fields.get(name) for name in names}
    try:
        config = LoraConfig(**options)
    except ValueError as error:
        raise UserError(f"{file.with_name(ADAPTER_CONFIG_FILE)}: {error}") from error
    targets = fields.get("target_modules")
    copied = [entry.removeprefix(PREFIX) for entry in fields.get("modules_to_save") or ()]
    expected = [
        name
        for name, module in model.named_modules()
        if targets
        and str(targets).lower() != ALL_LINEAR  # PEFT writes the names that it stood for
        and isinstance(module, LAYERS)
        and not any(f".{entry}." in f".{name}." for entry in copied)
        and is_target(config, name)
    ]
    parameters = (p for p in fields.get("target_parameters") or () if p.endswith(".weight"))
    expected += [parameter.removesuffix(".weight") for parameter in parameters]
    held = set(layers)
    for name in expected:
        if not _is_among(name, held):
            raise UserError(
                f"{file} is half an adapter: it has no tensors of {name}, which its config adapts"
            )


def _is_among(name: str, names: Set[str]) -> bool:
    """Whether a name is one of the names, with or without the backbone's prefix."""
    return name in names or any(n.endswith(f".{name}") or name.endswith(f".{n}") for n in names)


def _without_listed_weights(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The config with the weights of linear layers that are listed as parameters as modules."""
    modules = dict(model.named_modules())
    parameters = config.get("target_parameters") or []
    layers = [p.removesuffix(".weight") for p in parameters if p.endswith(".weight")]
    layers = [name for name in layers if isinstance(modules.get(name), nn.Linear)]
    targets = config.get("target_modules")
    if not layers or isinstance(targets, str):
        return config
    rest = [p for p in parameters if p.removesuffix(".weight") not in layers]
    return {**config, "target_modules": [*(targets or ()), *layers], "target_parameters": rest}
