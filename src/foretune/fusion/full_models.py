"""Opening a fully fine-tuned model: one in memory, or a folder whose tensors are read on demand.

A folder's model is never in memory as a whole, unless transformers renames its tensors on loading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired

import safetensors
import transformers
from torch import Tensor, nn
from typing_extensions import TypedDict

from foretune.errors import UserError
from foretune.files import CONFIG_FILE, LABELS_FILE, WEIGHTS_FILE
from foretune.formats import damage_named, read_json
from foretune.fusion.finetuned import Finetuned, persistent_buffers
from foretune.fusion.tied_weights import tied_names
from foretune.models.checkpoint import INDEX_FILE, tensor_files
from foretune.models.loading import load_base

# Fields of a config that do not change what a model computes, or that are compared elsewhere.
INDIFFERENT_FIELDS = (
    *("architectures", "dtype", "torch_dtype", "finetuning_task", "problem_type", "use_cache"),
    *("id2label", "label2id", "num_labels", "vocab_size", "tie_word_embeddings"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "return_dict", "output_attentions"),
    *(
        "output_hidden_states",
        "transformers_version",
        "initializer_range",
        "gradient_checkpointing",
    ),
)


class ModelConfig(TypedDict):
    """The fields of a model's `config.json` that are read here."""

    architectures: NotRequired[list[str] | None]
    id2label: NotRequired[dict[str, Any] | None]


def live_model(name: str, model: nn.Module, skeleton: nn.Module) -> Finetuned:
    """A fine-tuned model in memory.

    Raises:
        UserError: It has another class or other tensors than the base.
    """
    if type(model) is not type(skeleton):
        raise UserError(
            f"{name} is a {type(model).__name__}, the others are {type(skeleton).__name__}: fuse "
            "models of one class"
        )
    tensors = _tensors_of(model)
    expected = _tensors_of(skeleton)
    for key in (*(set(expected) - set(tensors)), *(set(tensors) - set(expected))):
        where = "it has no" if key in expected else "the base has no"
        raise UserError(f"{name} was not tuned from this base: {where} {key}")
    config = getattr(model, "config", None)
    return Finetuned(
        name,
        lambda key: tensors[key].detach() if key in tensors else None,
        frozenset(tensors),
        labels=dict(getattr(config, "id2label", None) or {}),
        notes=_config_notes(name, config, getattr(skeleton, "config", None)),
    )


def model_folder(name: str, folder: Path, skeleton: nn.Module) -> Finetuned:
    """A fine-tuned model in a folder.

    Raises:
        UserError: It has another class or other tensors than the base, or a file is damaged.
    """
    files = stored_tensors(folder)
    if not isinstance(skeleton, transformers.PreTrainedModel) and files:
        return _plain_folder(name, folder, files, skeleton)
    class_name = class_of_folder(folder)
    if class_name != type(skeleton).__name__:
        raise UserError(
            f"{name} ({folder}) is a {class_name}, the others are {type(skeleton).__name__}: fuse "
            "models of one class"
        )
    labels = _labels(folder / CONFIG_FILE)
    stored_names = _stored_names(files, skeleton)
    ignored = {key for key, _ in skeleton.named_buffers()}
    if stored_names is None or set(files) - set(stored_names.values()) - ignored:
        # transformers renames this architecture's tensors on loading, or ignores some.
        expert = live_model(name, load_base(folder, dtype="auto")[0], skeleton)
    else:
        expert = _from_files(name, files, stored_names)
        expert.notes = _config_notes(name, _config(folder / CONFIG_FILE, skeleton), skeleton.config)
    expert.labels = labels
    return expert


def class_of_folder(folder: Path) -> str:
    """The name of the class of the model in a folder.

    Raises:
        UserError: There is no such folder, or it holds no model.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    config = folder / CONFIG_FILE
    if not config.is_file():
        # A plain module, or no model at all, in which case loading says why.
        return type(load_base(folder)[0]).__name__
    return (read_json(config, ModelConfig).get("architectures") or ["AutoModel"])[0]


def stored_tensors(folder: Path) -> dict[str, Path]:
    """Tensor → safetensors file of the folder that holds it; empty where there is none.

    Raises:
        UserError: A file is missing or damaged, or outside the folder.
    """
    files = tensor_files(folder)
    index = folder / INDEX_FILE
    for file in set(files.values()):
        if not file.is_file():
            raise UserError(f"{index} names {file.name}, but there is no such file")
    held = {file: _keys(file) for file in set(files.values())}
    for tensor, file in files.items():
        if tensor not in held[file]:
            raise UserError(f"{index} names {tensor} in {file.name}, which does not hold it")
    single = folder / WEIGHTS_FILE
    return dict.fromkeys(held[single], single) if single in held else files


def _keys(file: Path) -> set[str]:
    """The names of a file's tensors, and the names that were tied to them on saving.

    Raises:
        UserError: It is not a readable safetensors file.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            keys = set(stored.keys())
            return keys | {k for k, v in (stored.metadata() or {}).items() if v in keys}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from error


