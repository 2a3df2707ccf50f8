"""Gradient checkpointing: a block keeps only its input and is recomputed in the backward pass.

The switch in transformers would recompute it without knowing which task owns which row: the route
is set around the forward pass only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from foretune.errors import UserError
from foretune.models.calls import replaced_forward
from foretune.models.frozen_prefix import PrefixForward
from foretune.models.routing import captured_route
from foretune.models.row_dropout import captured_draws
from foretune.models.surgery import block_list


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside the block, a training pass keeps only the input of each transformer block.

    Args:
        model: A model with a list of blocks. Blocks that `frozen_prefix` serves are not patched.

    Raises:
        UserError: The model has no single list of blocks.
    """
    named_blocks = block_list(model)
    if named_blocks is None:
        raise UserError(
            f"{type(model).__name__} has no single list of blocks to recompute: "
            "use gradient_checkpointing=False or a smaller token_budget"
        )
    blocks = [block for block in named_blocks[1] if not isinstance(block.forward, PrefixForward)]
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_patched(block))
        yield


@contextlib.contextmanager
def _patched(block: nn.Module) -> Iterator[None]:
    real = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return real(*args, **kwargs)
        as_before = captured_pass()
        # No KV cache: the second pass would append to it once more.
        args = tuple(None if isinstance(v, Cache) else v for v in args)
        kwargs = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        return checkpoint(
            real,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), as_before()),
            **kwargs,
        )

    with replaced_forward(block, forward):
        yield


def captured_pass() -> Callable[[], AbstractContextManager[None]]:
    """A factory of contexts with the current route and dropout, for the backward pass."""
    route, draws = captured_route(), captured_draws()

    @contextlib.contextmanager
    def as_before() -> Iterator[None]:
        with route(), draws():
            yield

    return as_before


@contextlib.contextmanager
def recomputed_on_route(model: nn.Module) -> Iterator[None]:
    """Inside the block, what transformers recomputes in a backward pass sees its forward's route.

    `gradient_checkpointing_enable` recomputes layers after the `route` of the forward has ended.
    """
    name = "_gradient_checkpointing_func"  # private: transformers has no other place for it
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module in model.modules():
            checkpoint = vars(module).get(name)
            if checkpoint is not None:
                replaced.append((module, checkpoint))
                setattr(module, name, _on_route(checkpoint))
        yield
    finally:
        for module, checkpoint in replaced:
            setattr(module, name, checkpoint)


def _on_route(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The same checkpoint function, which runs what it is passed on the route of its call."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        captured = captured_pass()

        def on_route(*inputs: Any, **options: Any) -> Any:
            with captured():
                return function(*inputs, **options)

        return checkpoint(on_route, *args, **kwargs)

    return call
