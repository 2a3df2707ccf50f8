"""Routing: which task owns each row, or each token, of the current forward pass.

An objective knows which examples it stacked into a batch; an adapted layer, deep inside a model
that knows nothing of tasks, needs to know it too. The objective sets the route, the layer reads it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

from foretune.models.layout import Packing, RowSlots

_ROWS: contextvars.ContextVar[RowSlots | None] = contextvars.ContextVar(
    "foretune_rows", default=None
)
_PACKING: contextvars.ContextVar[Packing | None] = contextvars.ContextVar(
    "foretune_packing", default=None
)


@contextlib.contextmanager
def route(slots: Sequence[int] | None) -> Iterator[None]:
    """Inside the block, forward passes run with these slots as the owners of their rows.

    Args:
        slots: One slot per row; None for the base model without adapters.
    """
    with routed(None if slots is None else RowSlots(tuple(slots)), None):
        yield


@contextlib.contextmanager
def routed(rows: RowSlots | None, packing: Packing | None) -> Iterator[None]:
    """Like `route`, for rows that may be packed."""
    tokens = _ROWS.set(rows), _PACKING.set(packing)
    try:
        yield
    finally:
        _ROWS.reset(tokens[0])
        _PACKING.reset(tokens[1])


def current_rows() -> RowSlots | None:
    """The rows of the innermost `route`; None outside any."""
    return _ROWS.get()


def current_packing() -> Packing | None:
    """The packing at this point of the forward pass; None where rows are padded."""
    return _PACKING.get()


def captured_route() -> Callable[[], AbstractContextManager[None]]:
    """A factory of contexts with the current route, for recomputing in the backward pass."""
    rows, packing = current_rows(), current_packing()
    return lambda: routed(rows, packing)
