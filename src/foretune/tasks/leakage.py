"""Finds examples that stand where they must not: in train, and again where scores are taken."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from foretune.tasks.candidates import true_response
from foretune.tasks.task import Example, Task, TaskCollection

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
    leaks = [leak for side in (seen, unseen) if side is not None for leak in _within(side)]
    if unseen is None:
        return leaks
    owner: dict[bytes, str] = {}
    for task in seen:
        for row in task.train:
            owner.setdefault(content(row), task.name)
    for task in unseen:
        shared: dict[str, list[Example]] = {}
        for row in task.test:
            name = owner.get(content(row))
            if name is not None:
                shared.setdefault(name, []).append(row)
        for name, rows in shared.items():
            leaks.append(Leak("seen and unseen", name, task.name, len(rows), _sample(rows[0])))
    return leaks


def content(row: Example) -> bytes:
    """A digest of what the row says."""
    parts = [(field, _normal(row[field])) for field in FIELDS if field in row]
    if "candidates" in row or "response" in row:
        parts.append(("response", _normal(true_response(row))))
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def _within(collection: TaskCollection) -> list[Leak]:
    leaks = []
    for task in collection:
        rows = _repeated(task)
        if rows:
            sample = _sample(rows[0])
            leaks.append(Leak("train and test", task.name, task.name, len(rows), sample))
    return leaks


def _repeated(task: Task) -> list[Example]:
    train = {content(row) for row in task.train}
    return [row for row in (*task.validation, *task.test) if content(row) in train]


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
