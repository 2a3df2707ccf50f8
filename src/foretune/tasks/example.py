"""`Example`: one data item, a mapping of its columns. `SPLITS`: the splits of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Example = Mapping[str, Any]
SPLITS = ("train", "validation", "test")


class ReadExample(dict[str, Any]):
    """An example that knows where it was read; it equals a plain dict of the same columns.

    Args:
        columns: The columns of the example.
        file: The file or dataset.
        unit: "line" or "row".
        number: Number of the line or row, from 1.
    """

    __slots__ = ("file", "number", "unit")

    def __init__(self, columns: Mapping[str, Any], file: str, unit: str, number: int) -> None:
        super().__init__(columns)
        self.file, self.unit, self.number = file, unit, number

    def with_columns(self, columns: Mapping[str, Any]) -> ReadExample:
        """Other columns from the same place."""
        return ReadExample(columns, self.file, self.unit, self.number)


def place_of(example: Example) -> str | None:
    """Where an example was read, such as "a.jsonl line 3"; None if it was made in Python."""
    if not isinstance(example, ReadExample):
        return None
    return f"{example.file} {example.unit} {example.number}"
