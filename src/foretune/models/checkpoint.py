"""Checks of a checkpoint: its files before they are read, and its tensors against the model's.

transformers draws at random what a checkpoint lacks or holds in another shape, and leaves out what
the model does not have. Here that is allowed for a head that is meant to be fresh, and for nothing
else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
from torch import nn
from typing_extensions import TypedDict

from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, WEIGHTS_FILE
from foretune.formats import read_json
from foretune.models.surgery import head_modules, is_in_head

INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _Index(TypedDict):
    """A sharded checkpoint's index."""

    weight_map: dict[str, str]


def check_files(where: str) -> None:
    """Checks the files of a model folder or hub id before anything in them is read.

    Raises:
        UserError: An adapter lies beside the model, the weights are pickled, or the index of a
            sharded checkpoint names a file that is not a safetensors file of the folder.
    """
    folder = Path(where)
    if not folder.is_dir():
        try:
            index = huggingface_hub.hf_hub_download(where, INDEX_FILE)
        except (OSError, ValueError):  # it is not sharded, or not there
            return
        shards_of(Path(index))
        return
    if (folder / CONFIG_FILE).is_file() and (folder / ADAPTER_CONFIG_FILE).is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_FILE}) beside the model, which would be "
            "loaded with it: move the adapter's files to a folder of their own"
        )
    if (folder / INDEX_FILE).is_file():
        shards_of(folder / INDEX_FILE)
    elif not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickled:
            raise UserError(_convert(folder, pickled[0]))


def shards_of(index: Path) -> dict[str, str]:
    """Tensor → name of the file beside the index that holds it.

    Raises:
        UserError: The index is damaged, or it names a file outside its folder or a pickle.
    """
    files = read_json(index, _Index)["weight_map"]
    for file in dict.fromkeys(files.values()):
        if file != Path(file).name or "\\" in file:
            raise UserError(
                f"{index} names {file!r:.80}, which is not in its folder: a checkpoint is complete "
                "in one folder"
            )
        if not file.endswith(".safetensors"):
            raise UserError(_convert(index.parent, file))
    return files


def _convert(folder: Path, file: str) -> str:
    return f"{folder / file} is not a safetensors file: {how_to_convert(str(folder))}"


