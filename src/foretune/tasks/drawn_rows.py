"""`DrawnRows`: stored choice examples that get their drawn candidates when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from foretune.tasks.example import DrawnExample, Example, ReadExample
from foretune.tasks.responses import Texts
from foretune.tasks.row_store import View
from foretune.tasks.scratch import ScratchFile

if TYPE_CHECKING:
    import numpy as np

ITEM = 4  # bytes of an int32


class Drawings:
    """The candidates drawn for each of many examples, on disk.

    Args:
        num_candidates: Candidates per example, the true response included.
        texts: The texts that drawn numbers index.
    """

    def __init__(self, num_candidates: int, texts: Texts) -> None:
        self.num_candidates = num_candidates
        self.texts = texts
        self._length = 0
        self._file: ScratchFile | None = None

    def append(self, drawn: np.ndarray) -> np.ndarray:
        """Store the drawn candidates of some examples.

        Args:
            drawn: (n, num_candidates) int32: indices of the distractors' texts, then the place of
                the true response among them.

        Returns:
            (n,) indices under which they can be read.
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
    """Examples with their candidates.

    Args:
        undrawn: The same examples without candidates, which are quicker to read.
        drawings: The drawn candidates.
        numbers: (n,) index in `drawings` of each example's candidates.
    """

    def __init__(self, undrawn: View, drawings: Drawings, numbers: np.ndarray) -> None:
        super().__init__(numbers)
        self.undrawn, self.drawings = undrawn, drawings

    @override
    def row(self, place: int) -> Example:
        row = self.undrawn.row(place)
        return complete(row, self.drawings[int(self.numbers[place])], self.drawings.texts)

    @override
    def stored(self) -> Iterator[Any]:
        for row, number in zip(self.undrawn, self.numbers.tolist(), strict=True):
            yield [row, self.drawings[number]]

    def candidate_counts(self) -> Iterator[int]:
        """The number of candidates of each example, without reading their texts."""
        drawn = self.drawings.num_candidates
        return (len(row["candidates"]) if "candidates" in row else drawn for row in self.undrawn)

    @override
    def select(self, places: Any) -> DrawnRows:
        return DrawnRows(self.undrawn.select(places), self.drawings, self.numbers[places])


def complete(example: Example, drawn: Sequence[int], texts: Sequence[str] | Texts) -> Example:
    """The example with `candidates` and `answer` instead of `response`, unless it has them.

    Args:
        example: A choice example.
        drawn: The distractors' indices in `texts`, then the place of the true response.
        texts: Responses.
    """
    if "candidates" in example:
        return example
    *numbers, place = drawn
    candidates = [texts[number] for number in numbers]
    candidates.insert(place, example["response"])
    fields = {key: value for key, value in example.items() if key != "response"}
    source, number = (
        (example.source, example.number) if isinstance(example, ReadExample) else ("", 0)
    )
    return DrawnExample({**fields, "candidates": candidates, "answer": place}, source, number)


def undrawn(examples: Sequence[Example]) -> Sequence[Example]:
    """The examples without drawn candidates, whose contents are the same and quicker to read."""
    return examples.undrawn if isinstance(examples, DrawnRows) else examples
