"""`RowStore`: rows in memory, or on disk where they are many. `StoredRows`: a view of some.

Rows that together take more than `IN_MEMORY_BYTES` go to a temporary file without a name, and are
read back one at a time; memory then holds two integers a row. The file is this process's alone and
gone with it, also after a crash: unlike a cache it cannot be stale, fill the disk over time or be
shared by accident, and filling it costs about as much as finding out whether a cache is current.

A row is kept as the bytes of its pickle, which only this process has written, and not in Arrow
columns: columns would turn a missing field into null and refuse one of mixed types, and one row of
them takes some twenty times as long to read.
"""

from __future__ import annotations

import pickle
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

from foretune.tasks.example import Example
from foretune.tasks.scratch import ScratchFile

if TYPE_CHECKING:
    import numpy as np

# Of pickled rows: some 600,000 short texts, which take about five times as much as Python objects.
IN_MEMORY_BYTES = 2**26


class RowStore:
    """Rows in the order in which they were added."""

    def __init__(self) -> None:
        self._rows: list[Example] = []
        self._ends = array("q")
        self._file: ScratchFile | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, row: Example) -> None:
        """Appends a row; it must not be changed afterwards.

        Raises:
            ForetuneError: The disk is full.
        """
        packed = pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(packed) + (self._ends[-1] if self._ends else 0))
        if self._file is not None:
            self._file.append(packed)
            return
        self._rows.append(row)
        if self._ends[-1] > IN_MEMORY_BYTES:
            self._file = ScratchFile()
            for kept in self._rows:
                self._file.append(pickle.dumps(kept, protocol=pickle.HIGHEST_PROTOCOL))
            self._rows = []

    def read(self, number: int) -> Example:
        """The row of this number, which a call of `rows` has named."""
        if self._file is None:
            return self._rows[number]
        start = self._ends[number - 1] if number else 0
        row: Example = pickle.loads(self._file.read(start, self._ends[number] - start))
        return row

    def rows(self, numbers: Sequence[int]) -> Sequence[Example]:
        """The rows of these numbers: a tuple, or a view where they are on disk.

        Raises:
            ForetuneError: The disk is full.
        """
        import numpy as np

        if self._file is None:
            return tuple(self._rows[number] for number in numbers)
        self._file.flush()
        return StoredRows(self, np.asarray(numbers, dtype=np.int64))


class View(Sequence[Example]):
    """Rows that are made when they are asked for; equal to any sequence of equal rows.

    Each access makes a new dict, so two of them are equal but not the same object. A slice is a
    view again.

    Args:
        numbers: (n,) which rows of what is behind the view.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def row(self, place: int) -> Example:
        """The row at a place from 0 to n − 1."""
        raise NotImplementedError

    def select(self, places: Any) -> View:
        """A view of the rows at these places (a slice, or an array of integers)."""
        raise NotImplementedError

    def stored(self) -> Iterator[Any]:
        """What the rows are made of, equal for equal rows and quicker to read than they are."""
        return iter(self)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> View: ...
    def __getitem__(self, place: int | slice) -> Example | View:
        if isinstance(place, slice):
            return self.select(place)
        return self.row(range(len(self))[place])

    def __iter__(self) -> Iterator[Example]:
        return (self.row(place) for place in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class StoredRows(View):
    """Some rows of a store.

    Args:
        store: Where they are.
        numbers: (n,) which of its rows.
    """

    def __init__(self, store: RowStore, numbers: np.ndarray) -> None:
        super().__init__(numbers)
        self.store = store

    def row(self, place: int) -> Example:
        return self.store.read(int(self.numbers[place]))

    def select(self, places: Any) -> StoredRows:
        return StoredRows(self.store, self.numbers[places])


class JoinedRows(View):
    """Rows of several sequences, one after the other.

    Args:
        parts: The sequences.
        numbers: (n,) which rows, counted through all parts; None for all.
    """

    def __init__(
        self, parts: Sequence[Sequence[Example]], numbers: np.ndarray | None = None
    ) -> None:
        import numpy as np

        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))
        super().__init__(np.arange(self.ends[-1]) if numbers is None else numbers)

    def row(self, place: int) -> Example:
        number = int(self.numbers[place])
        part = bisect_right(self.ends, number)
        return self.parts[part][number - self.ends[part]]  # counted from the part's end

    def select(self, places: Any) -> JoinedRows:
        return JoinedRows(self.parts, self.numbers[places])


def join(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """The rows of all parts: a view if one of them is, else a tuple.

    >>> join([["a", "b"], ["c"]])
    ('a', 'b', 'c')
    """
    if any(isinstance(part, View) for part in parts):
        return JoinedRows(parts)
    return tuple(row for part in parts for row in part)


def select(rows: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """The rows at these places: a view of a view, else a tuple.

    >>> select(["a", "b", "c"], [2, 0])
    ('c', 'a')
    """
    import numpy as np

    if isinstance(rows, View):
        return rows.select(np.asarray(places, dtype=np.int64))
    return tuple(rows[place] for place in places)
