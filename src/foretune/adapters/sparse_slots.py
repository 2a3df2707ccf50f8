"""The maths of one sparsely adapted layer: a shared weight W and one sparse change for each slot.

    y_i = x_i (W + S_t)ᵀ + bias        t = the slot that owns vector i; S_t is zero outside M

    symbol   here        shape       meaning
    W        weight      (out, in)   weight that every task shares
    M        places      (m,)        entries of the flattened W that a task may change, all alike
    S_t[M]   values[t]   (m,)        what slot t adds there

A slot's product with W + S_t takes the place of its part of the product with W. The gradient of
S_t is what the slot's own vectors give to the gradient of W, read at M. So a task adds no matrix
product, but a copy of W for each layer and pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foretune.adapters.lora import Layout, autocast, by_rows, given, present
from foretune.models.layout import RowSlots


def changed(weight: Tensor, value: Tensor, places: Tensor) -> Tensor:
    """W + S_t, dense."""
    dense = weight.clone(memory_format=torch.contiguous_format)
    dense.view(-1)[places] += value
    return dense


class _SparseLinear(torch.autograd.Function):
    """The layer with its own backward, which keeps x alone and makes each W + S_t anew.

    Where slots are absent, the gradient of the values is added to `.grad` as in `adapters.lora`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        places: Tensor,
        layout: Layout,
    ) -> Tensor:
        y = x.new_empty(len(x), len(weight))
        now = present(values, layout, x.dtype)
        for x_part, y_part, value in zip(
            x.split(layout.counts), y.split(layout.counts), now.unbind(), strict=True
        ):
            torch.mm(x_part, changed(weight, value, places).T, out=y_part)
        ctx.save_for_backward(x, weight, places)
        # Not saved as the others are: a recomputation would hand out a copy, whose .grad is lost.
        ctx.values, ctx.layout = values, layout
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, places = ctx.saved_tensors
        values, layout, gy = ctx.values, ctx.layout, grads[0].contiguous()
        need_x, need_w, need_bias, need_values = ctx.needs_input_grad[:4]
        now = present(values, layout, x.dtype)
        gx = torch.empty_like(x) if need_x else None
        gw = x.new_zeros(weight.shape) if need_w else None
        gvalues = torch.empty_like(now)
        start = 0
        for i, count in enumerate(layout.counts):
            part = slice(start, start + count)
            start += count
            if gx is not None:
                torch.mm(gy[part], changed(weight, now[i], places), out=gx[part])
            if gw is not None or need_values:
                own = gy[part].T @ x[part]
                gvalues[i] = own.flatten()[places]
                if gw is not None:
                    gw += own
        given_values = given(values, gvalues, layout) if need_values else None
        return gx, gw, gy.sum(0) if need_bias else None, given_values, None, None


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, places: Tensor, rows: RowSlots
) -> Tensor:
    """A linear layer with one sparse change for each slot.

    Args:
        x: (rows, …, in), (rows · m, in) when the model has flattened its rows, or (1, tokens, in)
            when padding has been removed.
        weight: (out, in).
        bias: (out,) or None.
        values: (slots, m), a leaf.
        places: (m,) distinct places in the flattened weight.
        rows: Which slot owns each row.

    Returns:
        (rows, …, out).

    Raises:
        ValueError: The vectors of x are no multiple of the number of rows.
    """
    x, weight, bias = autocast(x, weight, bias)
    layout = Layout.of(rows, x.numel() // x.shape[-1], values.shape[0])
    by_task = x if rows.order is None else by_rows(x, rows.order, len(rows.slots))
    flat = by_task.reshape(-1, x.shape[-1])
    y: Tensor = _SparseLinear.apply(flat, weight, bias, values, places, layout)
    y = y.view(*x.shape[:-1], -1)
    return y if rows.inverse is None else by_rows(y, rows.inverse, len(rows.slots))
