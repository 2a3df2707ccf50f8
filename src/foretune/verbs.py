"""The verbs that train nothing: `fuse`, `prune`, `decode`. Each calls the method's record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from foretune.method import Method, check_verb

if TYPE_CHECKING:
    from torch import nn

    Model = nn.Module | str | PathLike[str]

Result_co = TypeVar("Result_co", covariant=True)


class FuseMethod(Method, Protocol[Result_co]):
    """A method whose verb is `fuse`."""

    def fuse(self, *args: Any, **options: Any) -> Result_co:
        """Fuses models; called as `fuse(base, finetuned, **options)`."""
        ...


class PruneMethod(Method, Protocol[Result_co]):
    """A method whose verb is `prune`."""

    def prune(self, *args: Any, **options: Any) -> Result_co:
        """Prunes a copy of a model; called as `prune(model, rows, **options)`."""
        ...


class DecodeMethod(Method, Protocol[Result_co]):
    """A method whose verb is `decode`.

    Attributes:
        resources: What `decode` needs beside the model; options of `foretune generate`.
    """

    resources: ClassVar[tuple[str, ...]] = ()

    def decode(self, *args: Any, **options: Any) -> Result_co:
        """Generates a continuation per prompt; called as `decode(model, prompts, **options)`."""
        ...


def fuse(
    base: Model, finetuned: Mapping[str, Model], method: FuseMethod[Result_co], **options: Any
) -> Result_co:
    """Fuses several models that were fine-tuned from one base into one model.

    Args:
        base: The base of all fine-tuned models: a model, or its Hugging Face folder.
        finetuned: Name → a model, a Hugging Face folder, or a PEFT folder over `base`.
        method: A method whose verb is `fuse`, such as `SMILE()`.
        options: Options of the method; see its page.

    Raises:
        UserError: The method has another verb, there is nothing to fuse, or a model does not fit
            the base.
    """
    check_verb(method, "fuse")
    return method.fuse(base, finetuned, **options)


def prune(model: Model, rows: Any, method: PruneMethod[Result_co], **options: Any) -> Result_co:
    """Prunes the experts of a mixture-of-experts model for one task.

    Args:
        model: A model, or its Hugging Face folder.
        rows: The task's examples, on which the router's statistics are collected.
        method: A method whose verb is `prune`, such as `UNCURL(experts=4)`.
        options: Options of the method; see its page.

    Raises:
        UserError: The method has another verb, the model has no experts, or its architecture does
            not support the number of experts.
    """
    check_verb(method, "prune")
    return method.prune(model, rows, **options)


def decode(
    model: Model,
    prompts: str | Sequence[str],
    method: DecodeMethod[Result_co],
    **options: Any,
) -> Result_co:
    """Generates from a different next-token distribution; no weight changes.

    Args:
        model: A causal language model, or its Hugging Face folder.
        prompts: One prompt, or several.
        method: A method whose verb is `decode`, such as `EFT()`.
        options: The method's side models or store, and generation options such as
            `max_new_tokens=50`; see its page.

    Raises:
        UserError: The method has another verb, or a side model or store does not fit the model.
    """
    check_verb(method, "decode")
    return method.decode(model, prompts, **options)
