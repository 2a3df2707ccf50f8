"""torch's random functions, as far as models use them in training, on bits drawn elsewhere.

Each takes `drawn`, then the arguments of the function that it replaces. `drawn(shape, function)` is
an elementwise function of 64 random bits (int64) for each element of a tensor of this shape.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Drawn = Callable[[Sequence[int], Callable[[Tensor], Tensor]], Tensor]


def dropout(
    drawn: Drawn, x: Tensor, p: float, inplace: bool = False, dims: int | None = None
) -> Tensor:
    """Dropout of x, whose shape the mask has; with `dims` only its first dimensions."""
    shape = x.shape if dims is None else (*x.shape[:dims], *[1] * (x.dim() - dims))
    if p >= 1:
        dropped = x * 0
    else:
        quantile = round(p * 2**64) - 2**63
        keep = drawn(shape, lambda bits: bits >= quantile)
        # uint8: torch.utils.checkpoint then notices that torch's own dropout recomputes it
        dropped = x * keep.view(torch.uint8) * (1 / (1 - p))
    return x.copy_(dropped) if inplace else dropped


def uniform(bits: Tensor) -> Tensor:
    """Random bits as float32 of the same shape, from a uniform distribution."""
    return ((bits >> 40 & 2**24 - 1).float() + 0.5) * 2**-24


def normal(bits: Tensor) -> Tensor:
    """Random bits as float32 of the same shape from a standard normal distribution."""
    return torch.special.ndtri(uniform(bits))


def _dropout(
    drawn: Drawn, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return dropout(drawn, x, p, inplace) if training and p > 0 else x


def _torch_dropout(drawn: Drawn, x: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(drawn, x, p, train)


def _dropout_of_channels(
    drawn: Drawn, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return dropout(drawn, x, p, inplace, dims=2) if training and p > 0 else x


def _attention(
    drawn: Drawn,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention (…, L, d) whose weights (…, L, S) are dropped."""
    if dropout_p <= 0:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    lowest = torch.finfo(scores.dtype).min
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, lowest)
    elif attn_mask is not None:
        scores = scores + attn_mask.clamp(min=lowest)
    weights = dropout(drawn, scores.softmax(-1), dropout_p)
    return weights.to(value.dtype) @ value


def _uniform_like(drawn: Drawn, x: Tensor, **options: Any) -> Tensor:
    return drawn(x.shape, uniform).to(device=x.device, dtype=options.get("dtype") or x.dtype)


def _normal_like(drawn: Drawn, x: Tensor, **options: Any) -> Tensor:
    return drawn(x.shape, normal).to(device=x.device, dtype=options.get("dtype") or x.dtype)


def _rand(drawn: Drawn, *size: Any, **options: Any) -> Tensor:
    return _uniform_like(drawn, torch.empty(*size, **options))


def _randn(drawn: Drawn, *size: Any, **options: Any) -> Tensor:
    return _normal_like(drawn, torch.empty(*size, **options))


def _uniform_(drawn: Drawn, x: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    return x.copy_(a + (b - a) * drawn(x.shape, uniform))


def _normal_(drawn: Drawn, x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return x.copy_(mean + std * drawn(x.shape, normal))


def _bernoulli(drawn: Drawn, x: Tensor) -> Tensor:
    return (drawn(x.shape, uniform) < x).to(x.dtype)


def _bernoulli_(drawn: Drawn, x: Tensor, p: float | Tensor = 0.5) -> Tensor:
    return x.copy_(drawn(x.shape, uniform) < p)


# torch's function calls other Python functions of torch, which a function mode would not see: the
# copy does not hand itself over to the mode.
_unwatched = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _multi_head_attention(_: Drawn, *args: Any, **kwargs: Any) -> Any:
    return _unwatched(*args, **kwargs)


DROPOUT = (F.dropout, torch.dropout, F.scaled_dot_product_attention)
REPLACED: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    F.dropout1d: _dropout_of_channels,
    F.dropout2d: _dropout_of_channels,
    F.dropout3d: _dropout_of_channels,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.rand: _rand,
    torch.randn: _randn,
    torch.rand_like: _uniform_like,
    torch.randn_like: _normal_like,
    Tensor.uniform_: _uniform_,
    Tensor.normal_: _normal_,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
}
