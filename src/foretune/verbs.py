"""The verbs that train nothing: `fuse`, `prune`, `decode`. Each calls the method's own record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from foretune.method import Method, check_verb

if TYPE_CHECKING:
    from torch import nn

Result_co = TypeVar("Result_co", covariant=True)


class FuseMethod(Method, Protocol[Result_co]):
    """A method whose verb is `fuse`."""

    fuse: Any  # called as fuse(base, finetuned, **options); options differ from method to method


def fuse(
    base: nn.Module | str | PathLike[str],
    finetuned: Mapping[str, nn.Module | str | PathLike[str]],
    method: Any,
    **options: Any,
) -> Any:
    """Fuses several fine-tuned models over one base into one model.

    Args:
        base: What all were tuned from: a model, or its Hugging Face folder.
        finetuned: Name → a model, a Hugging Face folder, or a PEFT folder over `base`.
        method: A method whose verb is `fuse`, such as `SMILE()`.
        options: What this method takes besides; see its page.

    Raises:
        UserError: A method of another verb, nothing to fuse, or models that do not fit the base.
    """
    check_verb(method, "fuse")
    return method.fuse(base, finetuned, **options)


def prune(model: nn.Module | str | PathLike[str], rows: Any, method: Any, **options: Any) -> Any:
    """Prunes a mixture of experts for one task.

    Args:
        model: A model, or its Hugging Face folder.
        rows: The task's texts; the router's statistics are taken on them.
        method: A method whose verb is `prune`, such as `UNCURL(experts=4)`.
        options: What this method takes besides; see its page.

    Raises:
        UserError: A method of another verb, a model without experts, or a number of experts that
            the architecture cannot have.
    """
    check_verb(method, "prune")
    return method.prune(model, rows, **options)


def decode(
    model: nn.Module | str | PathLike[str],
    prompts: str | Sequence[str],
    method: Any,
    **options: Any,
) -> Any:
    """Generates from another next-token distribution; no weight changes.

    Args:
        model: A causal language model, or its Hugging Face folder.
        prompts: One or several.
        method: A method whose verb is `decode`, such as `EFT()`.
        options: The method's side models or store, and what `generate` takes
            (`max_new_tokens=50`); see its page.

    Raises:
        UserError: A method of another verb, or side models or stores that do not fit the model.
    """
    check_verb(method, "decode")
    return method.decode(model, prompts, **options)
