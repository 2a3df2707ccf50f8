"""Which task owns each row, or each token, of the present forward pass.

An objective knows which examples it stacked into a batch; an adapted layer, deep inside a model
that knows nothing of tasks, needs to know it too. The objective says it here, the layer asks here.
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
    """Says, for the forward passes inside the block, which slot owns each row.

    Args:
        slots: One slot a row; None for the base model without any adapter.
    """
    with routed(None if slots is None else RowSlots(tuple(slots)), None):
        yield


@contextlib.contextmanager
def routed(rows: RowSlots | None, packing: Packing | None) -> Iterator[None]:
    """Says it for rows that may lie one after the other without padding."""
    tokens = _ROWS.set(rows), _PACKING.set(packing)
    try:
        yield
    finally:
        _ROWS.reset(tokens[0])
        _PACKING.reset(tokens[1])


def current_rows() -> RowSlots | None:
    """What the innermost `route` said; None outside of any."""
    return _ROWS.get()


def current_packing() -> Packing | None:
    """How rows lie one after the other here in the forward pass; None where they are padded."""
    return _PACKING.get()


def captured_route() -> Callable[[], AbstractContextManager[None]]:
    """What holds now, to be said again when the backward pass recomputes this part."""
    rows, packing = current_rows(), current_packing()
    return lambda: routed(rows, packing)
