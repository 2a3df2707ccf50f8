"""Calling a model outside training, whether two ways to call it agree, and its KV cache."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

# What a decoder's forward calls its KV cache: transformers from 5.24 on, and before.
CACHE_NAMES = ("cache", "past_key_values")


def dummy_rows(model: nn.Module) -> dict[str, Tensor]:
    """Arguments of a call with three rows of different lengths, padded to (3, 7)."""
    config: Any = model.config
    fill = getattr(config, "pad_token_id", None)
    vocabulary = [i for i in range(min(config.vocab_size, 64)) if i != fill]
    ids = torch.tensor(vocabulary).repeat(21)[:21].view(3, 7)
    mask = torch.tensor([[1] * 3 + [0] * 4, [1] * 7, [1] * 2 + [0] * 5])
    device = next(model.parameters()).device
    ids = torch.where(mask > 0, ids, fill or 0)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


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
    pairs = zip(_tokens(reference, mask > 0), _tokens(output, mask > 0), strict=True)
    return all(
        a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max())
        for a, b in pairs
    )


def same_values(x: Tensor, y: Tensor, tolerance: float | None = None) -> bool:
    """Whether outputs (n, …) differ by at most `tolerance` of the largest; None for rounding."""
    if x.numel() != y.numel():
        return False
    if tolerance is None:
        tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    x, y = x.flatten().float(), y.flatten().float()
    if not len(y):
        return True
    gap = torch.linalg.vector_norm(x - y, math.inf)
    if gap.isfinite():  # then every value is, and none has to be picked out
        return bool(gap <= tolerance * torch.linalg.vector_norm(y, math.inf))
    finite = torch.isfinite(y)
    if not torch.equal(torch.isfinite(x), finite):
        return False
    if not bool(finite.any()):
        return True
    return bool((x - y)[finite].abs().max() <= tolerance * y[finite].abs().max())


def output_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors that a model returned, alone, in a tuple or in a mapping."""
    if isinstance(output, Tensor):
        values = [output]
    else:
        values = list(output.values() if isinstance(output, Mapping) else output)
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def _tokens(output: Any, mask: Tensor) -> list[Tensor]:
    """The tensors of an output in float32, (n, L, d) ones only where the mask is set."""
    return [
        v[mask.to(v.device)] if v.dim() == 3 and v.shape[:2] == mask.shape else v
        for v in (tensor.float() for tensor in output_tensors(output))
    ]


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """What a call of the module computes, as a function of the module and its arguments."""
    of_instance = vars(module).get("forward")
    if of_instance is None:
        return type(module).forward
    return lambda _, *args, **kwargs: of_instance(*args, **kwargs)
