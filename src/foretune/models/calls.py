"""Calling a model outside training, whether two ways to call it agree, and its KV cache."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

# What a decoder's forward calls its KV cache: transformers from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")


@contextlib.contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode and records no gradients."""
    training = [m for m in model.modules() if m.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, calls of the module go to `forward`; afterwards its own is restored."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def cache_argument(model: Any) -> str | None:
    """The model's own name for its KV cache, one of `CACHE_NAMES`; None where it takes none."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The KV cache among the arguments of a call, whatever its name; None where there is none."""
    return next((value for value in values if isinstance(value, Cache)), None)


def holds_tokens(cache: Cache) -> bool:
    """Whether earlier calls have filled the cache."""
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # recurrent layers alone (Mamba): they keep a state and no positions
        return cache.has_previous_state()


def agree(reference: Any, output: Any, mask: Tensor, *, tolerance: float = 1e-3) -> bool:
    """Whether two outputs of a model agree where `mask` (n, L) is not zero.

    Args:
        reference: What the model returned: a tensor, or a mapping of tensors.
        output: What it returned when called the other way.
        mask: Zero at padding, where the outputs may differ.
        tolerance: Largest difference allowed, relative to the reference's largest absolute value.
    """
    pairs = zip(_tensors(reference, mask > 0), _tensors(output, mask > 0), strict=True)
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max())
        for a, b in pairs
    )


def _tensors(output: Any, mask: Tensor) -> list[Tensor]:
    """The floating-point tensors of an output, (n, L, d) ones only where the mask is set."""
    values = [output] if isinstance(output, Tensor) else list(dict(output).values())
    tensors = [v.float() for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return [
        v[mask.to(v.device)] if v.dim() == 3 and v.shape[:2] == mask.shape else v for v in tensors
    ]
