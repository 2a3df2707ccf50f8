"""Find leaks: examples that occur in train and again in a split that is scored."""

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

# What the objectives read. That includes labels: the same text with another label is not a leak.
FIELDS = ("context", "text", "label", "prompt", "completion", "x", "y")
SAMPLE_LENGTH = 80


@dataclass(frozen=True)
class Leak:
    """Examples that occur in two splits.

    Args:
        kind: "train and test" (or validation, within one task), or "seen and unseen" (train
            examples of a seen task among the test examples of an unseen one).
        task: Name of the task with the train examples.
        other_task: Name of the task with the test examples; the same for "train and test".
        count: Number of test (and validation) examples that also occur in train.
        sample: The beginning of one of them.
    """

    kind: str
    task: str
    other_task: str
    count: int
    sample: str


def find_leaks(seen: TaskCollection, unseen: TaskCollection | None = None) -> list[Leak]:
    """Find all leaks within tasks and from seen to unseen tasks, in the order of the tasks.

    Two examples are the same if all that the objective reads is the same up to case and white
    space; for a choice example that is its context and its true response. An example of an unseen
    task is counted once, for the first seen task that trains on it, so the time is linear in the
    number of examples.
    """
    import numpy as np

    seen_digests = ((task, _digests(task.train)) for task in seen)
    if unseen is None:
        return [leak for task, train in seen_digests for leak in _within(task, train)]
    tests = [_digests(task.test) for task in unseen]
    test_digests = np.unique(np.concatenate(tests))
    owner = np.full(len(test_digests), len(seen))  # index of the first seen task; none yet
    leaks = []
    for index, (task, train) in enumerate(seen_digests):
        leaks += _within(task, train)
        _assign_owner(owner, test_digests, train, index)
    leaks += [leak for task in unseen for leak in _within(task, _digests(task.train))]
    for task, test in zip(unseen, tests, strict=True):
        leaks += _across(seen, task, owner[np.searchsorted(test_digests, test)])
    return leaks


def content(example: Example) -> int:
    """A 64-bit digest of the example: two different ones collide with probability 2^-64."""
    parts = [(field, _normal(example[field])) for field in FIELDS if field in example]
    if "candidates" in example or "response" in example:
        parts.append(("response", _normal(true_response(example))))
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _digests(examples: Sequence[Example]) -> np.ndarray:
    """(n,) digests of the examples; eight bytes each, since there may be very many."""
    import numpy as np

    return np.fromiter(map(content, undrawn(examples)), dtype=np.uint64, count=len(examples))


def _within(task: Task, train: np.ndarray) -> list[Leak]:
    """The leak, if any, from a task's train examples to its validation and test examples."""
    import numpy as np

    repeated = [
        (examples, np.flatnonzero(np.isin(_digests(examples), train)))
        for examples in (task.validation, task.test)
    ]
    count = sum(len(places) for _, places in repeated)
    if not count:
        return []
    sample = next(examples[places[0]] for examples, places in repeated if len(places))
    return [Leak("train and test", task.name, task.name, count, _sample(sample))]


def _assign_owner(
    owner: np.ndarray, test_digests: np.ndarray, train: np.ndarray, index: int
) -> None:
    """Set `owner` to a task's index, in place, for digests in its train split and in no earlier's.

    Args:
        owner: (n,) index of the first seen task that trains on each test example.
        test_digests: (n,) ascending digests of the test examples.
        train: (m,) digests of the task's train examples.
        index: The task's index.
    """
    import numpy as np

    places = np.searchsorted(test_digests, train)
    inside = places < len(test_digests)
    places, train = places[inside], train[inside]
    np.minimum.at(owner, places[test_digests[places] == train], index)


def _across(seen: TaskCollection, task: Task, owner: np.ndarray) -> list[Leak]:
    """The leaks into an unseen task.

    Args:
        seen: Seen tasks.
        task: The unseen task.
        owner: (n,) index of the seen task that trains on each of the n test examples.
    """
    first: dict[int, int] = {}
    for place, index in enumerate(owner.tolist()):
        if index < len(seen):
            first.setdefault(index, place)
    return [
        Leak(
            "seen and unseen",
            seen.tasks[index].name,
            task.name,
            int((owner == index).sum()),
            _sample(task.test[place]),
        )
        for index, place in first.items()
    ]


def _normal(value: Any) -> Any:
    """Text in lower case with single spaces, arrays as shape and digest, lists elementwise."""
    if isinstance(value, str):
        return " ".join(value.lower().split())
    if hasattr(value, "tobytes"):
        return value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
    if isinstance(value, (list, tuple)):
        return [_normal(item) for item in value]
    return value


def _sample(example: Example) -> str:
    """The beginning of an example's text, for a message."""
    context = example.get("context", "")
    last_turn = context[-1] if isinstance(context, list) else context
    text = example.get("text") or example.get("prompt") or last_turn
    if not text:
        return f"array of shape {getattr(example.get('x'), 'shape', '?')}"
    line = " ".join(text.split())
    return line if len(line) <= SAMPLE_LENGTH else line[: SAMPLE_LENGTH - 1] + "…"
