"""The verbs that train nothing: `fuse`, `prune`, `decode`. A method's file holds what each does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError

if TYPE_CHECKING:
    from torch import nn


def fuse(
    base: nn.Module | str | PathLike[str],
    finetuned: Mapping[str, nn.Module | str | PathLike[str]],
    method: Any,
    **options: Any,
) -> Any:
    """Several fine-tuned models over one base become one model.

    Args:
        base: What all were tuned from: a model, or its Hugging Face folder.
        finetuned: Name → a model, a Hugging Face folder, or a PEFT folder over `base`.
        method: A method whose verb is `fuse`, such as `SMILE()`.
        options: What this method takes besides; see its page.

    Raises:
        UserError: A method of another verb, nothing to fuse, or models that do not fit the base.
    """
    _check_verb(method, "fuse")
    return method.fuse(base, finetuned, **options)


def prune(model: nn.Module | str | PathLike[str], rows: Any, method: Any, **options: Any) -> Any:
    """A mixture of experts becomes a smaller one for one task.

    Args:
        model: A model, or its Hugging Face folder.
        rows: The task's texts; the router's statistics are taken on them.
        method: A method whose verb is `prune`, such as `UNCURL(experts=4)`.
        options: What this method takes besides; see its page.

    Raises:
        UserError: A method of another verb, a model without experts, or a number of experts that
            the architecture cannot have.
    """
    from foretune.pruning.prune import prune_mixture

    _check_verb(method, "prune")
    return prune_mixture(model, rows, method, **options)


def decode(
    model: nn.Module | str | PathLike[str],
    prompts: str | Sequence[str],
    method: Any,
    **options: Any,
) -> Any:
    """Generates with another distribution of the next token; no weight changes.

    Args:
        model: A causal language model, or its Hugging Face folder.
        prompts: One or several.
        method: A method whose verb is `decode`, such as `EFT()`.
        options: The method's side models or store, and what `generate` takes
            (`max_new_tokens=50`); see its page.

    Raises:
        UserError: A method of another verb, or side models or stores that do not fit the model.
    """
    _check_verb(method, "decode")
    return method.decode(model, prompts, **options)


def _check_verb(method: Any, verb: str) -> None:
    got = getattr(method, "verb", None)
    if got == verb:
        return
    was = f'"{method.name}", whose verb is {got}' if got else f"a {type(method).__name__}"
    raise UserError(
        f"{verb} takes a method whose verb is {verb}, got {was}; see foretune ls methods"
    )
