"""The maths of one adapted layer: a shared weight W and one low-rank pair for each slot.

    y_i = x_i Wᵀ + bias + s · x_i A_tᵀ B_tᵀ        t = the slot that owns vector i

    symbol   here      shape          meaning
    W        weight    (out, in)      weight that every task shares
    A_t      a[t]      (r, in)        adapter of slot t, first factor
    B_tᵀ     bt[t]     (r, out)       adapter of slot t, second factor, stored transposed: its
                                      gradient hᵀ·gy is then a product along contiguous memory
    h        h         (r · n,)       (x Aᵀ)ᵀ, the only activation kept beside x itself
    s        scale     ()             lora_alpha / r, or lora_alpha / √r (rsLoRA)

The base product runs once over the vectors of all tasks and so does the gradient of W; only the
rank-r products are made slot by slot: batched where every slot has the same number of vectors, one
after the other where not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foretune.models.layout import RowSlots


@dataclass(frozen=True)
class Layout:
    """Where each slot's vectors lie in a matrix that holds the vectors of all rows.

    Args:
        present: The slots that own vectors, in the order in which these lie.
        counts: Vectors of each of them.
        num_slots: Slots of the bank.
    """

    present: tuple[int, ...]
    counts: tuple[int, ...]
    num_slots: int

    @classmethod
    def of(cls, rows: RowSlots, num_vectors: int, num_slots: int) -> Layout:
        """The layout of `rows`, sorted by slot, when they have so many vectors (tokens) together.

        Raises:
            ValueError: That is no multiple of the number of rows.
        """
        if rows.tokens is not None and sum(rows.tokens) == num_vectors:
            return cls(rows.present, rows.tokens, num_slots)
        if rows.tokens is not None or num_vectors % len(rows.slots):
            raise ValueError(
                f"an adapted layer got {num_vectors} vectors where the batch has "
                f"{len(rows.slots)} rows: the model mixes or drops rows before this layer, so "
                "their tasks are unknown"
            )
        each = num_vectors // len(rows.slots)
        return cls(rows.present, tuple((e - s) * each for _, s, e in rows.segments), num_slots)

    @cached_property
    def uniform(self) -> int | None:
        """Vectors of every slot when that is one number, else None."""
        return self.counts[0] if len(set(self.counts)) == 1 else None

    @cached_property
    def slots(self) -> slice | list[int] | None:
        """What indexes the slots that are present; None when it is all of them."""
        return None if len(self.present) == self.num_slots else index_of(self.present)


def index_of(slots: Sequence[int]) -> slice | list[int]:
    """What indexes these ascending slots: a view where they are neighbours.

    >>> index_of([2, 3, 4]), index_of([2, 4])
    (slice(2, 5, None), [2, 4])
    """
    neighbours = slots[-1] - slots[0] == len(slots) - 1
    return slice(slots[0], slots[-1] + 1) if neighbours else list(slots)


def shrink(x: Tensor, w: Tensor, layout: Layout) -> Tensor:
    """w[i] @ x[segment i]ᵀ for every segment.

    Args:
        x: (n, p), vectors sorted by segment.
        w: (segments, r, p).

    Returns:
        (r · n,), the (r, vectors) matrix of one segment after the other: transposed, because all
        products with it are then made of rows that lie together (1.7 times faster on a CPU).
    """
    if layout.uniform is not None:
        return torch.bmm(w, _matrices(x, layout).transpose(1, 2)).flatten()
    h = x.new_empty(x.shape[0] * w.shape[1])
    for w_part, x_part, h_part in zip(
        w.unbind(), x.split(layout.counts), _parts(h, layout), strict=True
    ):
        torch.mm(w_part, x_part.T, out=h_part)
    return h


def add_expanded_(y: Tensor, h: Tensor, w: Tensor, layout: Layout, scale: float) -> None:
    """y[segment i] += scale · h[segment i]ᵀ @ w[i], in place; h as `shrink` gives it."""
    if layout.uniform is not None:
        h = h.view(len(layout.counts), -1, layout.uniform)
        _matrices(y, layout).baddbmm_(h.transpose(1, 2), w, alpha=scale)
        return
    for y_part, h_part, w_part in zip(
        y.split(layout.counts), _parts(h, layout), w.unbind(), strict=True
    ):
        y_part.addmm_(h_part.T, w_part, alpha=scale)


def outer(h: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """h[segment i] @ x[segment i] for every segment → (segments, r, p); h as `shrink` gives it."""
    if layout.uniform is not None:
        return torch.bmm(h.view(len(layout.counts), -1, layout.uniform), _matrices(x, layout))
    found = x.new_empty(len(layout.counts), len(h) // len(x), x.shape[1])
    for h_part, x_part, part in zip(
        _parts(h, layout), x.split(layout.counts), found.unbind(), strict=True
    ):
        torch.mm(h_part, x_part, out=part)
    return found


def _matrices(x: Tensor, layout: Layout) -> Tensor:
    """(n, p) → (segments, vectors, p), when all segments have equally many."""
    return x.view(len(layout.counts), layout.uniform or 0, -1)


def _parts(h: Tensor, layout: Layout) -> list[Tensor]:
    """The (r, vectors) matrix of each segment."""
    r = len(h) // sum(layout.counts)
    parts = h.split([r * n for n in layout.counts])
    return [part.view(r, -1) for part in parts]


class _LoRALinear(torch.autograd.Function):
    """The layer with its own backward: W's gradient once, and no activation kept but x and h.

    Without a weight it is the adapters' part alone.

    Where slots are absent, the gradients of A and B are added to `.grad` here instead of being
    returned: autograd would make a tensor of zeros of the size of the whole bank for every layer
    and every chunk of a batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        bt: Tensor,
        scale: float,
        layout: Layout,
    ) -> Tensor:
        a_now, bt_now = present(a, layout, x.dtype), present(bt, layout, x.dtype)
        h = shrink(x, a_now, layout)
        y = x.new_zeros(len(x), bt.shape[2]) if weight is None else F.linear(x, weight, bias)
        add_expanded_(y, h, bt_now, layout, scale)
        ctx.save_for_backward(x, weight, h)
        # Not saved as the others are: a recomputation would hand out copies, whose .grad is lost.
        ctx.a, ctx.bt = a, bt
        ctx.scale, ctx.layout = scale, layout
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, h = ctx.saved_tensors
        a, bt, layout, scale = ctx.a, ctx.bt, ctx.layout, ctx.scale
        gy = grads[0].contiguous()
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        gx = gw = gbias = ga = gb = None
        if need_x or need_a:
            gh = shrink(gy, present(bt, layout, x.dtype), layout).mul_(scale)
            if need_x:
                gx = torch.zeros_like(x) if weight is None else gy @ weight
                add_expanded_(gx, gh, present(a, layout, x.dtype), layout, 1.0)
            if need_a:
                ga = given(a, outer(gh, x, layout), layout)
        if need_b:
            gb = given(bt, outer(h, gy, layout).mul_(scale), layout)
        if need_w:
            gw = gy.T @ x
        if need_bias:
            gbias = gy.sum(0)
        return gx, gw, gbias, ga, gb, None, None


