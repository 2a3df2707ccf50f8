"""The maths of stacked copies of a layer: each vector meets the weights of the slot that owns it.

    y_i = x_i W_tᵀ + b_t        t = the slot that owns vector i; W (slots, out, in), b (slots, out)

One batched product serves all slots with about as many vectors: these are padded to the largest of
them, by less than a factor of two, however unequal the slots are. The gradient of slots that a
batch lacks is never formed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foretune.adapters.lora import Layout, index_of
from foretune.models.layout import RowSlots


@dataclass(frozen=True)
class Blocks:
    """Where each vector of a batch is in matrices of the vectors of one slot each.

    Args:
        slots: The slot of each matrix; those of a block are neighbours.
        shapes: (matrices, vectors per matrix) of each block, whose matrices are of equal size.
        places: (n,) row of each vector where all matrices are stacked; None if all lie in order.
        owners: (n,) matrix of each vector.
    """

    slots: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    places: Tensor | None
    owners: Tensor

    @classmethod
    def of(cls, rows: RowSlots, num_vectors: int, device: torch.device) -> Blocks:
        """The blocks of the `num_vectors` vectors of these rows, row after row.

        >>> blocks = Blocks.of(RowSlots((4, 2, 4, 4)), 4, torch.device("cpu"))
        >>> blocks.slots, blocks.shapes, blocks.places.tolist(), blocks.owners.tolist()
        ((2, 4), ((1, 1), (1, 3)), [1, 0, 2, 3], [1, 0, 1, 1])
        """
        counts = np.array(Layout.of(rows, num_vectors, 0).counts)
        sizes = np.ceil(np.log2(counts)) if len(set(counts)) > 1 else np.zeros(len(counts))
        order = np.argsort(sizes, kind="stable")
        shapes, widths = [], np.empty_like(counts)  # of the matrix of each segment
        for size in np.unique(sizes):
            of_block = sizes == size
            widths[of_block] = counts[of_block].max()
            shapes.append((int(of_block.sum()), int(counts[of_block].max())))
        segment = np.repeat(np.arange(len(counts)), counts)
        rank = np.arange(num_vectors) - (np.cumsum(counts) - counts)[segment]
        ends = np.empty_like(counts)
        ends[order] = np.cumsum(widths[order])
        matrix = np.empty_like(counts)
        matrix[order] = np.arange(len(counts))
        places, owners = (ends - widths)[segment] + rank, matrix[segment]
        if rows.inverse is not None:
            back = rows.inverse.numpy()
            places, owners = (v.reshape(len(back), -1)[back].ravel() for v in (places, owners))
        in_order = int(widths.sum()) == num_vectors and bool((np.diff(places) == 1).all())
        return cls(
            tuple(rows.present[i] for i in order),
            tuple(shapes),
            None if in_order else torch.from_numpy(places).to(device),
            torch.from_numpy(owners).to(device),
        )


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Blocks) -> Tensor:
    """A linear layer of which each slot has its own.

    Args:
        x: (n, in), the vectors.
        weight: (s, out, in), of the slots of the blocks, as `of_slots` selects them.
        bias: (s, out) or None.
        blocks: Where the vectors are.

    Returns:
        (n, out).
    """
    if blocks.places is not None:
        size = sum(matrices * vectors for matrices, vectors in blocks.shapes)
        x = x.new_zeros(size, x.shape[1]).index_copy(0, blocks.places, x)
    numbers = [matrices for matrices, _ in blocks.shapes]
    parts = zip(
        x.split([matrices * vectors for matrices, vectors in blocks.shapes]),
        weight.mT.split(numbers),
        [None] * len(numbers) if bias is None else bias.split(numbers),
        strict=True,
    )
    products = []
    for x_part, w_part, b_part in parts:
        matrices = x_part.view(len(w_part), -1, x_part.shape[1])
        if b_part is None:
            product = torch.bmm(matrices, w_part)
        else:
            product = torch.baddbmm(b_part[:, None], matrices, w_part)
        products.append(product.flatten(0, 1))
    y = products[0] if len(products) == 1 else torch.cat(products)
    return y if blocks.places is None else y.index_select(0, blocks.places)


def stacked_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, blocks: Blocks
) -> Tensor:
    """A layer norm of which each slot has its own: x (n, d), weight and bias (s, d) as above."""
    y = F.layer_norm(x, x.shape[1:], None, None, eps) * weight.index_select(0, blocks.owners)
    return y if bias is None else y + bias.index_select(0, blocks.owners)


def of_slots(stacked: Tensor, slots: Sequence[int]) -> Tensor:
    """The values (s, …) of these distinct slots of a parameter (slots, …), a leaf."""
    if tuple(slots) == tuple(range(len(stacked))):
        return stacked
    selected: Tensor = _OfSlots.apply(stacked, tuple(slots))
    return selected


class _OfSlots(torch.autograd.Function):
    """Selects slots; the gradient is added to theirs in `.grad` in place.

    Autograd would allocate zeros of the size of the whole stack each time.
    """

    @staticmethod
    def forward(ctx: Any, stacked: Tensor, slots: tuple[int, ...]) -> Tensor:
        ascending = all(a < b for a, b in itertools.pairwise(slots))
        ctx.index = index_of(slots) if ascending else list(slots)
        # Not saved as tensors are: recomputation would return copies, whose .grad is lost.
        ctx.stacked = stacked
        selected = stacked[ctx.index]
        return selected.clone() if isinstance(ctx.index, slice) else selected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.stacked.grad is None:
            ctx.stacked.grad = torch.zeros_like(ctx.stacked)
        ctx.stacked.grad[ctx.index] += grads[0]
        return None, None
