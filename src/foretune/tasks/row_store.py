"""`RowStore`: examples in memory, or on disk if they are many. `StoredRows`: a view of some.

Examples that together exceed `IN_MEMORY_BYTES` go to an unnamed temporary file and are read back
one at a time; memory then holds four integers per example. Only this process can see the file, and
it vanishes with the process, even after a crash: unlike a cache it cannot be stale, fill the disk
over time or be shared by accident, and writing it costs about as much as validating a cache.

An example is stored as its pickle, which only this process has written, and not in Arrow columns:
these would turn a missing field into null and reject a field of mixed types, and reading one
example from them takes some twenty times as long.
"""

from __future__ import annotations

import pickle
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

from typing_extensions import override

from foretune.tasks.example import Example, ReadExample
from foretune.tasks.scratch import ScratchFile

if TYPE_CHECKING:
    import numpy as np

# Pickled: some 600,000 short texts, which take about five times as much as Python objects.
IN_MEMORY_BYTES = 2**26


class RowStore:
    """Examples in the order in which they were added; each remembers where it was read."""

    def __init__(self) -> None:
        self._rows: list[Example] = []
        self._sources: list[str] = []
        self._source_of, self._number_of = array("i"), array("q")
        self._ends = array("q")
        self._file: ScratchFile | None = None

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, example: Example, source: str = "", number: int = 0) -> None:
        """Append an example; it must not be changed afterwards.

        Args:
            example: The example.
            source: What it was read from, as in `ReadExample`.
            number: Number of its line or row.

        Raises:
            ForetuneError: The disk is full.
        """
        pickled = pickle.dumps(example, protocol=pickle.HIGHEST_PROTOCOL)
        self._ends.append(len(pickled) + (self._ends[-1] if self._ends else 0))
        if source not in self._sources[-1:]:
            self._sources.append(source)
        self._source_of.append(len(self._sources) - 1)
        self._number_of.append(number)
        if self._file is not None:
            self._file.append(pickled)
            return
        self._rows.append(ReadExample(example, source, number))
        if self._ends[-1] > IN_MEMORY_BYTES:
            self._file = ScratchFile()
            for stored in self._rows:
                self._file.append(pickle.dumps(dict(stored), protocol=pickle.HIGHEST_PROTOCOL))
            self._rows = []

    def read(self, index: int) -> Example:
        """The example of this index; it can be read after a call of `rows` with this index."""
        if self._file is None:
            return self._rows[index]
        start = self._ends[index - 1] if index else 0
        example: Example = pickle.loads(self._file.read(start, self._ends[index] - start))
        return ReadExample(example, self._sources[self._source_of[index]], self._number_of[index])

    def rows(self, numbers: Sequence[int]) -> Sequence[Example]:
        """The examples of these indices: a tuple, or a view if they are on disk.

        Raises:
            ForetuneError: The disk is full.
        """
        import numpy as np

        if self._file is None:
            return tuple(self._rows[index] for index in numbers)
        self._file.flush()
        return StoredRows(self, np.asarray(numbers, dtype=np.int64))


class View(Sequence[Example]):
    """Examples that are built on access; equal to any sequence of equal examples.

    Each access builds a new dict, so two accesses are equal but not the same object. A slice is
    a view again.

    Args:
        numbers: (n,) indices of the examples in what the view is of.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    def row(self, place: int) -> Example:
        """The example at a place from 0 to n − 1."""
        raise NotImplementedError

    def select(self, places: Any) -> View:
        """A view of the examples at these places (a slice, or an array of integers)."""
        raise NotImplementedError

    def stored(self) -> Iterator[Any]:
        """What the examples are built from: equal for equal examples, but quicker to read."""
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

    def __eq__(self, sequence: object) -> bool:
        if not isinstance(sequence, Sequence):
            return NotImplemented
        return len(self) == len(sequence) and all(
            a == b for a, b in zip(self, sequence, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


class StoredRows(View):
    """Some examples of a store.

    Args:
        store: The store.
        numbers: (n,) indices of its examples.
    """

    def __init__(self, store: RowStore, numbers: np.ndarray) -> None:
        super().__init__(numbers)
        self.store = store

    @override
    def row(self, place: int) -> Example:
        return self.store.read(int(self.numbers[place]))

    @override
    def select(self, places: Any) -> StoredRows:
        return StoredRows(self.store, self.numbers[places])


class JoinedRows(View):
    """Examples of several sequences, concatenated.

    Args:
        parts: The sequences.
        numbers: (n,) indices of the examples, counted through all parts; None for all.
    """

    def __init__(
        self, parts: Sequence[Sequence[Example]], numbers: np.ndarray | None = None
    ) -> None:
        import numpy as np

        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))
        super().__init__(np.arange(self.ends[-1]) if numbers is None else numbers)

    @override
    def row(self, place: int) -> Example:
        index = int(self.numbers[place])
        part = bisect_right(self.ends, index)
        return self.parts[part][index - self.ends[part]]  # counted from the part's end

    @override
    def select(self, places: Any) -> JoinedRows:
        return JoinedRows(self.parts, self.numbers[places])


def join(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """The examples of all parts: a view if any part is a view, else a tuple.

    >>> join([["a", "b"], ["c"]])
    ('a', 'b', 'c')
    """
    if any(isinstance(part, View) for part in parts):
        return JoinedRows(parts)
    return tuple(example for part in parts for example in part)


def select(examples: Sequence[Example], places: Sequence[int]) -> Sequence[Example]:
    """The examples at these places: a view of a view, else a tuple.

    >>> select(["a", "b", "c"], [2, 0])
    ('c', 'a')
    """
    import numpy as np

    if isinstance(examples, View):
        return examples.select(np.asarray(places, dtype=np.int64))
    return tuple(examples[place] for place in places)
