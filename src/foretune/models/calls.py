"""Calling a model aside from training, and telling whether two ways to call it agree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients."""
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
    """Inside the block, calls of the module go to `forward`; afterwards it is as it was."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def agree(one: Any, other: Any, mask: Tensor, *, tolerance: float = 1e-3) -> bool:
    """Whether two outputs of a model are equal where `mask` (n, L) is not zero.

    Args:
        one: What the model returned: a tensor, or a mapping of tensors.
        other: What it returned the other way.
        mask: Zero where positions are padding, which may differ.
        tolerance: Of the difference, relative to the greatest value.
    """
    pairs = zip(_tensors(one, mask > 0), _tensors(other, mask > 0), strict=True)
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max())
        for a, b in pairs
    )


def _tensors(output: Any, mask: Tensor) -> list[Tensor]:
    values = [output] if isinstance(output, Tensor) else list(dict(output).values())
    found = [v.float() for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return [
        v[mask.to(v.device)] if v.dim() == 3 and v.shape[:2] == mask.shape else v for v in found
    ]