def how_to_convert(where: str) -> str:
    """What to do about a model folder or hub id with pickled weights."""
    return (
        "pickled weights can run code when they are read, so they are never loaded; if you trust "
        f'them, convert them once with transformers: AutoModel.from_pretrained("{where}", '
        "use_safetensors=False).save_pretrained(NEW_FOLDER)"
    )


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor → safetensors file of the folder that holds it; empty where there is none.

    Raises:
        UserError: The index or the file is damaged.
    """
    single = folder / WEIGHTS_FILE
    if not single.is_file():
        if not (folder / INDEX_FILE).is_file():
            return {}
        return {name: folder / file for name, file in shards_of(folder / INDEX_FILE).items()}
    return dict.fromkeys(tensor_shapes(single), single)


def tensor_shapes(file: Path, names: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, or of those with these names.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            return {
                name: tuple(stored.get_slice(name).get_shape())
                for name in stored.keys()  # noqa: SIM118
                if names is None or name in names
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from error


def stored_dtypes(folder: Path) -> set[str]:
    """The dtypes of a folder's tensors as safetensors names them, such as F32.

    Raises:
        UserError: A file is damaged.
    """
    dtypes: set[str] = set()
    for file in set(tensor_files(folder).values()):
        with safetensors.safe_open(file, framework="pt") as stored:
            dtypes |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    return dtypes


def check_numbers(folder: Path) -> None:
    """Checks that the weights are numbers, not the integers of a quantized model.

    transformers casts such integers to numbers, without the scales that belong to them.

    Raises:
        UserError: Weights are integers, or a file is damaged.
    """
    for file in dict.fromkeys(tensor_files(folder).values()):
        with safetensors.safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                dtype = stored.get_slice(name).get_dtype()
                if name.endswith("weight") and dtype[0] in "IU":
                    raise UserError(
                        f"{file} holds {name} as integers ({dtype}), as quantized models do, but "
                        f"{CONFIG_FILE} describes no quantization: give the model in float32, "
                        "float16 or bfloat16"
                    )


def unstored_modules(model: nn.Module) -> list[str]:
    """The head modules and poolers that the checkpoint which the model names does not hold.

    Whoever loads that checkpoint gets other random weights there. Empty for a model that names no
    folder with safetensors.
    """
    folder = Path(str(getattr(model, "name_or_path", "") or ""))
    if not getattr(model, "name_or_path", "") or not folder.is_dir():
        return []
    files = tensor_files(folder)
    if not files:
        return []
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    bare_names = {name.removeprefix(prefix): name for name in files}
    modules = dict(model.named_modules())
    poolers = [name for name in modules if name.rpartition(".")[2] == "pooler"]
    suspects = dict.fromkeys([*poolers, *head_modules(model)])
    return [n for n in suspects if not _is_stored(n, modules[n], prefix, bare_names, files)]


def _is_stored(
    name: str,
    module: nn.Module,
    prefix: str,
    bare_names: Mapping[str, str],
    files: Mapping[str, Path],
) -> bool:
    for part, parameter in module.named_parameters():
        stored_name = bare_names.get(f"{name}.{part}".removeprefix(prefix))
        if stored_name is None:
            return False
        shape = tensor_shapes(files[stored_name], {stored_name}).get(stored_name)
        if parameter.is_floating_point() and shape != tuple(parameter.shape):
            return False  # a quantised weight has another shape
    return True


def check_fit(where: str, model: nn.Module, info: Mapping[str, Any], *, fresh_head: bool) -> None:
    """Checks that the model has the weights of its checkpoint, and all of them.

    Args:
        where: The checkpoint, for the message.
        model: The model as transformers loaded it.
        info: What transformers says about the loading.
        fresh_head: Whether a head that the checkpoint lacks, or has in another shape, may be
            drawn at random.

    Raises:
        UserError: Weights are missing, have other shapes, or belong to parts of the model that
            its config does not describe.
    """
    kind = type(model).__name__
    is_bare = getattr(model, "base_model", None) is model and not fresh_head
    absent = [
        name
        for name in sorted(info["missing_keys"])
        if not (fresh_head and (is_in_head(model, name) or "pooler." in name))
        and not (is_bare and "pooler." in name)  # hidden states are read before it
    ]
    if absent:
        raise UserError(f"{where} lacks weights that {kind} needs: {_listed(absent)}")
    for name, stored, expected in sorted(info["mismatched_keys"]):
        if not (fresh_head and is_in_head(model, name)):
            raise UserError(
                f"{where}: {name} has shape {tuple(stored)} in the weights, but {CONFIG_FILE} says "
                f"{tuple(expected)}: one of the two files is of another model"
            )
    surplus = [name for name in sorted(info["unexpected_keys"]) if _is_of_base(model, name)]
    if surplus:
        raise UserError(
            f"{where} holds weights that its {CONFIG_FILE} does not describe, so {kind} would run "
            f"without them: {_listed(surplus)}"
        )


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''} ({len(names)} in total)"


def _is_of_base(model: nn.Module, name: str) -> bool:
    """Whether an unused tensor changes what the model's body computes.

    Heads of other tasks, and buffers that old versions saved, do not; a weight's scale does.
    """
    base: Any = getattr(model, "base_model", model)
    name = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    module: Any = base
    *parts, leaf = name.split(".")
    for part in parts:
        inside = dict(module.named_children()).get(part)
        if inside is None:
            # such as layer 5 of a list of four; another head is no module of the body at all
            return isinstance(module, nn.ModuleList) and part.isdigit()
        module = inside
    changes = leaf in ("weight", "bias") or leaf.startswith("weight_")
    return changes and isinstance(getattr(module, "weight", None), nn.Parameter)
