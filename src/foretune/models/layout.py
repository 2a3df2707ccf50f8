"""How the rows of a batch lie: which slot owns each, and where their tokens go without padding."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEP = 16  # rows whose lengths round up to the same multiple of it go together


def rows_by_length(lengths: Collection[int]) -> list[list[int]]:
    """Indices of the rows whose lengths round up to the same multiple of `STEP`, shortest first.

    >>> rows_by_length([3, 40, 16, 33])
    [[0, 2], [1, 3]]
    """
    found: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        found.setdefault(-(-length // STEP), []).append(i)
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class RowSlots:
    """The slot (index of a task in the adapter bank) of each row, that is of the leading dimension.

    Args:
        slots: One slot a row.
        lengths: Where padding has been removed, the tokens of each row: the rows then lie one after
            the other along the second dimension, and their slots are in ascending order.

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
        """The permutation that brings each slot's rows together; None when they already are."""
        if all(a <= b for a, b in itertools.pairwise(self.slots)):
            return None
        return torch.argsort(torch.tensor(self.slots), stable=True)

    @cached_property
    def inverse(self) -> Tensor | None:
        """The permutation that undoes `order`."""
        return None if self.order is None else torch.argsort(self.order)

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, start, end) of each slot's rows after sorting by `order`."""
        found: list[tuple[int, int, int]] = []
        start = 0
        ordered = sorted(self.slots)
        for i in range(1, len(ordered) + 1):
            if i == len(ordered) or ordered[i] != ordered[start]:
                found.append((ordered[start], start, i))
                start = i
        return tuple(found)

    @cached_property
    def present(self) -> tuple[int, ...]:
        """The slots that own at least one row, in ascending order."""
        return tuple(slot for slot, _, _ in self.segments)

    @cached_property
    def uniform(self) -> int | None:
        """The number of rows of every present slot when it is the same for all, else None."""
        counts = {end - start for _, start, end in self.segments}
        return counts.pop() if len(counts) == 1 else None

    @cached_property
    def tokens(self) -> tuple[int, ...] | None:
        """The tokens of each present slot, where padding has been removed."""
        if self.lengths is None:
            return None
        ends = [0, *itertools.accumulate(self.lengths)]
        return tuple(ends[end] - ends[start] for _, start, end in self.segments)


@dataclass(frozen=True)
class Group:
    """Rows of like lengths.

    Args:
        rows: (b,) their indices in the padded batch.
        length: The longest of them.
        take: (b · length,) place of each of their positions among all tokens; padding takes 0.
        padding: (p,) positions of the above that are padding.
    """

    rows: Tensor
    length: int
    take: Tensor
    padding: Tensor


@dataclass(frozen=True)
class Packing:
    """How the tokens of a padded batch lie one after the other, rows sorted by slot.

    Args:
        lengths: Tokens of each row, in the order of the padded batch.
        width: Length that the rows are padded to.
        order: Indices of the rows, in the order in which their tokens lie.
        device: Where the index tensors go.
    """

    lengths: tuple[int, ...]
    width: int
    order: tuple[int, ...]
    device: torch.device
    _kept: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def tokens(self) -> Tensor:
        """(N,) flat position in the padded batch of each token."""
        parts = [np.arange(self.lengths[i]) + i * self.width for i in self.order]
        return self._index(np.concatenate(parts))

    @cached_property
    def places(self) -> Tensor:
        """(n · width,) place of each padded position among the tokens; padding gets 0."""
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
        found = []
        for rows in rows_by_length(self.lengths):
            lengths = np.array([self.lengths[i] for i in rows])
            columns = np.arange(lengths.max())[None, :]
            inside = columns < lengths[:, None]
            take = np.where(inside, np.array([starts[i] for i in rows])[:, None] + columns, 0)
            padding = np.flatnonzero(~inside)
            found.append(
                Group(
                    self._index(np.array(rows)),
                    int(lengths.max()),
                    self._index(take.ravel()),
                    self._index(padding),
                )
            )
        return found

    @cached_property
    def group_places(self) -> Tensor:
        """(N,) place of each token among the positions of all groups, one group after the other."""
        found = np.zeros(len(self.tokens), dtype=np.int64)
        start = 0
        for group in self.groups:
            take = group.take.cpu().numpy()
            real = np.ones(len(take), dtype=bool)
            real[group.padding.cpu().numpy()] = False
            found[take[real]] = np.flatnonzero(real) + start
            start += len(take)
        return self._index(found)

    @cached_property
    def group_padding(self) -> Tensor:
        """Positions of all groups, one after the other, that are padding."""
        starts = np.cumsum([0, *(len(g.take) for g in self.groups)])
        parts = [g.padding + int(s) for g, s in zip(self.groups, starts, strict=False)]
        return torch.cat(parts)

    @cached_property
    def group_take(self) -> Tensor:
        return torch.cat([group.take for group in self.groups])

    def rows(self, rows: RowSlots | None) -> RowSlots | None:
        """Which slot owns each token."""
        if rows is None:
            return None
        slots = tuple(rows.slots[i] for i in self.order)
        return RowSlots(slots, tuple(self.lengths[i] for i in self.order))

    def pack(self, x: Tensor) -> Tensor:
        """(n, width, …) → (1, N, …); a leading dimension of 1 stands for n equal rows."""
        if x.shape[0] != len(self.lengths):
            x = x.expand(len(self.lengths), *x.shape[1:])
        return MoveTokens.apply(x.flatten(0, 1), self.tokens, self.places, self.padding, False)[
            None
        ]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, N, …) → (n, width, …), zero where there is padding."""
        flat = MoveTokens.apply(x[0], self.places, self.tokens, self.padding, True)
        return flat.unflatten(0, (len(self.lengths), self.width))

    def packed_input(self, value: Any) -> Any:
        """What a block is given beside hidden states, with everything per token packed.

        The same tensor is packed once for all blocks.
        """
        if isinstance(value, tuple):
            return tuple(self.packed_input(v) for v in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != self.width:
            return value
        if value.shape[0] not in (1, len(self.lengths)):
            return value
        if id(value) not in self._kept:
            self._kept[id(value)] = (value, self.pack(value))  # held, so that the id stays its own
        return self._kept[id(value)][1]

    def masks(self, mask: Tensor | None) -> list[Tensor | None]:
        """The part of the model's mask (n or 1, heads or 1, width, width) for each group."""
        if mask is None:
            return [None] * len(self.groups)
        if id(mask) not in self._kept:
            self._kept[id(mask)] = (mask, [_part(mask, group) for group in self.groups])
        found: list[Tensor | None] = self._kept[id(mask)][1]
        return found

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self.device)


def _part(mask: Tensor, group: Group) -> Tensor | None:
    rows = mask if mask.shape[0] == 1 else mask.index_select(0, group.rows)
    queries = slice(None) if mask.shape[2] == 1 else slice(group.length)
    part = rows[:, :, queries, : group.length]
    return None if part.dtype == torch.bool and bool(part.all()) else part


class MoveTokens(torch.autograd.Function):
    """y[i] = x[take[i]], where `back` is the other way round; no gradient at padding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, take: Tensor, back: Tensor, padding: Tensor, pads: bool
    ) -> Tensor:
        ctx.save_for_backward(back, padding)
        ctx.pads = pads
        y = x.index_select(0, take)
        return y.index_fill_(0, padding, 0) if pads else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back, padding = ctx.saved_tensors
        gx = grads[0].index_select(0, back)
        return (gx if ctx.pads else gx.index_fill_(0, padding, 0)), None, None, None, None
