"""Finds examples that stand where they must not: in train, and again where scores are taken."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foretune.tasks.drawn_rows import undrawn
from foretune.tasks.example import Example
from foretune.tasks.responses import true_response
from foretune.tasks.task import Task, TaskCollection

if TYPE_CHECKING:
    import numpy as np

# What the objectives read; the labels belong to it, since a row that says otherwise leaks nothing.
FIELDS = ("context", "text", "label", "prompt", "completion", "x", "y")
SAMPLE_LENGTH = 80


@dataclass(frozen=True)
class Leak:
    """Examples that two places share.

    Args:
        kind: "train and test" (or validation, within one task), or "seen and unseen" (a seen
            task's train rows among an unseen task's test rows).
        task: The task whose train rows are concerned.
        other_task: The task whose test rows are concerned; the same one for "train and test".
        count: Test (and validation) rows that stand in train too.
        sample: The beginning of one of them.
    """

    kind: str
    task: str
    other_task: str
    count: int
    sample: str


def find_leaks(seen: TaskCollection, unseen: TaskCollection | None = None) -> list[Leak]:
    """Every leak within a task and from seen to unseen tasks, in the order of the tasks.

    Two examples are the same if all that the objective reads is the same, case and white space
    aside; of a choice row that is its context and its true response. A row of an unseen task is
    counted once, for the first seen task that trains on it, so the time is linear in the rows.
    """
    import numpy as np

    seen_digests = ((task, _digests(task.train)) for task in seen)
    if unseen is None:
        return [leak for task, train in seen_digests for leak in _within(task, train)]
    tests = [_digests(task.test) for task in unseen]
    wanted = np.unique(np.concatenate(tests))
    owner = np.full(len(wanted), len(seen))  # the number of the first seen task; none yet
    leaks = []
    for number, (task, train) in enumerate(seen_digests):
        leaks += _within(task, train)
        _mark(owner, wanted, train, number)
    leaks += [leak for task in unseen for leak in _within(task, _digests(task.train))]
    for task, test in zip(unseen, tests, strict=True):
        leaks += _across(seen, task, owner[np.searchsorted(wanted, test)])
    return leaks


def content(row: Example) -> int:
    """A digest of what the row says, 64 bits: by chance alone, one pair of rows in 10^19 agrees."""
    parts = [(field, _normal(row[field])) for field in FIELDS if field in row]
    if "candidates" in row or "response" in row:
        parts.append(("response", _normal(true_response(row))))
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _digests(rows: Sequence[Example]) -> np.ndarray:
    """(n,) the contents of rows; eight bytes each, since there may be very many."""
    import numpy as np

    return np.fromiter(map(content, undrawn(rows)), dtype=np.uint64, count=len(rows))


def _within(task: Task, train: np.ndarray) -> list[Leak]:
    """The leak, if there is one, from a task's train rows to its other rows."""
    import numpy as np

    repeated = [
        (rows, np.flatnonzero(np.isin(_digests(rows), train)))
        for rows in (task.validation, task.test)
    ]
    count = sum(len(places) for _, places in repeated)
    if not count:
        return []
    sample = next(rows[places[0]] for rows, places in repeated if len(places))
    return [Leak("train and test", task.name, task.name, count, _sample(sample))]


def _mark(owner: np.ndarray, wanted: np.ndarray, train: np.ndarray, number: int) -> None:
    """Writes a task's number where its train rows are wanted and no task before it has them."""
    import numpy as np

    places = np.searchsorted(wanted, train)
    inside = places < len(wanted)
    places, train = places[inside], train[inside]
    np.minimum.at(owner, places[wanted[places] == train], number)


def _across(seen: TaskCollection, task: Task, owner: np.ndarray) -> list[Leak]:
    """The leaks into an unseen task.

    Args:
        seen: Seen tasks.
        task: The unseen task.
        owner: (test rows,) the number of the seen task that trains on the row.
    """
    first: dict[int, int] = {}
    for place, number in enumerate(owner.tolist()):
        if number < len(seen):
            first.setdefault(number, place)
    return [
        Leak(
            "seen and unseen",
            seen.tasks[number].name,
            task.name,
            int((owner == number).sum()),
            _sample(task.test[place]),
        )
        for number, place in first.items()
    ]


def _normal(value: Any) -> Any:
    """Text in lower case with single spaces, arrays as shape and digest, lists item by item."""
    if isinstance(value, str):
        return " ".join(value.lower().split())
    if hasattr(value, "tobytes"):
        return value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
    if isinstance(value, (list, tuple)):
        return [_normal(item) for item in value]
    return value


def _sample(row: Example) -> str:
    """The beginning of a row's content, for a message."""
    turns = row["context"] if isinstance(row.get("context"), list) else [row.get("context", "")]
    text = row.get("text") or row.get("prompt") or turns[-1]
    if not text:
        return f"array of shape {getattr(row.get('x'), 'shape', '?')}"
    line = " ".join(text.split())
    return line if len(line) <= SAMPLE_LENGTH else line[: SAMPLE_LENGTH - 1] + "…"