def present(stacked: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """The adapters of the slots that are present, in the layout's order."""
    return (stacked if layout.slots is None else stacked[layout.slots]).to(dtype)


def given(stacked: Tensor, grad: Tensor, layout: Layout) -> Tensor | None:
    """The gradient to return for a stacked parameter; None when it has been added to `.grad`."""
    grad = grad.to(stacked.dtype)
    if layout.slots is None:
        return grad
    if stacked.grad is None:
        stacked.grad = torch.zeros_like(stacked)
    stacked.grad[layout.slots] += grad
    return None


def autocast(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's type, where it is on: a Function of our own must see to it."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    bt: Tensor,
    scale: float,
    rows: RowSlots,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer with one LoRA adapter for each slot.

    Args:
        x: (rows, …, in), (rows · m, in) when the model has flattened its rows, or (1, tokens, in)
            when padding has been removed.
        weight: (out, in).
        bias: (out,) or None.
        a: (slots, r, in), a leaf.
        bt: (slots, r, out), a leaf.
        scale: Factor of the adapter's part.
        rows: Which slot owns each row.
        dropout: Probability with which the adapter's input is dropped, as in PEFT.

    Returns:
        (rows, …, out).

    Raises:
        ValueError: The vectors of x are no multiple of the number of rows.
    """
    x, weight, bias = autocast(x, weight, bias)
    layout = Layout.of(rows, x.numel() // x.shape[-1], a.shape[0])
    if rows.order is None and dropout == 0:
        flat = x.reshape(-1, x.shape[-1])
        y = _LoRALinear.apply(flat, weight, bias, a, bt, scale, layout)
        return y.view(*x.shape[:-1], -1)
    delta = x if rows.order is None else by_rows(x, rows.order, len(rows.slots))
    delta = F.dropout(delta, dropout).reshape(-1, x.shape[-1])
    delta = _LoRALinear.apply(delta, None, None, a, bt, scale, layout).view(*x.shape[:-1], -1)
    if rows.inverse is not None:
        delta = by_rows(delta, rows.inverse, len(rows.slots))
    return F.linear(x, weight, bias) + delta


def lora_conv1d(
    x: Tensor, conv: torch.nn.Conv1d, a: Tensor, b: Tensor, scale: float, rows: RowSlots
) -> Tensor:
    """The adapters' part of a one-dimensional convolution: a (slots, r, in, k), b (slots, out, r).

    Args:
        x: (rows, in, length).
        conv: Its stride, padding and dilation hold for the first factor too.

    Returns:
        (rows, out, length'): what is to be added to `conv(x)`.
    """
    sorted_x = x if rows.order is None else x[rows.order]
    parts = []
    for slot, part in zip(rows.present, by_slot(sorted_x, rows), strict=True):
        h = F.conv1d(part, a[slot], None, conv.stride, conv.padding, conv.dilation)
        parts.append(torch.einsum("or,nrl->nol", b[slot], h))
    delta = torch.cat(parts) * scale
    return delta if rows.inverse is None else delta[rows.inverse]


def by_slot(x: Tensor, rows: RowSlots) -> Sequence[Tensor]:
    """The parts of x that belong to each slot; x is sorted by slot.

    Args:
        x: (rows · m, …), or (1, tokens, …) where padding has been removed.

    Raises:
        ValueError: x has another number of rows or tokens.
    """
    dim = 0 if rows.tokens is None else 1
    counts = Layout.of(rows, x.shape[dim], 0).counts
    return x.split(counts, dim)


def by_rows(x: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """x with its rows permuted; the leading dimension may hold several entries for each row."""
    blocks = x.reshape(num_rows, -1, *x.shape[1:])
    return blocks[order.to(x.device)].reshape(x.shape)
