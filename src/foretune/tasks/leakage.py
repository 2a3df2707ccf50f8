"""Find leaks: examples of one split that occur again in a split that is scored."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foretune.tasks.drawn_rows import undrawn
from foretune.tasks.example import Example, place_of
from foretune.tasks.messages import CONVERSATIONS
from foretune.tasks.responses import true_response
from foretune.tasks.task import Task, TaskCollection

if TYPE_CHECKING:
    import numpy as np

# What the objectives read: two examples are the same if inputs and answers are.
INPUTS = ("context", "text", "prompt", "x")
ANSWERS = ("label", "completion", "chosen", "rejected", "y")
PAIRS = (("train", "validation"), ("train", "test"), ("validation", "test"))
LEARNT = ("train", "validation")  # splits of seen tasks that a base depends on
# Copies of rows agree with each other but for a few corrected labels; tasks that answer the same
# inputs in their own way do not.
CONTRADICTED = 0.05
SAMPLE_LENGTH = 80


@dataclass(frozen=True)
class Leak:
    """Examples, input and answer alike, that occur in two splits.

    Args:
        kind: "train and validation", "train and test" or "validation and test" within a task, or
            "seen and unseen" (an unseen task's test examples among those of a seen task).
        task: Name of the task that has the examples first.
        other_task: Name of the task that has them again; within a task, the same.
        count: Number of examples in the second split that are also in the first.
        sample: The beginning of one of them.
        splits: The two splits.
        places: Where the sample was read, once in each split; empty if it was made in Python.
    """

    kind: str
    task: str
    other_task: str
    count: int
    sample: str
    splits: tuple[str, str] = ("train", "test")
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class SharedInputs:
    """Test inputs of an unseen task that seen tasks have too, with answers of their own.

    That is the design of many collections, such as votes of several people on the same texts.

    Args:
        task: Name of the unseen task.
        count: Number of its test examples whose input is one of a seen task's train or validation
            inputs.
        same_answer: Number of these for which a seen task has the same answer.
        total: Number of its test examples.
        sample: The beginning of one of the inputs.
    """

    task: str
    count: int
    same_answer: int
    total: int
    sample: str


@dataclass(frozen=True)
class Overlaps:
    """What occurs more than once in a collection.

    Args:
        leaks: Examples that occur in two splits.
        shared_inputs: Inputs that several tasks answer in their own way.
    """

    leaks: list[Leak]
    shared_inputs: list[SharedInputs]


def find_leaks(seen: TaskCollection, unseen: TaskCollection | None = None) -> list[Leak]:
    """Find all leaks within tasks and from seen to unseen tasks; see `find_overlaps`."""
    return find_overlaps(seen, unseen).leaks


def find_overlaps(seen: TaskCollection, unseen: TaskCollection | None = None) -> Overlaps:
    """Find all leaks within tasks and from seen to unseen tasks, and shared inputs.

    Two examples are the same if all that the objective reads is the same up to case and white
    space; for a choice example that is its context and its true response. An example of an unseen
    task is counted once, for the first seen task that has it, so the time is linear in the number
    of examples.

    An unseen task whose test inputs are in seen tasks leaks if the answers agree. If more than
    5 % of these inputs have other answers there too, the tasks share their inputs instead.
    """
    import numpy as np

    empty = np.empty((0, 2), dtype=np.uint64)
    tests = [] if unseen is None else [_digests(task.test) for task in unseen]
    learnt = _Learnt(np.concatenate([empty, *tests]))
    leaks = []
    for index, task in enumerate(seen):
        digests = {split: _digests(task.split(split)) for split in LEARNT}
        leaks += _within(task, digests | {"test": _digests(task.test)})
        for place, split in enumerate(LEARNT):
            learnt.add(digests[split], index * len(LEARNT) + place)
    shared_inputs = []
    for task, test in zip(unseen or (), tests, strict=True):
        leaks += _within(task, {s: _digests(task.split(s)) for s in LEARNT} | {"test": test})
    for task, test in zip(unseen or (), tests, strict=True):
        owners, places, matched, agreed = learnt.look_up(test)
        if (matched & ~agreed).sum() > CONTRADICTED * matched.sum():
            sample = _sample(task.test[int(np.flatnonzero(matched)[0])])
            same_answer = int((owners >= 0).sum())
            shared_inputs.append(
                SharedInputs(task.name, int(matched.sum()), same_answer, len(test), sample)
            )
        else:
            leaks += _across(seen, task, owners, places)
    return Overlaps(leaks, shared_inputs)


def content(example: Example) -> tuple[int, int]:
    """64-bit digests of the input and of input with answer: two collide with probability 2^-64."""
    inputs = [(field, _normal(example[field])) for field in INPUTS if field in example]
    answers = [(field, _answer(example[field])) for field in ANSWERS if field in example]
    if "messages" in example:  # the last turn is the answer
        inputs.append(("messages", _normal(_said(example["messages"][:-1]))))
        answers.append(("messages", _normal(_said(example["messages"][-1:]))))
    elif "chosen" in example and "prompt" not in example and isinstance(example["chosen"], list):
        inputs.append(("chosen", _normal(_said(example["chosen"][:-1]))))  # two conversations
    if "candidates" in example or "response" in example:
        answers.append(("response", _normal(true_response(example))))
    return _digest(inputs), _digest([inputs, answers])


def _said(turns: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who says what; calls of tools count."""
    fields = ("role", "content", "tool_calls")
    return [str([turn.get(field) for field in fields]) for turn in turns]


def _digest(value: Any) -> int:
    digest = hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _digests(examples: Sequence[Example]) -> np.ndarray:
    """(n, 2) digests of the examples' inputs and contents; few bytes, as there may be very many."""
    import numpy as np

    numbers = (number for example in undrawn(examples) for number in content(example))
    return np.fromiter(numbers, dtype=np.uint64, count=2 * len(examples)).reshape(-1, 2)


class _Learnt:
    """What seen tasks have of the test examples of unseen tasks.

    Args:
        tests: (n, 2) digests of all these test examples.
    """

    def __init__(self, tests: np.ndarray) -> None:
        import numpy as np

        self.inputs, self.contents = np.unique(tests[:, 0]), np.unique(tests[:, 1])
        # the lowest and highest content that seen tasks have with each input
        self.lowest = np.full(len(self.inputs), np.iinfo(np.uint64).max, dtype=np.uint64)
        self.highest = np.zeros(len(self.inputs), dtype=np.uint64)
        # the first split of a seen task that has each content, and the example's place there
        self.owner = np.full(len(self.contents), -1)
        self.place = np.zeros(len(self.contents), dtype=np.int64)

    def add(self, digests: np.ndarray, owner: int) -> None:
        """Note the examples of the split of this index, in ascending order of the indices.

        Args:
            digests: (m, 2) digests of the examples.
            owner: The index.
        """
        import numpy as np

        inside, places = _search(self.inputs, digests[:, 0])
        np.minimum.at(self.lowest, places, digests[inside, 1])
        np.maximum.at(self.highest, places, digests[inside, 1])
        inside, places = _search(self.contents, digests[:, 1])
        places, first = np.unique(places, return_index=True)
        new = self.owner[places] < 0
        self.owner[places[new]] = owner
        self.place[places[new]] = np.flatnonzero(inside)[first[new]]

    def look_up(self, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What seen tasks have of the test examples of one task.

        Args:
            test: (n, 2) digests.

        Returns:
            (n,) index of the split that has the example, or -1; (n,) its place there; (n,) whether
            a seen task has the input; (n,) whether all of them give it this example's answer.
        """
        import numpy as np

        contents = np.searchsorted(self.contents, test[:, 1])
        inputs = np.searchsorted(self.inputs, test[:, 0])
        lowest, highest = self.lowest[inputs], self.highest[inputs]
        agreed = (lowest == test[:, 1]) & (highest == test[:, 1])
        return self.owner[contents], self.place[contents], lowest <= highest, agreed


def _search(values: np.ndarray, sought: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m,) which are among the ascending values, and the place of each that is."""
    import numpy as np

    places = np.searchsorted(values, sought)
    inside = places < len(values)
    inside[inside] = values[places[inside]] == sought[inside]
    return inside, places[inside]


def _within(task: Task, digests: dict[str, np.ndarray]) -> list[Leak]:
    """The leaks from a split of a task to another.

    Args:
        task: The task.
        digests: (n, 2) digests of the examples of each split.
    """
    import numpy as np

    leaks = []
    for first, second in PAIRS:
        contents, again = digests[first][:, 1], digests[second][:, 1]
        repeated = np.flatnonzero(np.isin(again, contents))
        if len(repeated):
            place = int(np.flatnonzero(contents == again[repeated[0]])[0])
            examples = task.split(first)[place], task.split(second)[int(repeated[0])]
            kind = f"{first} and {second}"
            leaks.append(_leak(kind, (task, task), (first, second), len(repeated), examples))
    return leaks


def _across(seen: TaskCollection, task: Task, owners: np.ndarray, places: np.ndarray) -> list[Leak]:
    """The leaks into an unseen task.

    Args:
        seen: Seen tasks.
        task: The unseen task.
        owners: (n,) index of the split of a seen task that has each of the n test examples, or -1.
        places: (n,) its place in that split.
    """
    import numpy as np

    distinct, first, counts = np.unique(owners, return_index=True, return_counts=True)
    leaks = []
    for i in np.argsort(first):
        if distinct[i] < 0:
            continue
        index, split = divmod(int(distinct[i]), len(LEARNT))
        seen_task, splits = seen.tasks[index], (LEARNT[split], "test")
        place = int(first[i])
        examples = seen_task.split(splits[0])[int(places[place])], task.test[place]
        leaks.append(_leak("seen and unseen", (seen_task, task), splits, int(counts[i]), examples))
    return leaks


def _leak(
    kind: str,
    tasks: tuple[Task, Task],
    splits: tuple[str, str],
    count: int,
    examples: tuple[Example, Example],
) -> Leak:
    places = tuple(place_of(example)[2:-1] for example in examples if place_of(example))
    sample = _sample(examples[1])
    return Leak(kind, tasks[0].name, tasks[1].name, count, sample, splits, places)


def _answer(value: Any) -> Any:
    """As `_normal`, but a label 1 is the label "1", and an array of one number is the number."""
    value = value.item() if getattr(value, "size", 0) == 1 else value
    return _normal(str(value) if isinstance(value, int) else value)


def _normal(value: Any) -> Any:
    """Text in lower case with single spaces, arrays as shape and digest, lists elementwise."""
    if isinstance(value, str):
        text = value if value.isascii() else unicodedata.normalize("NFC", value)
        return " ".join(text.lower().split())
    if hasattr(value, "tobytes"):
        # npz files keep the dtype of their arrays, rows of lists become float32
        kinds = {"f": "f4", "i": "i8", "u": "i8", "b": "i8"}
        value = value.astype(kinds.get(value.dtype.kind, value.dtype))
        return value.shape, hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()
    if isinstance(value, (list, tuple)):
        return [_normal(item) for item in value]
    return value


def _sample(example: Example) -> str:
    """The beginning of an example's text, for a message."""
    context = example.get("context", "")
    last_turn = context[-1] if isinstance(context, list) else context
    text = example.get("text") or example.get("prompt") or last_turn
    turns = next((v for n in CONVERSATIONS if isinstance(v := example.get(n), list)), None)
    if turns:  # of a conversation the last turn that is to be answered
        asked = [turn.get("content") for turn in turns if turn.get("role") != "assistant"]
        text = str(asked[-1] if asked else turns[-1].get("content"))
    if not text:
        return f"array of shape {getattr(example.get('x'), 'shape', '?')}"
    line = " ".join(text.split())
    return line if len(line) <= SAMPLE_LENGTH else line[: SAMPLE_LENGTH - 1] + "…"
