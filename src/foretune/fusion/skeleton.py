"""The base that models are fused over, in the class of the fine-tuned models, and opening these."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from foretune.adapters.sparse import load_sparse
from foretune.adapters.stored_adapter import read_base_record
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, SPARSE_FILE
from foretune.fusion.finetuned import Finetuned, Source
from foretune.fusion.full_models import class_of_folder, live_model, model_folder, spellings
from foretune.fusion.lora_adapters import adapter_folder, live_adapter
from foretune.models.loading import head_of_class, load_base, load_model
from foretune.models.named import is_named
from foretune.models.quantised import refuse_quantised
from foretune.models.surgery import has_fresh_head, head_modules


def make_skeleton(base: Source, finetuned: Mapping[str, Source]) -> tuple[nn.Module, Any]:
    """A copy of the base in the class of the fine-tuned models, and its tokenizer.

    A base without the fine-tuned models' head (BertModel under BertForSequenceClassification) gets
    the head of the first of them; where these are adapters, which bring heads of their own, a head
    as `load_model` makes it.

    Raises:
        UserError: A folder holds no model, or the fine-tuned models were tuned from another base.
    """
    model, tokenizer = _loaded_copy(base)
    refuse_quantised(model, "fusing", "give the originals")
    full = [source for source in finetuned.values() if not _is_adapter(source)]
    if not full:
        return _in_class_of_adapters(model, tokenizer, base, finetuned)
    is_plain = not isinstance(model, transformers.PreTrainedModel)
    if is_plain or _class_name(full[0]) == type(model).__name__:
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
    heads = head_modules(with_head) if has_fresh_head(with_head) else []
    head_prefixes = tuple(f"{name}." for name in heads)
    with torch.no_grad():
        for name, parameter in with_head.named_parameters():
            names = spellings(name, prefix)
            value = next((base_parameters[n] for n in names if n in base_parameters), None)
            if value is not None and value.shape == parameter.shape:
                parameter.copy_(value)
            elif not name.startswith(head_prefixes) and "pooler" not in name:
                raise UserError(
                    f"the base, a {type(model).__name__}, has no {name} of shape "
                    f"{tuple(parameter.shape)}, which {type(with_head).__name__} needs: give the "
                    "model that it was tuned from"
                )
    return with_head, tokenizer


def open_finetuned(
    name: str, source: Source, skeleton: nn.Module, *, allow_unverified: bool = False
) -> Finetuned:
    """Open one fine-tuned model.

    Args:
        name: Name of its task.
        source: A model, a model folder, a PEFT model, a PEFT folder, or a folder of SaRA.
        skeleton: The base, from `make_skeleton`.
        allow_unverified: Whether to take an adapter that does not record its base.

    Raises:
        UserError: There is no model, its class is not the skeleton's, it belongs to another base,
            or its adapter is not plain LoRA.
    """
    expert = _open(name, source, skeleton, allow_unverified)
    expert.vocabulary = _vocabulary(skeleton)
    return expert


def _open(name: str, source: Source, skeleton: nn.Module, allow_unverified: bool) -> Finetuned:
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            return live_adapter(name, source, skeleton)
        return live_model(name, source, skeleton)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(f"{name}={source}: no such folder")
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        return adapter_folder(name, folder, skeleton, allow_unverified=allow_unverified)
    if (folder / SPARSE_FILE).is_file():
        return live_model(name, load_sparse(skeleton, folder), skeleton)
    return model_folder(name, folder, skeleton)


def _vocabulary(skeleton: nn.Module) -> frozenset[str]:
    """Names of the parameters whose rows are tokens."""
    if not isinstance(skeleton, transformers.PreTrainedModel):
        return frozenset()
    try:
        embeddings = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    except NotImplementedError:  # a pair of towers, such as CLIP
        return frozenset()
    rows = {id(getattr(module, "weight", None)) for module in embeddings if module is not None}
    named = skeleton.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if id(parameter) in rows)


def _in_class_of_adapters(
    model: nn.Module, tokenizer: Any, base: Source, adapters: Mapping[str, Source]
) -> tuple[nn.Module, Any]:
    """The model, loaded again with a head where the adapters were trained with one.

    Raises:
        UserError: The folder cannot be loaded with that head.
    """
    classes = {c for source in adapters.values() for c in [_class_of_base(source)] if c is not None}
    needed = classes - {type(model).__name__}
    if not needed:
        return model, tokenizer
    class_name = min(needed)
    head = head_of_class(class_name)
    if not isinstance(base, nn.Module) and len(classes) == 1 and head is not None:
        where = base if is_named(base) else Path(base)
        model, tokenizer = load_model(where, head=head, dtype="auto")
    if type(model).__name__ != class_name:
        raise UserError(
            f"the base is a {type(model).__name__}, but the adapters were trained on a "
            f"{', '.join(sorted(classes))}: give the base that they were trained on"
        )
    return model, tokenizer


def _class_of_base(adapter: Source) -> str | None:
    """The class of the base that an adapter was trained on; None where it is unknown."""
    if isinstance(adapter, nn.Module):
        return type(adapter.get_base_model()).__name__  # type: ignore[operator]
    record = read_base_record(Path(adapter).expanduser())
    return None if record is None else record.get("model_class")


def _loaded_copy(source: Source) -> tuple[nn.Module, Any]:
    if isinstance(source, nn.Module):
        if getattr(source, "peft_config", None):
            raise UserError("the base is a PEFT model; give the model that it wraps")
        with torch.no_grad():
            return copy.deepcopy(source).eval(), None
    folder = Path(source).expanduser()
    if (folder / ADAPTER_CONFIG_FILE).is_file():
        raise UserError(f"{folder} is an adapter, not a base: give the model it was trained on")
    if not folder.is_dir() and is_named(source):
        return load_model(source)
    if not folder.is_dir():
        raise UserError(f"base {source}: no such folder")
    return load_base(folder, dtype="auto")


def _is_adapter(source: Source) -> bool:
    """Whether a source holds only what differs from the base: LoRA or a sparse change."""
    if isinstance(source, nn.Module):
        return bool(getattr(source, "peft_config", None))
    folder = Path(source).expanduser()
    return any((folder / file).is_file() for file in (ADAPTER_CONFIG_FILE, SPARSE_FILE))


def _class_name(source: Source) -> str:
    if isinstance(source, nn.Module):
        return type(source).__name__
    return class_of_folder(Path(source).expanduser())
