"""`Responses`: all the responses of a collection as arrays, from which distractors are drawn.

Only the texts themselves stay where they are, in the rows: a text is known by its first row.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from foretune.tasks.example import SPLITS, Example
from foretune.tasks.task import TaskCollection

if TYPE_CHECKING:
    import numpy as np

GROUP_COLUMNS = ("dialogue", "group")


def true_response(row: Example) -> str:
    """The right answer of a choice row, before or after its candidates are drawn."""
    text: str = row["candidates"][row["answer"]] if "candidates" in row else row["response"]
    return text


def group_of(row: Example, group_column: str | None) -> Any:
    """What says which rows of a task belong together (a dialogue's number); None without."""
    columns = GROUP_COLUMNS if group_column is None else (group_column,)
    return next((row[c] for c in columns if c in row), None)


@dataclass(frozen=True)
class Texts:
    """The distinct responses of a collection, numbered in the order of their appearance.

    Args:
        parts: The rows: task after task, split after split.
        first: (texts,) the first row of each text, counted through all parts.
    """

    parts: Sequence[Sequence[Example]]
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, text: int) -> str:
        number = int(self.first[text])
        part = bisect_right(self._ends, number)
        rows = self.parts[part]
        return true_response(rows[number - self._ends[part] + len(rows)])

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    @cached_property
    def in_memory(self) -> list[str]:
        """All of them."""
        return [self[text] for text in range(len(self))]


@dataclass(frozen=True)
class Responses:
    """Every row of a collection, as arrays of (n,).

    Args:
        texts: The distinct responses.
        text: Which of them is the row's.
        owner: What a row's distractors must not share: its group, its task without groups, or the
            row itself where distractors come from its own task.
        task: The number of the row's task.
        split: The number of its split.
        lacking: Whether the row has no candidates yet.
    """

    texts: Texts
    text: np.ndarray
    owner: np.ndarray
    task: np.ndarray
    split: np.ndarray
    lacking: np.ndarray

    @cached_property
    def all(self) -> Origin:
        """Every row."""
        import numpy as np

        return Origin(self, np.arange(len(self.text)))

    @cached_property
    def by_split(self) -> list[Origin]:
        """The rows of each split."""
        import numpy as np

        return [Origin(self, np.flatnonzero(self.split == s)) for s in range(len(SPLITS))]


@dataclass(frozen=True)
class Origin:
    """Rows from which distractors may come.

    Args:
        responses: All rows.
        rows: (m,) which of them.
    """

    responses: Responses
    rows: np.ndarray

    def texts_beside(self, owner: int) -> np.ndarray:
        """The distinct texts that stand in a row of another owner, ascending."""
        texts, low, high = self._owners
        return texts[(low != owner) | (high != owner)]

    @cached_property
    def _owners(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each distinct text, with the lowest and the highest owner that it has."""
        import numpy as np

        owner = self.responses.owner[self.rows]
        texts, place = np.unique(self.responses.text[self.rows], return_inverse=True)
        low, high = (np.full(len(texts), end) for end in (np.iinfo(np.int64).max, -1))
        np.minimum.at(low, place, owner)
        np.maximum.at(high, place, owner)
        return texts, low, high


def index_responses(
    collection: TaskCollection, group_column: str | None, own_task: bool
) -> Responses:
    """Reads every row once.

    Args:
        collection: Choice tasks.
        group_column: As in `group_of`.
        own_task: Whether a row's distractors may come from anywhere but the row itself.
    """
    import numpy as np

    digests, owner, lacking = array("Q"), array("q"), array("b")
    num_owners = 0
    for task in collection:
        owners: dict[str, int] = {}
        for split in SPLITS:
            for row in task.split(split):
                digests.append(_digest(true_response(row)))
                lacking.append("candidates" not in row)
                if own_task:
                    num_owners += 1
                    owner.append(num_owners)
                    continue
                group = repr(group_of(row, group_column))
                owner.append(owners.setdefault(group, num_owners + len(owners)))
        num_owners += len(owners)
    parts = [task.split(split) for task in collection for split in SPLITS]
    sizes = [len(rows) for rows in parts]
    number = np.arange(len(sizes), dtype=np.int32)
    first, text = _number(np.frombuffer(digests, dtype=np.uint64))
    return Responses(
        Texts(parts, first),
        text,
        np.asarray(owner, dtype=np.int32),
        np.repeat(number // len(SPLITS), sizes),
        np.repeat((number % len(SPLITS)).astype(np.int8), sizes),
        np.asarray(lacking, dtype=bool),
    )


def _digest(text: str) -> int:
    """64 bits: two of five million texts collide with a chance of one in a million."""
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little")


def _number(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the distinct values in the order of their appearance.

    Returns:
        (distinct,) where each stands first; (n,) the number of each value.
    """
    import numpy as np

    _, first, place = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order))
    return first[order], rank[place]
