"""The maths of one adapted layer: a shared weight W and one low-rank pair for each slot.

    y_i = x_i Wᵀ + bias + s · x_i A_tᵀ B_tᵀ        t = the slot that owns row i

    symbol   here      shape          meaning
    W        weight    (out, in)      weight that every task shares
    A_t      a[t]      (r, in)        adapter of slot t, first factor
    B_tᵀ     bt[t]     (r, out)       adapter of slot t, second factor, stored transposed: its
                                      gradient hᵀ·gy is then a product along contiguous memory
    h        h         (n, r)         x Aᵀ, the only activation kept beside x itself
    s        scale     ()             lora_alpha / r, or lora_alpha / √r (rsLoRA)

The base product runs once over the rows of all tasks and so does the gradient of W; only the
rank-r products are batched over slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foretune.models.routing import Rows


@dataclass(frozen=True)
class Layout:
    """Where each slot's vectors lie in a matrix that holds the vectors of all rows.

    Args:
        segments: (position in the gathered adapters, start, end), in ascending order.
        uniform: Vectors of every slot when that is one number, else None.
    """

    segments: tuple[tuple[int, int, int], ...]
    uniform: int | None

    @classmethod
    def of(cls, rows: Rows, vectors_per_row: int) -> Layout:
        """The layout of `rows`, sorted by slot, with that many vectors (tokens) in each."""
        k = vectors_per_row
        segments = tuple((i, s * k, e * k) for i, (_, s, e) in enumerate(rows.segments))
        return cls(segments, None if rows.uniform is None else rows.uniform * k)


def grouped(x: Tensor, w: Tensor, layout: Layout) -> Tensor:
    """x[segment i] @ w[i] for every segment.

    Args:
        x: (n, p), vectors sorted by segment.
        w: (segments, p, q).

    Returns:
        (n, q).
    """
    if layout.uniform is not None:
        return torch.bmm(x.view(len(layout.segments), layout.uniform, -1), w).flatten(0, 1)
    return torch.cat([x[start:end] @ w[i] for i, start, end in layout.segments])


def add_grouped_(y: Tensor, x: Tensor, w: Tensor, layout: Layout, scale: float) -> None:
    """y[segment i] += scale · x[segment i] @ w[i], in place; shapes as in `grouped`."""
    if layout.uniform is not None:
        shape = (len(layout.segments), layout.uniform, -1)
        y.view(shape).baddbmm_(x.view(shape), w, alpha=scale)
        return
    for i, start, end in layout.segments:
        y[start:end].addmm_(x[start:end], w[i], alpha=scale)


def grouped_outer(x: Tensor, y: Tensor, layout: Layout) -> Tensor:
    """x[segment i]ᵀ @ y[segment i] for every segment: (n, p), (n, q) → (segments, p, q)."""
    if layout.uniform is not None:
        shape = (len(layout.segments), layout.uniform, -1)
        return torch.bmm(x.view(shape).transpose(1, 2), y.view(shape))
    return torch.stack([x[start:end].T @ y[start:end] for _, start, end in layout.segments])


class _LoRALinear(torch.autograd.Function):
    """The layer with its own backward: W's gradient once, and no activation kept but x and h."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        bt: Tensor,
        scale: float,
        layout: Layout,
    ) -> Tensor:
        y = F.linear(x, weight, bias)
        h = grouped(x, a.transpose(1, 2), layout)
        add_grouped_(y, h, bt, layout, scale)
        ctx.save_for_backward(x, weight, a, bt, h)
        ctx.scale, ctx.layout = scale, layout
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, a, bt, h = ctx.saved_tensors
        gy = grads[0].contiguous()
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        gx = gw = gbias = ga = gb = None
        if need_x or need_a:
            gh = grouped(gy, bt.transpose(1, 2), ctx.layout).mul_(ctx.scale)
            if need_x:
                gx = gy @ weight
                add_grouped_(gx, gh, a, ctx.layout, 1.0)
            if need_a:
                ga = grouped_outer(gh, x, ctx.layout)
        if need_b:
            gb = grouped_outer(h, gy, ctx.layout).mul_(ctx.scale)
        if need_w:
            gw = gy.T @ x
        if need_bias:
            gbias = gy.sum(0)
        return gx, gw, gbias, ga, gb, None, None


