"""Routing: which task owns each row, or each token, of the current forward pass.

An objective knows which examples it stacked into a batch; an adapted layer, deep inside a model
that knows nothing of tasks, needs to know it too. The objective sets the route, the layer reads it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

from foretune.errors import UserError
from foretune.models.layout import Packing, RowSlots


class _Unset:
    """Outside any `route`."""


_UNSET: Final = _Unset()
_ROWS: contextvars.ContextVar[RowSlots | _Unset | None] = contextvars.ContextVar(
    "foretune_rows", default=_UNSET
)
_PACKING: contextvars.ContextVar[Packing | None] = contextvars.ContextVar(
    "foretune_packing", default=None
)
_PADDED: contextvars.ContextVar[bool] = contextvars.ContextVar("foretune_padded", default=False)


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
    with _routed(rows, packing):
        yield


@contextlib.contextmanager
def _routed(rows: RowSlots | _Unset | None, packing: Packing | None) -> Iterator[None]:
    tokens = _ROWS.set(rows), _PACKING.set(packing)
    try:
        yield
    finally:
        _ROWS.reset(tokens[0])
        _PACKING.reset(tokens[1])


def current_rows() -> RowSlots | None:
    """The rows of the innermost `route`; None for the base model, and outside any `route`."""
    rows = _ROWS.get()
    return None if isinstance(rows, _Unset) else rows


def rows_for_adapters() -> RowSlots | None:
    """The rows of the innermost `route`; None for the base model.

    Raises:
        UserError: There is no `route`, so nobody has said which adapters are meant.
    """
    rows = _ROWS.get()
    if isinstance(rows, _Unset):
        raise UserError(
            "a model with adapters was called outside route(...), so the owners of its rows are "
            "unknown: call it inside route(slots), or route(None) for the base, in the same thread "
            "(another thread, nn.DataParallel and a recomputation in the backward pass see no "
            "route; for less memory use Run(gradient_checkpointing=True))"
        )
    return rows


def current_packing() -> Packing | None:
    """The packing at this point of the forward pass; None where rows are padded."""
    return _PACKING.get()


def captured_route() -> Callable[[], AbstractContextManager[None]]:
    """A factory of contexts with the current route, for recomputing in the backward pass."""
    rows, packing = _ROWS.get(), current_packing()
    return lambda: _routed(rows, packing)


@contextlib.contextmanager
def unpacked() -> Iterator[None]:
    """Inside the block no call is packed or grouped by length."""
    token = _PADDED.set(True)
    try:
        yield
    finally:
        _PADDED.reset(token)


def stays_padded() -> bool:
    """Whether calls are neither packed nor grouped by length at present."""
    return _PADDED.get()
