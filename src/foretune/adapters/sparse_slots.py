"""The maths of one sparsely adapted layer: a shared weight W and one sparse change per slot.

    y_i = x_i (W + S_t)ᵀ + bias        t = the slot that owns vector i; S_t is zero outside M

    symbol   here        shape       meaning
    W        weight      (out, in)   weight that all tasks share
    M        positions   (m,)        entries of the flattened W that change, the same for all tasks
    S_t[M]   values[t]   (m,)        what slot t adds there

A slot's product with W + S_t replaces its part of the product with W. The gradient of S_t is the
contribution of the slot's vectors to the gradient of W, read at M. So a task adds no matrix
product, only a copy of W per layer and pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foretune.adapters.lora import Layout, autocast, by_rows, select_present, stacked_grad
from foretune.models.layout import RowSlots


def changed_weight(weight: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """(out, in) W + S_t, dense; value (m,) is S_t at positions (m,) of the flattened W."""
    dense = weight.clone(memory_format=torch.contiguous_format)
    dense.view(-1)[positions] += value
    return dense


class _SparseLinear(torch.autograd.Function):
    """The layer with its own backward, which saves only x and recomputes each W + S_t.

    Where slots are absent, the gradient of the values is added to `.grad` as in `adapters.lora`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        positions: Tensor,
        layout: Layout,
    ) -> Tensor:
        y = x.new_empty(len(x), len(weight))
        present = select_present(values, layout, x.dtype)
        for x_part, y_part, value in zip(
            x.split(layout.counts), y.split(layout.counts), present.unbind(), strict=True
        ):
            torch.mm(x_part, changed_weight(weight, value, positions).T, out=y_part)
        ctx.save_for_backward(x, weight, positions)
        # Not saved as the others are: recomputation would return a copy, whose .grad is lost.
        ctx.values, ctx.layout = values, layout
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, positions = ctx.saved_tensors
        values, layout, gy = ctx.values, ctx.layout, grads[0].contiguous()
        need_x, need_w, need_bias, need_values = ctx.needs_input_grad[:4]
        present = select_present(values, layout, x.dtype)
        gx = torch.empty_like(x) if need_x else None
        gw = x.new_zeros(weight.shape) if need_w else None
        gvalues = torch.empty_like(present)
        start = 0
        for i, count in enumerate(layout.counts):
            part = slice(start, start + count)
            start += count
            if gx is not None:
                torch.mm(gy[part], changed_weight(weight, present[i], positions), out=gx[part])
            if gw is not None or need_values:
                gw_slot = gy[part].T @ x[part]
                gvalues[i] = gw_slot.flatten()[positions]
                if gw is not None:
                    gw += gw_slot
        gstacked = stacked_grad(values, gvalues, layout) if need_values else None
        return gx, gw, gy.sum(0) if need_bias else None, gstacked, None, None


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    positions: Tensor,
    rows: RowSlots,
) -> Tensor:
    """A linear layer with one sparse change per slot.

    Args:
        x: (rows, …, in), (rows · m, in) if the model has flattened its rows, or (1, tokens, in)
            if padding has been removed.
        weight: (out, in).
        bias: (out,) or None.
        values: (slots, m), a leaf.
        positions: (m,) distinct positions in the flattened weight.
        rows: Which slot owns each row.

    Returns:
        (rows, …, out).

    Raises:
        ValueError: The number of vectors of x is not a multiple of the number of rows.
    """
    x, cast_weight, bias = autocast(x, weight, bias)
    layout = Layout.of(rows, x.numel() // x.shape[-1], values.shape[0])
    sorted_x = x if rows.order is None else by_rows(x, rows.order, len(rows.slots))
    flat = sorted_x.reshape(-1, x.shape[-1])
    y: Tensor = _SparseLinear.apply(flat, cast_weight, bias, values, positions, layout)
    y = y.view(*x.shape[:-1], -1)
    return y if rows.inverse is None else by_rows(y, rows.inverse, len(rows.slots))
