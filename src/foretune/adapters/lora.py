"""The maths of one adapted layer: a shared weight W and one low-rank pair per slot.

    y_i = x_i Wᵀ + bias + s · x_i A_tᵀ B_tᵀ        t = the slot that owns vector i

    symbol   here      shape          meaning
    W        weight    (out, in)      weight that all tasks share
    A_t      a[t]      (r, in)        adapter of slot t, first factor
    B_tᵀ     bt[t]     (r, out)       adapter of slot t, second factor, stored transposed: its
                                      gradient hᵀ·gy is then a product along contiguous memory
    h        h         (r · n,)       (x Aᵀ)ᵀ, the only activation saved besides x
    s        scale     ()             lora_alpha / r, or lora_alpha / √r (rsLoRA)

The base product and the gradient of W are computed once over the vectors of all tasks; only the
rank-r products are computed per slot: in one batch where all slots have the same number of vectors,
one after the other where not.
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
from foretune.models.products import linear, weight_gradient


@dataclass(frozen=True)
class Layout:
    """The segments of a matrix of vectors, sorted by slot: one segment per slot.

    Args:
        present: The slots that own vectors, in the order of their segments.
        counts: Number of vectors of each of them.
        num_slots: Number of slots of the bank.
    """

    present: tuple[int, ...]
    counts: tuple[int, ...]
    num_slots: int

    @classmethod
    def of(cls, rows: RowSlots, num_vectors: int, num_slots: int) -> Layout:
        """The layout of `rows`, sorted by slot, which have `num_vectors` vectors (tokens) in total.

        Where all rows are of one slot, all vectors are that slot's, however the rows lie in them.

        Raises:
            ValueError: `num_vectors` is not a multiple of the number of rows.
        """
        if len(rows.present) == 1:
            return cls(rows.present, (num_vectors,), num_slots)
        if rows.tokens is not None and sum(rows.tokens) == num_vectors:
            return cls(rows.present, rows.tokens, num_slots)
        if rows.tokens is not None or num_vectors % len(rows.slots):
            raise ValueError(
                f"an adapted layer got {num_vectors} vectors where the batch has "
                f"{len(rows.slots)} rows: the model mixes or drops rows before this layer, so "
                "their tasks are unknown"
            )
        per_row = num_vectors // len(rows.slots)
        return cls(rows.present, tuple((e - s) * per_row for _, s, e in rows.segments), num_slots)

    @cached_property
    def uniform(self) -> int | None:
        """Number of vectors per slot if it is the same for all, else None."""
        return self.counts[0] if len(set(self.counts)) == 1 else None

    @cached_property
    def slots(self) -> slice | list[int] | None:
        """An index of the slots that are present; None if all of them are."""
        return None if len(self.present) == self.num_slots else index_of(self.present)


def index_of(slots: Sequence[int]) -> slice | list[int]:
    """An index of these ascending slots: a slice, which gives a view, where they are contiguous.

    >>> index_of([2, 3, 4]), index_of([2, 4]), index_of([])
    (slice(2, 5, None), [2, 4], [])
    """
    contiguous = bool(slots) and slots[-1] - slots[0] == len(slots) - 1
    return slice(slots[0], slots[-1] + 1) if contiguous else list(slots)


def shrink(x: Tensor, w: Tensor, layout: Layout) -> Tensor:
    """w[i] @ x[segment i]ᵀ for every segment.

    Args:
        x: (n, p), vectors sorted by segment.
        w: (segments, r, p).
        layout: The segments.

    Returns:
        (r · n,), the (r, vectors) matrices of the segments one after the other: transposed, because
        all products with them then run along contiguous memory (1.7 times faster on a CPU).
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
    """y[segment i] += scale · h[segment i]ᵀ @ w[i], in place.

    Args:
        y: (n, p), changed in place.
        h: (r · n,), as `shrink` returns it.
        w: (segments, r, p).
        layout: The segments.
        scale: Factor of the product.
    """
    if layout.uniform is not None:
        h = h.view(len(layout.counts), -1, layout.uniform)
        _matrices(y, layout).baddbmm_(h.transpose(1, 2), w, alpha=scale)
        return
    for y_part, h_part, w_part in zip(
        y.split(layout.counts), _parts(h, layout), w.unbind(), strict=True
    ):
        y_part.addmm_(h_part.T, w_part, alpha=scale)


