"""`Example`: one data item, a mapping of its columns. `SPLITS`: the splits of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Example = Mapping[str, Any]
SPLITS = ("train", "validation", "test")


class ReadExample(dict[str, Any]):
    """An example that was read from a source and knows its place there; equal to a plain dict.

    Args:
        fields: Its columns.
        source: What it was read from and what is counted there: "a.jsonl line".
        number: Number of the line or row, from 1.
    """

    __slots__ = ("number", "source")

    def __init__(self, fields: Mapping[str, Any], source: str, number: int) -> None:
        super().__init__(fields)
        self.source, self.number = source, number

    def __reduce__(self) -> Any:
        return type(self), (dict(self), self.source, self.number)


class DrawnExample(ReadExample):
    """A choice example whose distractors were drawn, not given."""

    __slots__ = ()


def place_of(example: Any) -> str:
    """Where an example was read, in parentheses after a space; empty if unknown.

    >>> place_of(ReadExample({"text": "a"}, "a.jsonl line", 3)), place_of({"text": "a"})
    (' (a.jsonl line 3)', '')
    """
    if not isinstance(example, ReadExample) or not example.source:
        return ""
    return f" ({example.source} {example.number})"


def row_name(task: str, split: str, index: int, example: Any) -> str:
    """The name of a row in messages: its task, split, number from 1, and where it was read.

    >>> row_name("red", "train", 0, {"text": "a"})
    'task "red", train row 1'
    """
    return f'task "{task}", {split} row {index + 1}{place_of(example)}'
