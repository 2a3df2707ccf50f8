"""`DrawnRows`: stored choice rows whose candidates were drawn, put together when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from foretune.tasks.example import Example
from foretune.tasks.responses import Texts
from foretune.tasks.row_store import View
from foretune.tasks.scratch import ScratchFile

if TYPE_CHECKING:
    import numpy as np

ITEM = 4  # bytes of an int32


class Drawings:
    """What was drawn for each of many rows, on disk.

    Args:
        num_candidates: Candidates of each row, the true response included.
        texts: What the numbers mean.
    """

    def __init__(self, num_candidates: int, texts: Texts) -> None:
        self.num_candidates = num_candidates
        self.texts = texts
        self._length = 0
        self._file: ScratchFile | None = None

    def append(self, drawn: np.ndarray) -> np.ndarray:
        """Keeps the drawings of some rows.

        Args:
            drawn: (n, num_candidates) int32: the distractors' texts, then the place of the true
                response among them.

        Returns:
            (n,) the numbers under which they can be read.
        """
        import numpy as np

        if self._file is None:
            self._file = ScratchFile()
        self._file.append(drawn.tobytes())
        self._file.flush()
        self._length += len(drawn)
        return np.arange(self._length - len(drawn), self._length)

    def __getitem__(self, number: int) -> list[int]:
        import numpy as np

        assert self._file is not None
        width = self.num_candidates * ITEM
        return np.frombuffer(self._file.read(number * width, width), dtype=np.int32).tolist()


class DrawnRows(View):
    """Rows with their candidates.

    Args:
        undrawn: The rows without: quicker to read, and they say the same.
        drawings: What was drawn.
        numbers: (n,) which drawing is whose.
    """

    def __init__(self, undrawn: View, drawings: Drawings, numbers: np.ndarray) -> None:
        super().__init__(numbers)
        self.undrawn, self.drawings = undrawn, drawings

    def row(self, place: int) -> Example:
        row = self.undrawn.row(place)
        return complete(row, self.drawings[int(self.numbers[place])], self.drawings.texts)

    def stored(self) -> Iterator[Any]:
        for row, number in zip(self.undrawn, self.numbers.tolist(), strict=True):
            yield [row, self.drawings[number]]

    def candidate_counts(self) -> Iterator[int]:
        """How many candidates each row has, without reading their texts."""
        drawn = self.drawings.num_candidates
        return (len(row["candidates"]) if "candidates" in row else drawn for row in self.undrawn)

    def select(self, places: Any) -> DrawnRows:
        return DrawnRows(self.undrawn.select(places), self.drawings, self.numbers[places])


def complete(row: Example, drawn: Sequence[int], texts: Sequence[str] | Texts) -> Example:
    """The row with `candidates` and `answer` instead of `response`, unless it has them already.

    Args:
        row: A choice row.
        drawn: The distractors' numbers in `texts`, then the place of the true response.
        texts: Responses.
    """
    if "candidates" in row:
        return row
    *numbers, place = drawn
    candidates = [texts[number] for number in numbers]
    candidates.insert(place, row["response"])
    kept = {key: value for key, value in row.items() if key != "response"}
    return {**kept, "candidates": candidates, "answer": place}


def undrawn(rows: Sequence[Example]) -> Sequence[Example]:
    """The rows before candidates were drawn to them, where there are such."""
    return rows.undrawn if isinstance(rows, DrawnRows) else rows