def outer(h: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """(segments, r, p) h[segment i] @ x[segment i], for x (n, p) and h (r · n,) from `shrink`."""
    if layout.uniform is not None:
        return torch.bmm(h.view(len(layout.counts), -1, layout.uniform), _matrices(x, layout))
    products = x.new_empty(len(layout.counts), len(h) // len(x), x.shape[1])
    for h_part, x_part, product in zip(
        _parts(h, layout), x.split(layout.counts), products.unbind(), strict=True
    ):
        torch.mm(h_part, x_part, out=product)
    return products


def _matrices(x: Tensor, layout: Layout) -> Tensor:
    """(n, p) → (segments, vectors, p), where all segments have the same number of vectors."""
    return x.view(len(layout.counts), layout.uniform or 0, -1)


def _parts(h: Tensor, layout: Layout) -> list[Tensor]:
    """The (r, vectors) matrix of each segment."""
    r = len(h) // sum(layout.counts)
    parts = h.split([r * n for n in layout.counts])
    return [part.view(r, -1) for part in parts]


class _LoRALinear(torch.autograd.Function):
    """The layer with its own backward: computes W's gradient once and saves only x and h.

    Without a weight it is only the adapters' part.

    Where slots are absent, the gradients of A and B are added to `.grad` here instead of being
    returned: autograd would allocate a tensor of zeros of the size of the bank for each layer and
    chunk of a batch.
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
        h = shrink(x, select_present(a, layout, x.dtype), layout)
        y = x.new_zeros(len(x), bt.shape[2]) if weight is None else linear(x, weight, bias)
        add_expanded_(y, h, select_present(bt, layout, x.dtype), layout, scale)
        ctx.save_for_backward(x, weight, h)
        # Not saved as the others are: recomputation would return copies, whose .grad is lost.
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
            gh = shrink(gy, select_present(bt, layout, x.dtype), layout).mul_(scale)
            if need_x:
                gx = torch.zeros_like(x) if weight is None else linear(gy, weight.T)
                add_expanded_(gx, gh, select_present(a, layout, x.dtype), layout, 1.0)
            if need_a:
                ga = stacked_grad(a, outer(gh, x, layout), layout)
        if need_b:
            gb = stacked_grad(bt, outer(h, gy, layout).mul_(scale), layout)
        if need_w:
            gw = weight_gradient(gy, x)
        if need_bias:
            gbias = gy.sum(0)
        return gx, gw, gbias, ga, gb, None, None


def select_present(stacked: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """(segments, …) the slots of a parameter (slots, …) that are present, in the layout's order."""
    return (stacked if layout.slots is None else stacked[layout.slots]).to(dtype)


def stacked_grad(stacked: Tensor, grad: Tensor, layout: Layout) -> Tensor | None:
    """The gradient to return from a backward for a parameter that stacks slots.

    Args:
        stacked: (slots, …), the parameter.
        grad: (segments, …), the gradient of the slots that are present.
        layout: The slots that are present.

    Returns:
        The gradient; None where slots are absent, after adding it to `stacked.grad`.
    """
    grad = grad.to(stacked.dtype)
    if layout.slots is None:
        return grad
    if stacked.grad is None:
        stacked.grad = torch.zeros_like(stacked)
    stacked.grad[layout.slots] += grad
    return None


def autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Casts x (…, in), weight (out, in) and bias (out,) to autocast's dtype if autocast is enabled.

    Autocast does not do so for a custom autograd Function.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    weight, bias = (None if v is None else v.to(dtype) for v in (weight, bias))
    return x.to(dtype), weight, bias


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    bt: Tensor,
    scale: float,
    rows: RowSlots,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer with one LoRA adapter per slot.

    Args:
        x: (rows, …, in), (rows · m, in) if the model has flattened its rows, or (1, tokens, in)
            if padding has been removed. Of any shape if all rows are of one slot.
        weight: (out, in); None for the adapters' part alone.
        bias: (out,) or None.
        a: (slots, r, in), a leaf.
        bt: (slots, r, out), a leaf.
        scale: Factor of the adapter's part.
        rows: Which slot owns each row.
        dropout: Dropout probability of the adapter's input, as in PEFT.

    Returns:
        (rows, …, out).

    Raises:
        ValueError: The number of vectors of x is not a multiple of the number of rows.
    """
    x, weight, bias = autocast(x, weight, bias)
    layout = Layout.of(rows, x.numel() // x.shape[-1], a.shape[0])
    if rows.order is None and dropout == 0:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _LoRALinear.apply(flat, weight, bias, a, bt, scale, layout)
        return y.view(*x.shape[:-1], -1)
    delta = F.dropout(x, dropout)  # before rows are permuted: it tells them apart by their place
    if rows.order is not None:
        delta = by_rows(delta, rows.order, len(rows.slots))
    delta = delta.reshape(-1, x.shape[-1])
    delta = _LoRALinear.apply(delta, None, None, a, bt, scale, layout).view(*x.shape[:-1], -1)
    if rows.inverse is not None:
        delta = by_rows(delta, rows.inverse, len(rows.slots))
    return delta if weight is None else F.linear(x, weight, bias) + delta


def lora_conv1d(
    x: Tensor,
    conv: torch.nn.Conv1d,
    a: Tensor,
    b: Tensor,
    scale: float,
    rows: RowSlots,
    dropout: float = 0.0,
) -> Tensor:
    """The adapters' part of a one-dimensional convolution.

    Args:
        x: (rows · m, in, length).
        conv: The convolution, whose stride and padding the first factor takes over.
        a: (slots, r, in, k), a leaf.
        b: (slots, out, r), a leaf.
        scale: Factor of the adapter's part.
        rows: Which slot owns each row.
        dropout: Dropout probability of the adapter's input, as in PEFT.

    Returns:
        (rows · m, out, length'), to be added to `conv(x)`.
    """
    if dropout:
        x = F.dropout(x, dropout)  # before rows are permuted, as above
    sorted_x = x if rows.order is None else by_rows(x, rows.order, len(rows.slots))
    a, b = a.to(x.dtype), b.to(x.dtype)
    parts = []
    counts = Layout.of(rows, len(x), 0).counts
    for slot, part in zip(rows.present, sorted_x.split(counts), strict=True):
        h = F.conv1d(part, a[slot], None, conv.stride, conv.padding)
        parts.append(torch.einsum("or,...rl->...ol", b[slot], h))
    delta = torch.cat(parts) * scale
    return delta if rows.inverse is None else by_rows(delta, rows.inverse, len(rows.slots))


def by_rows(x: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """Permutes the rows of x (num_rows · m, …), each of m entries, by `order` (num_rows,)."""
    blocks = x.reshape(num_rows, -1, *x.shape[1:])
    return blocks[order.to(x.device)].reshape(x.shape)
