"""Which task owns each row, or each token, of the present forward pass.

An objective knows which examples it stacked into a batch; an adapted layer, deep inside a model
that knows nothing of tasks, needs to know it too. The objective says it here, the layer asks here.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foretune.models.packing import Packing


@dataclass(frozen=True)
class Rows:
    """The slot (index of a task in the adapter bank) of each row, that is of the leading dimension.

    Args:
        slots: One slot a row.
        lengths: Where padding has been removed, the tokens of each row: the rows then lie one after
            the other along the second dimension, and their slots are in ascending order.

    >>> rows = Rows((0, 0, 2, 2))
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


_ROWS: contextvars.ContextVar[Rows | None] = contextvars.ContextVar("foretune_rows", default=None)
_PACKING: contextvars.ContextVar[Packing | None] = contextvars.ContextVar(
    "foretune_packing", default=None
)


@contextlib.contextmanager
def route(slots: Sequence[int] | None) -> Iterator[None]:
    """Says, for the forward passes inside the block, which slot owns each row.

    Args:
        slots: One slot a row; None for the base model without any adapter.
    """
    with routed(None if slots is None else Rows(tuple(slots)), None):
        yield


@contextlib.contextmanager
def routed(rows: Rows | None, packing: Packing | None) -> Iterator[None]:
    """Says it for rows that may lie one after the other without padding."""
    tokens = _ROWS.set(rows), _PACKING.set(packing)
    try:
        yield
    finally:
        _ROWS.reset(tokens[0])
        _PACKING.reset(tokens[1])


def current_rows() -> Rows | None:
    """What the innermost `route` said; None outside of any."""
    return _ROWS.get()


def current_packing() -> Packing | None:
    """How rows lie one after the other here in the forward pass; None where they are padded."""
    return _PACKING.get()


def captured_route() -> Callable[[], AbstractContextManager[None]]:
    """What holds now, to be said again when the backward pass recomputes this part."""
    rows, packing = current_rows(), current_packing()
    return lambda: routed(rows, packing)
