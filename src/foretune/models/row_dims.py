"""Where the rows of a batch are in the input of an adapted layer.

A model may feed a layer (rows, …, d), rows run together (rows · m, d), time first (length, rows, d)
or a table that all rows share. One call cannot tell these apart where numbers coincide, so it is
learnt from two calls with different numbers of rows: the dimension that grows with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from foretune.errors import UserError
from foretune.models.layout import RowSlots

Call = tuple[tuple[int, ...], int]  # shape of an input, and the number of rows on the route


class UnknownRowsError(UserError):
    """It cannot be told which task owns which part of an input."""


@dataclass
class RowDims:
    """The dimension of a layer's input along which the rows lie.

    Args:
        name: Name of the layer, for messages.
        learnt: Number of the input's dimensions → (the dimension of the rows, entries per row; None
            where it varies).
        calls: While a model is probed, the calls of the layer.

    Attributes:
        called: Whether the layer has been called.
    """

    name: str
    learnt: dict[int, tuple[int, bool]] = field(default_factory=dict)
    calls: list[Call] | None = None
    called: bool = False

    def of(self, shape: Sequence[int], rows: RowSlots) -> int:
        """The dimension along which the rows of an input lie; 0 where all are of the same slot.

        Raises:
            UnknownRowsError: The rows are of several slots, and nothing was learnt about inputs of
                this shape, or it does not fit.
        """
        self.called = True
        if self.calls is not None:
            self.calls.append((tuple(shape), len(rows.slots)))
        if len(rows.present) == 1:
            return 0
        if rows.tokens is not None:
            num_tokens = sum(rows.tokens)
            if next((size for size in shape if size != 1), 1) == num_tokens:
                return 0
            raise self._unknown(shape, rows)
        dim, run_together = self.learnt.get(len(shape), (-1, False))
        if dim < 0 or shape[dim] % len(rows.slots):
            raise self._unknown(shape, rows)
        if shape[dim] != len(rows.slots) and not run_together:
            raise self._unknown(shape, rows)
        return dim

    def take_calls(self) -> list[Call]:
        """The calls recorded since the last time."""
        calls, self.calls = self.calls or [], []
        return calls

    def _unknown(self, shape: Sequence[int], rows: RowSlots) -> UnknownRowsError:
        return UnknownRowsError(
            f"{self.name} got an input of shape {tuple(shape)} in a batch of {len(rows.slots)} "
            "rows, and which task owns which part of it is unknown: call the model itself, not its "
            "parts, in a batch that mixes tasks, or one task at a time"
        )

    def learn(self, few: Sequence[Call], many: Sequence[Call]) -> str | None:
        """Learns from the calls in two passes with different numbers of rows.

        Returns:
            None; where the rows have no dimension of their own, what the layer reads instead.
        """
        if len(few) != len(many):
            return f"{self.name} is called more often for more rows"
        for (shape, num_rows), (larger, more_rows) in zip(few, many, strict=True):
            if num_rows == more_rows == 1:  # called for each slot on its own
                continue
            dims = _growing(shape, num_rows, larger, more_rows)
            if len(dims) != 1:
                what = "a tensor that all rows share" if shape == larger else "rows mixed"
                return f"{self.name} reads {what}"
            rule = dims[0], shape[dims[0]] != num_rows
            if self.learnt.setdefault(len(shape), rule) != rule:
                return f"{self.name} reads inputs of different layouts"
        return None


def _growing(
    shape: Sequence[int], num_rows: int, larger: Sequence[int], more_rows: int
) -> list[int]:
    """The dimensions that grow with the number of rows; none where another one differs too.

    >>> _growing((3, 7, 8), 3, (5, 7, 8), 5), _growing((9, 3, 8), 3, (9, 5, 8), 5)
    ([0], [1])
    >>> _growing((21, 8), 3, (35, 8), 5), _growing((7, 8), 3, (7, 8), 5)
    ([0], [])
    """
    if len(shape) != len(larger):
        return []
    differing = [d for d in range(len(shape)) if shape[d] != larger[d]]
    growing = [
        d
        for d in differing
        if shape[d] * more_rows == larger[d] * num_rows
        and shape[d] % num_rows == 0
        and (d == 0 or shape[d] == num_rows)
    ]
    return growing if growing == differing else []
