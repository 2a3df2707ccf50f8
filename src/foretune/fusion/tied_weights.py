"""Tied weights: parameters that a model has under several names (input and output embeddings).

An adapter may change one name only; then the fused model needs a tensor for each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.fusion.finetuned import Finetuned


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several, the name that comes first in front."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def changed_apart(model: nn.Module, experts: Sequence[Finetuned]) -> dict[str, str]:
    """Name → name that it is tied to, where a fine-tuned model changes the two differently."""
    apart = {}
    for first, *aliases in tied_names(model):
        parameter = model.get_parameter(first)
        for alias in aliases:
            if not all(_same_change(expert, first, alias, parameter) for expert in experts):
                apart[alias] = first
    return apart


def untie(model: nn.Module, apart: dict[str, str]) -> None:
    """Give these names a tensor of their own, in the model and in its config.

    Args:
        model: Changed in place.
        apart: As `changed_apart` returns it.

    Raises:
        UserError: The model would be tied again on loading.
    """
    if not apart:
        return
    alias, first = next(iter(apart.items()))
    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(
            f"{type(model).__name__} ties {alias} to {first}, but the fine-tuned models change "
            "them differently: build the base with a tensor for each"
        )
    for name in apart:
        owner, _, last = name.rpartition(".")
        parameter = model.get_parameter(name)
        fresh = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), last, fresh)
    config: Any = model.config
    config.tie_word_embeddings = False
    config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):
        reloaded = type(model)(copy.deepcopy(config))
    reloaded.tie_weights()
    again = {name for group in tied_names(reloaded) for name in group[1:]} & set(apart)
    if again:
        raise UserError(
            f"{type(model).__name__} always ties {min(again)} to {apart[min(again)]}, but the "
            "fine-tuned models change them differently: merge the adapters into their base "
            "(merge_and_unload) and give the full models"
        )
    model.all_tied_weights_keys = reloaded.all_tied_weights_keys


def _same_change(expert: Finetuned, first: str, alias: str, parameter: Tensor) -> bool:
    if expert.has_other_shape(first, parameter) or expert.has_other_shape(alias, parameter):
        return True  # refused, or reported as a whole, elsewhere
    a, b = expert.change(first, parameter), expert.change(alias, parameter)
    return a is b if a is None or b is None else torch.equal(a, b)