def select(stacked: Tensor, rows: Rows) -> Tensor:
    """The adapters of the slots that are present, in the order of `rows.segments`."""
    if rows.present == tuple(range(stacked.shape[0])):
        return stacked
    return stacked[torch.tensor(rows.present, device=stacked.device)]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    bt: Tensor,
    scale: float,
    rows: Rows,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer with one LoRA adapter for each slot.

    Args:
        x: (rows, …, in), or (rows · m, in) when the model has flattened its rows.
        weight: (out, in).
        bias: (out,) or None.
        a: (slots, r, in).
        bt: (slots, r, out).
        scale: Factor of the adapter's part.
        rows: Which slot owns each row.
        dropout: Probability with which the adapter's input is dropped, as in PEFT.

    Returns:
        (rows, …, out).

    Raises:
        ValueError: The leading dimension of x is no multiple of the number of rows.
    """
    per_row = vectors_per_row(x, rows)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, a, bt = (t.to(dtype) for t in (x, weight, a, bt))
        bias = None if bias is None else bias.to(dtype)
    layout = Layout.of(rows, per_row)
    a, bt = select(a, rows), select(bt, rows)
    if rows.order is None and dropout == 0:
        flat = x.reshape(-1, x.shape[-1])
        y = _LoRALinear.apply(flat, weight, bias, a, bt, scale, layout)
        return y.view(*x.shape[:-1], -1)
    delta = x if rows.order is None else by_rows(x, rows.order, len(rows.slots))
    delta = F.dropout(delta, dropout).reshape(-1, x.shape[-1])
    delta = grouped(grouped(delta, a.transpose(1, 2), layout), bt, layout) * scale
    delta = delta.view(*x.shape[:-1], -1)
    if rows.inverse is not None:
        delta = by_rows(delta, rows.inverse, len(rows.slots))
    return F.linear(x, weight, bias) + delta


def lora_conv1d(
    x: Tensor, conv: torch.nn.Conv1d, a: Tensor, b: Tensor, scale: float, rows: Rows
) -> Tensor:
    """The adapters' part of a one-dimensional convolution: a (slots, r, in, k), b (slots, out, r).

    Args:
        x: (rows, in, length).
        conv: Its stride, padding and dilation hold for the first factor too.

    Returns:
        (rows, out, length'): what is to be added to `conv(x)`.
    """
    vectors_per_row(x, rows)
    sorted_x = x if rows.order is None else x[rows.order]
    parts = []
    for slot, start, end in rows.segments:
        h = F.conv1d(sorted_x[start:end], a[slot], None, conv.stride, conv.padding, conv.dilation)
        parts.append(torch.einsum("or,nrl->nol", b[slot], h))
    delta = torch.cat(parts) * scale
    return delta if rows.inverse is None else delta[rows.inverse]


def vectors_per_row(x: Tensor, rows: Rows) -> int:
    """How many vectors (tokens) of x belong to one row."""
    if x.shape[0] % len(rows.slots):
        raise ValueError(
            f"an adapted layer got {x.shape[0]} rows where the batch has {len(rows.slots)}: "
            "the model mixes or drops rows before this layer, so their tasks are unknown"
        )
    return x.numel() // x.shape[-1] // len(rows.slots)


def by_rows(x: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """x with its rows permuted; the leading dimension may hold several entries for each row."""
    blocks = x.reshape(num_rows, -1, *x.shape[1:])
    return blocks[order.to(x.device)].reshape(x.shape)
