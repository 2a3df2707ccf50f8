"""The layout of a batch: which slot owns each row, and where its tokens go without padding."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

STEP = 16  # rows whose lengths round up to the same multiple of it form a group


def rows_by_length(lengths: Collection[int]) -> list[list[int]]:
    """Indices of the rows whose lengths round up to the same multiple of `STEP`, shortest first.

    >>> rows_by_length([3, 40, 16, 33])
    [[0, 2], [1, 3]]
    """
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        groups.setdefault(-(-length // STEP), []).append(i)
    return [groups[key] for key in sorted(groups)]


@dataclass(frozen=True)
class RowSlots:
    """The slot (index of a task in the adapter bank) of each row of the leading dimension.

    Args:
        slots: One slot per row.
        lengths: Tokens of each row where padding has been removed: the rows are then concatenated
            along the second dimension, with slots in ascending order. None for padded rows.

    >>> rows = RowSlots((0, 0, 2, 2))
    >>> rows.present, rows.uniform
    ((0, 2), 2)
    >>> rows.segments
    ((0, 0, 2), (2, 2, 4))
    """

    slots: tuple[int, ...]
    lengths: tuple[int, ...] | None = None

    @cached_property
    def order(self) -> Tensor | None:
        """(n,) permutation that sorts the rows by slot; None when they are sorted already."""
        if all(a <= b for a, b in itertools.pairwise(self.slots)):
            return None
        return torch.argsort(torch.tensor(self.slots), stable=True)

    @cached_property
    def inverse(self) -> Tensor | None:
        """(n,) permutation that undoes `order`."""
        return None if self.order is None else torch.argsort(self.order)

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, start, end) of each slot's rows after sorting by `order`."""
        segments: list[tuple[int, int, int]] = []
        start = 0
        ordered = sorted(self.slots)
        for i in range(1, len(ordered) + 1):
            if i == len(ordered) or ordered[i] != ordered[start]:
                segments.append((ordered[start], start, i))
                start = i
        return tuple(segments)

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The slots that own at least one row, in ascending order."""
        return tuple(slot for slot, _, _ in self.segments)

    @cached_property
    def places(self) -> dict[int, Tensor]:
        """Slot → indices of its rows, in ascending order of the slots; (b,) each."""
        slots = torch.tensor(self.slots)
        return {slot: (slots == slot).nonzero()[:, 0] for slot in self.present}

    @cached_property
    def uniform(self) -> int | None:
        """The number of rows per present slot if it is the same for all, else None."""
        counts = {end - start for _, start, end in self.segments}
        return counts.pop() if len(counts) == 1 else None

    @cached_property
    def tokens(self) -> tuple[int, ...] | None:
        """Tokens of each present slot where padding has been removed, else None."""
        if self.lengths is None:
            return None
        ends = [0, *itertools.accumulate(self.lengths)]
        return tuple(ends[end] - ends[start] for _, start, end in self.segments)


@dataclass(frozen=True)
class Group:
    """Rows of similar length.

    Args:
        rows: (b,) indices in the padded batch.
        length: Length of the longest row.
        take: (b·length,) index among all tokens of each position; 0 for padding.
        padding: (p,) indices into `take` that are padding.
    """

    rows: Tensor
    length: int
    take: Tensor
    padding: Tensor


@dataclass(frozen=True)
class Packing:
    """How the tokens of a padded batch are concatenated, rows sorted by slot.

    Args:
        lengths: Tokens of each row, in the order of the padded batch.
        width: Length that the rows are padded to.
        order: Indices of the rows, in the order in which their tokens are concatenated.
        device: Device of the index tensors.
    """

    lengths: tuple[int, ...]
    width: int
    order: tuple[int, ...]
    device: torch.device
    _cache: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) flat position of each token in the padded batch."""
        parts = [np.arange(self.lengths[i]) + i * self.width for i in self.order]
        return self._index(np.concatenate(parts))

    @cached_property
    def row_of_token(self) -> Tensor:
        """(N,) index of each token's row in the padded batch."""
        return self.tokens // self.width

    @cached_property
    def place_of_token(self) -> Tensor:
        """(N,) place of each token in its row."""
        return self.tokens % self.width

    @cached_property
    def places(self) -> Tensor:
        """(n·width,) index among the tokens of each padded position; 0 for padding."""
        places = torch.zeros(len(self.lengths) * self.width, dtype=torch.long)
        places[self.tokens.cpu()] = torch.arange(len(self.tokens))
        return places.to(self.device)

    @cached_property
    def padding(self) -> Tensor:
        """(p,) flat positions of the padded batch that are padding."""
        lengths = np.array(self.lengths)[:, None]
        return self._index(np.flatnonzero(np.arange(self.width)[None, :] >= lengths))

    @cached_property
    def groups(self) -> list[Group]:
        """The rows, grouped by length for attention."""
        starts = dict(
            zip(self.order, np.cumsum([0, *(self.lengths[i] for i in self.order)]), strict=False)
        )
        groups = []
        for rows in rows_by_length(self.lengths):
            lengths = np.array([self.lengths[i] for i in rows])
            columns = np.arange(lengths.max())[None, :]
            inside = columns < lengths[:, None]
            take = np.where(inside, np.array([starts[i] for i in rows])[:, None] + columns, 0)
            padding = np.flatnonzero(~inside)
            groups.append(
                Group(
                    self._index(np.array(rows)),
                    int(lengths.max()),
                    self._index(take.ravel()),
                    self._index(padding),
                )
            )
        return groups

    @cached_property
    def group_places(self) -> Tensor:
        """(N,) index of each token among the positions of all groups, concatenated."""
        indices = np.zeros(len(self.tokens), dtype=np.int64)
        start = 0
        for group in self.groups:
            take = group.take.cpu().numpy()
            real = np.ones(len(take), dtype=bool)
            real[group.padding.cpu().numpy()] = False
            indices[take[real]] = np.flatnonzero(real) + start
            start += len(take)
        return self._index(indices)

    @cached_property
    def group_padding(self) -> Tensor:
        """Positions of all groups, concatenated, that are padding; shape (p,)."""
        starts = np.cumsum([0, *(len(g.take) for g in self.groups)])
        parts = [g.padding + int(s) for g, s in zip(self.groups, starts, strict=False)]
        return torch.cat(parts)

    @cached_property
    def group_take(self) -> Tensor:
        """Index among all tokens of each position of all groups; shape (positions,)."""
        return torch.cat([group.take for group in self.groups])

    def rows(self, rows: RowSlots | None) -> RowSlots | None:
        """The slots of the concatenated rows; None where there are none."""
        if rows is None:
            return None
        slots = tuple(rows.slots[i] for i in self.order)
        return RowSlots(slots, tuple(self.lengths[i] for i in self.order))

    def pack(self, x: Tensor) -> Tensor:
        """(n, width, …) → (1, N, …); a leading dimension of 1 is expanded to n."""
        if x.shape[0] != len(self.lengths):
            x = x.expand(len(self.lengths), *x.shape[1:])
        return MoveTokens.apply(x.flatten(0, 1), self.tokens, self.places, self.padding, False)[
            None
        ]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, N, …) → (n, width, …), zero at padding."""
        flat = MoveTokens.apply(x[0], self.places, self.tokens, self.padding, True)
        return flat.unflatten(0, (len(self.lengths), self.width))

    def packed_input(self, value: Any) -> Any:
        """Pack an argument of a block if it is a per-token tensor or a tuple that holds some.

        The same tensor is packed once for all blocks.
        """
        if isinstance(value, Cache):  # one for generation would hold rows run together
            return None
        if isinstance(value, tuple):
            return tuple(self.packed_input(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != self.width:
            return value
        if value.shape[0] not in (1, len(self.lengths)):
            return value
        if id(value) not in self._cache:
            self._cache[id(value)] = (
                value,
                self.pack(value),
            )  # kept alive, so that the id stays unique
        return self._cache[id(value)][1]

    def masks(self, mask: Tensor | None) -> list[Tensor | None]:
        """Each group's part of the model's mask, of shape (n or 1, heads or 1, width, width)."""
        if mask is None:
            return [None] * len(self.groups)
        if id(mask) not in self._cache:
            self._cache[id(mask)] = (mask, [_part(mask, group) for group in self.groups])
        parts: list[Tensor | None] = self._cache[id(mask)][1]
        return parts

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


def _part(mask: Tensor, group: Group) -> Tensor | None:
    """(b, heads or 1, length, length) mask of a group; None where nothing is masked."""
    rows = mask if mask.shape[0] == 1 else mask.index_select(0, group.rows)
    queries = slice(None) if mask.shape[2] == 1 else slice(group.length)
    part = rows[:, :, queries, : group.length]
    return None if part.dtype == torch.bool and bool(part.all()) else part


class MoveTokens(torch.autograd.Function):
    """y[i] = x[take[i]], with the inverse `back` for the gradient; no gradient at padding.

    Shapes: x (m, …), take (k,), back (m,), padding (p,), y (k, …).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, take: Tensor, back: Tensor, padding: Tensor, pads: bool
    ) -> Tensor:
        """(k, …) gathered rows; `padding` indexes the output if `pads`, else the input."""
        ctx.save_for_backward(back, padding)
        ctx.pads = pads
        y = x.index_select(0, take)
        return y.index_fill_(0, padding, 0) if pads else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """(m, …) gradient of x."""
        back, padding = ctx.saved_tensors
        gx = grads[0].index_select(0, back)
        return (gx if ctx.pads else gx.index_fill_(0, padding, 0)), None, None, None, None