def _read(file: Path, tensor: str) -> Tensor:
    with safetensors.safe_open(file, framework="pt") as stored:
        if tensor not in set(stored.keys()):
            tensor = stored.metadata()[tensor]
        return stored.get_tensor(tensor)


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **persistent_buffers(model),
    }


def _plain_folder(
    name: str, folder: Path, files: Mapping[str, Path], skeleton: nn.Module
) -> Finetuned:
    """A folder with the weights of a module that is not of transformers; its code is not run.

    Raises:
        UserError: Its weights or its record cannot be read.
    """
    expected = set(_tensors_of(skeleton))
    for key in (*(expected - set(files)), *(set(files) - expected)):
        where = "it has no" if key in expected else "the base has no"
        raise UserError(f"{name} was not tuned from this base: {where} {key}")
    expert = _from_files(name, files, {key: key for key in files})
    if (folder / LABELS_FILE).is_file():
        expert.labels = adapter_labels(folder / LABELS_FILE)
    return expert


def _from_files(name: str, files: Mapping[str, Path], stored_names: Mapping[str, str]) -> Finetuned:
    def read(key: str) -> Tensor | None:
        if key not in stored_names:
            return None
        return _read(files[stored_names[key]], stored_names[key])

    return Finetuned(name, read, frozenset(stored_names))


def _stored_names(files: Iterable[str], skeleton: nn.Module) -> dict[str, str] | None:
    """The base's name of each tensor → its name in the files; None if a parameter is missing.

    A name that is tied in the base may be missing: the files of tied models hold one of them.
    """
    files = set(files)
    prefix = getattr(skeleton, "base_model_prefix", "")
    expected = _tensors_of(skeleton)
    stored_names = {
        key: stored
        for key in expected
        for stored in [next((n for n in spellings(key, prefix) if n in files), None)]
        if stored is not None
    }
    for group in tied_names(skeleton):
        held = [key for key in group if key in stored_names]
        for key in group if held else ():
            stored_names.setdefault(key, stored_names[held[0]])
    parameters = {key for key, _ in skeleton.named_parameters()}
    missing = [k for k in parameters - set(stored_names) if "pooler" not in k]
    return None if missing else stored_names


def spellings(name: str, prefix: str) -> list[str]:
    """Names that a parameter may have, with and without the backbone's prefix."""
    if not prefix:
        return [name]
    bare = name.removeprefix(f"{prefix}.")
    return [name, bare, f"{prefix}.{bare}"]


def _config(file: Path, skeleton: Any) -> Any:
    """The config of a folder, with the fields that it leaves out; of the base's class.

    Raises:
        UserError: It cannot be read as a config.
    """
    with damage_named(file):
        return type(skeleton.config).from_dict(read_json(file, dict[str, Any]))


def _labels(config: Path) -> dict[int, str]:
    names = read_json(config, ModelConfig).get("id2label") or {}
    if not all(key.isdecimal() for key in names):
        odd = next(key for key in names if not key.isdecimal())
        raise UserError(f"{config} is damaged: id2label has the key {odd!r}, which is no number")
    return {int(key): str(value) for key, value in names.items()}


def adapter_labels(file: Path) -> dict[int, str]:
    """Class names by number, from the `labels.json` of an adapter.

    Raises:
        UserError: The file is damaged.
    """
    labels = read_json(file, list[str | int | float | None])
    names = {i: str(label) for i, label in enumerate(labels) if label is not None}
    if not names or len({*names.values()}) < len(names):
        raise UserError(f"{file} is damaged: it names no label, or one twice")
    return names


def _config_notes(name: str, config: Any, base: Any) -> list[str]:
    """Says in which fields a model's config differs from the base's, which is the one used."""
    if not hasattr(config, "to_dict") or not hasattr(base, "to_dict"):
        return []
    tuned, fields = config.to_dict(), base.to_dict()
    differing = [
        f"{key}={tuned[key]!r} (the base: {fields[key]!r})"
        for key in sorted(set(tuned) & set(fields) - set(INDIFFERENT_FIELDS))
        if not key.startswith("_") and "drop" not in key and tuned[key] != fields[key]
    ]
    if not differing:
        return []
    return [f"{name} has another config, but the base's is used: {'; '.join(differing)[:300]}"]
