"""scores.json: the tasks that a folder of adapters holds. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from foretune.files import write_whole
from foretune.formats import read_json

TaskDraw = tuple[str, int]


class ScoreRow(TypedDict):
    """A row of scores.json."""

    task: str
    draw: int
    folder: str
    score: float | None
    num_rows: int
    num_train: NotRequired[int | None]
    adapted: NotRequired[str | None]
    digest: NotRequired[str | None]
    version: NotRequired[int]


@dataclass(frozen=True)
class SavedTask:
    """A task that has been adapted to, as scores.json records it.

    Args:
        folder: Name of its folder.
        score: Its mean score; None without examples to score on.
        num_rows: Number of examples that were scored.
        num_train: Number of examples that it was adapted on; None where an earlier version wrote
            the record, as for the next two.
        adapted: When, in ISO 8601 and UTC.
        digest: Digest of all its examples.
        version: 1, and one more each time that the task was adapted again.
    """

    folder: str
    score: float | None
    num_rows: int
    num_train: int | None = None
    adapted: str | None = None
    digest: str | None = None
    version: int = 1


def read_scores(file: Path) -> dict[TaskDraw, SavedTask]:
    """The tasks that a scores.json lists; none if there is no such file."""
    if not file.is_file():
        return {}
    return {
        (row["task"], row["draw"]): SavedTask(
            folder=row["folder"],
            score=row["score"],
            num_rows=row["num_rows"],
            num_train=row.get("num_train"),
            adapted=row.get("adapted"),
            digest=row.get("digest"),
            version=row.get("version", 1),
        )
        for row in read_json(file, list[ScoreRow])
    }


def write_scores(file: Path, saved: Mapping[TaskDraw, SavedTask]) -> None:
    """Writes a scores.json."""
    rows = [
        {"task": task, "draw": draw, **dataclasses.asdict(entry)}
        for (task, draw), entry in saved.items()
    ]
    write_whole(file, json.dumps(rows, indent=1))
