"""Calling a model outside training, and checking whether two ways to call it agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


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
