"""`Responses`: an index of all responses of a collection, from which distractors are drawn.

The texts themselves stay in the examples: each distinct text is located by its first example.
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


def true_response(example: Example) -> str:
    """The correct answer of a choice example, before or after its candidates are drawn."""
    drawn = "candidates" in example
    text: str = example["candidates"][example["answer"]] if drawn else example["response"]
    return text


def group_of(example: Example, group_column: str | None) -> Any:
    """The group that an example of a task belongs to, such as a dialogue's number, if any.

    Args:
        example: An example.
        group_column: Name of the column; None for "dialogue" or "group".
    """
    columns = GROUP_COLUMNS if group_column is None else (group_column,)
    return next((example[c] for c in columns if c in example), None)


@dataclass(frozen=True)
class Texts:
    """The distinct responses of a collection, indexed in order of first appearance.

    Args:
        parts: The examples of each split of each task.
        first: (texts,) index, counted through all parts, of the first example with each text.
    """

    parts: Sequence[Sequence[Example]]
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, text: int) -> str:
        index = int(self.first[text])
        part = bisect_right(self._ends, index)
        examples = self.parts[part]
        return true_response(examples[index - self._ends[part] + len(examples)])

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    @cached_property
    def in_memory(self) -> list[str]:
        """All texts as a list."""
        return [self[text] for text in range(len(self))]


@dataclass(frozen=True)
class Responses:
    """The responses of the n examples of a collection.

    Args:
        texts: The distinct responses.
        text: (n,) index in `texts` of the example's response.
        owner: (n,) what an example's distractors must not share with it: its group; its task if
            there are no groups; the example itself if distractors come from the same task.
        task: (n,) index of the example's task.
        split: (n,) index of its split in `SPLITS`.
        lacking: (n,) whether the example has no candidates yet.
    """

    texts: Texts
    text: np.ndarray
    owner: np.ndarray
    task: np.ndarray
    split: np.ndarray
    lacking: np.ndarray

    @cached_property
    def all(self) -> Origin:
        """All examples."""
        import numpy as np

        return Origin(self, np.arange(len(self.text)))

    @cached_property
    def by_split(self) -> list[Origin]:
        """The examples of each split."""
        import numpy as np

        return [Origin(self, np.flatnonzero(self.split == s)) for s in range(len(SPLITS))]


@dataclass(frozen=True)
class Origin:
    """Examples whose responses may serve as distractors.

    Args:
        responses: The responses of all examples.
        rows: (m,) indices of the examples.
    """

    responses: Responses
    rows: np.ndarray

    def texts_beside(self, owner: int) -> np.ndarray:
        """(k,) distinct texts that some example of a different owner has, ascending."""
        texts, low, high = self._owners
        return texts[(low != owner) | (high != owner)]

    @cached_property
    def _owners(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(k,) distinct texts, and the lowest and the highest owner of each."""
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
    """Index the responses of a collection, reading each example once.

    Args:
        collection: Choice tasks.
        group_column: As in `group_of`.
        own_task: Whether distractors come from the example's own task; then only the example itself
            is excluded.
    """
    import numpy as np

    digests, owner, lacking = array("Q"), array("q"), array("b")
    num_owners = 0
    for task in collection:
        owners: dict[str, int] = {}
        for split in SPLITS:
            for example in task.split(split):
                digests.append(_digest(true_response(example)))
                lacking.append("candidates" not in example)
                if own_task:
                    num_owners += 1
                    owner.append(num_owners)
                    continue
                group = repr(group_of(example, group_column))
                owner.append(owners.setdefault(group, num_owners + len(owners)))
        num_owners += len(owners)
    parts = [task.split(split) for task in collection for split in SPLITS]
    sizes = [len(examples) for examples in parts]
    index = np.arange(len(sizes), dtype=np.int32)
    first, text = _number(np.frombuffer(digests, dtype=np.uint64))
    return Responses(
        Texts(parts, first),
        text,
        np.asarray(owner, dtype=np.int32),
        np.repeat(index // len(SPLITS), sizes),
        np.repeat((index % len(SPLITS)).astype(np.int8), sizes),
        np.asarray(lacking, dtype=bool),
    )


def _digest(text: str) -> int:
    """A 64-bit digest: among five million texts two collide with probability 10^-6."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _number(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index the distinct values in order of first appearance.

    Returns:
        (distinct,) position of each one's first occurrence; (n,) index of each value.
    """
    import numpy as np

    _, first, place = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order))
    return first[order], rank[place]
