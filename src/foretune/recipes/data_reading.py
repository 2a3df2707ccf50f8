"""`foretune init --data`: which template fits a file, and which numbers fit its tasks."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from foretune.errors import UserError
from foretune.recipes.yaml_io import as_yaml_value
from foretune.tasks.labels import label_text
from foretune.tasks.readers import read_rows

FEWEST_UNSEEN, MOST_UNSEEN = 8, 50
TRAIN_SHARE = 0.7  # of a task's rows, of which the rest is carved for validation and test
SHOTS = (1, 2, 4, 8, 16, 32, 64)
# Template → the columns by which it is known, beside the task's; the first that is there is taken.
NEEDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",),),
    "preference": (("prompt", "chosen", "rejected"),),
    "choice": (("context", "candidates", "answer"), ("context", "response")),
    "classification": (("text", "label"),),
    "arrays": (("x", "y"),),
    "causal-lm": (("prompt", "completion"), ("text",)),
}
# Column → other names that people give it.
ALIASES: dict[str, tuple[str, ...]] = {
    "task": (
        *("user", "user_id", "customer", "customer_id", "client", "client_id", "account", "shop"),
        *("device", "device_id", "person", "persona", "participant", "annotator", "author"),
        *("speaker", "domain", "subject", "assay", "site", "worker", "rater", "task_id"),
    ),
    "text": ("body", "content", "message", "sentence", "utterance", "comment", "review", "query"),
    "label": ("labels", "category", "class", "intent", "tag", "topic", "sentiment", "target"),
    "prompt": ("instruction", "question", "input"),
    "completion": ("output", "response", "answer"),
}


@dataclass(frozen=True, kw_only=True)
class DataReading:
    """What a file holds.

    Args:
        template: The template that fits.
        task_column: The column that names a row's task.
        columns: Columns to rename: name in the file → name that is read.
        num_tasks: Number of tasks.
        rows_per_task: Median number of rows of a task.
        unseen: Number of tasks to hold out.
        shots: Numbers of examples to adapt on.
    """

    template: str
    task_column: str
    columns: dict[str, str] = field(default_factory=dict)
    num_tasks: int
    rows_per_task: float
    unseen: int
    shots: list[int | str]


def read_data(source: str, template: str | None = None) -> DataReading:
    """Reads all rows of a file and says how to use them.

    Args:
        source: A file, a folder or a dataset.
        template: A template; None for the one that fits the columns.

    Raises:
        UserError: The file cannot be read, has no column that names tasks, columns that fit no
            template, or fewer than two tasks.
    """
    rows: Counter[str] = Counter()
    labels: dict[str, set[str]] = {}
    first, rest = _peek(source)
    columns = [*first]
    task_column = _task_column(source, columns)
    template, renames = _fit(source, columns, task_column, template)
    label_column = next((old for old, new in renames.items() if new == "label"), None)
    label_column = label_column or ("label" if "label" in columns else "y")
    for fields in rest:
        task = str(fields.get(task_column))
        rows[task] += 1
        label = fields.get(label_column)
        if isinstance(label, (str, int)):
            labels.setdefault(task, set()).add(label_text(label))
    if len(rows) < 2:
        raise UserError(f"{source} has a single task ({task_column}): retraining takes several")
    per_task = median(rows.values())
    classes = median([len(of_task) for of_task in labels.values()] or [1])
    is_labelled = template in ("classification", "arrays")
    return DataReading(
        template=template,
        task_column=task_column,
        columns=renames,
        num_tasks=len(rows),
        rows_per_task=per_task,
        unseen=_unseen(len(rows)),
        shots=_shots(per_task * TRAIN_SHARE / (classes if is_labelled else 1)),
    )


def fill(text: str, source: str, reading: DataReading) -> str:
    """A template's text with the source, its columns, and the numbers that fit its tasks."""
    values = {
        "source": source,
        "task_column": reading.task_column,
        "unseen": reading.unseen,
        "shots": reading.shots,
    }
    for key, value in values.items():
        text = _set(text, key, value)
    if reading.columns:
        line = f"  columns: {as_yaml_value(reading.columns)}"
        place = re.compile("^  task_column: .*$", re.MULTILINE)
        text = place.sub(lambda match: f"{match[0]}\n{line}", text, count=1)
    return text


def _set(text: str, key: str, value: Any) -> str:
    """The text with another value at the first `key:`, whose comment stays in its column."""

    def line(match: re.Match[str]) -> str:
        start = f"{match[1]}{key}: {as_yaml_value(value)}"
        if not match[3]:
            return start
        width = len(match[1]) + len(key) + 2 + len(match[2])
        return f"{start.ljust(width)}{'' if len(start) < width else ' '}{match[3]}"

    return re.sub(rf"(?m)^( +){key}: (.*?\s*)(#.*)?$", line, text, count=1)


def _peek(source: str) -> tuple[Mapping[str, Any], Any]:
    """The first row's fields, and an iterator over those of all rows.

    Raises:
        UserError: There is none.
    """
    rows = (row.fields for row in read_rows(source))
    first = next(rows, None)
    if first is None:
        raise UserError(f"{source} has no rows")
    return first, itertools.chain([first], rows)


def _task_column(source: str, columns: Sequence[str]) -> str:
    """The column that names tasks.

    Raises:
        UserError: None does, or several may.
    """
    if "task" in columns:
        return "task"
    matches = [name for name in columns if name.casefold() in ALIASES["task"]]
    if len(matches) == 1:
        return matches[0]
    names = ", ".join(columns)
    what = f"{' and '.join(matches)} may" if matches else "no column seems to"
    raise UserError(
        f"{source}: {what} name a row's task; it has {names}. Rename one to task: a task is a "
        "customer, a user, a device, …"
    )


def _fit(
    source: str, columns: Sequence[str], task_column: str, template: str | None
) -> tuple[str, dict[str, str]]:
    """The template that fits, and the columns to be renamed for it.

    Raises:
        UserError: None fits, or not the one that is asked for.
    """
    candidates = NEEDS if template is None else {template: NEEDS[template]}
    # A text alone is learnt only where no other column, of whatever name, is its answer.
    for with_aliases in (False, True):
        for name, needs in candidates.items():
            for needed in needs:
                if len(needed) == 1 and needed[0] == "text" and not with_aliases:
                    continue
                renames = _renames(columns, task_column, needed, with_aliases)
                if renames is not None:
                    return name, renames
    needs_text = "; ".join(
        f"{name}: {' or '.join(' + '.join(needed) for needed in needs)}"
        for name, needs in candidates.items()
    )
    raise UserError(
        f"{source} has the columns {', '.join(columns)}, which fit none of {needs_text}"
    )


def _renames(
    columns: Sequence[str], task_column: str, needed: Sequence[str], with_aliases: bool
) -> dict[str, str] | None:
    """The columns to be renamed so that all that are needed are there; None if they cannot be."""
    renames: dict[str, str] = {}
    for name in needed:
        if name in columns:
            continue
        matches = [
            column
            for column in columns
            if with_aliases
            and column not in (task_column, *needed, *renames)
            and (column.casefold() == name or column.casefold() in ALIASES.get(name, ()))
        ]
        if len(matches) != 1:
            return None
        renames[matches[0]] = name
    return renames


def _unseen(num_tasks: int) -> int:
    """A number of tasks to hold out.

    >>> [_unseen(number) for number in (2, 12, 40, 1000)]
    [1, 6, 10, 50]
    """
    return max(1, min(MOST_UNSEEN, max(num_tasks // 4, min(FEWEST_UNSEEN, num_tasks // 2))))


def _shots(most: float) -> list[int | str]:
    """Two numbers of examples that tasks with so many have, or all.

    >>> _shots(20), _shots(3), _shots(0.5)
    ([4, 16], [2], ['all'])
    """
    fitting = [number for number in SHOTS if number <= most]
    if not fitting:
        return ["all"]
    last = len(fitting) - 1
    return [fitting[last - 2], fitting[last]] if last >= 2 else [fitting[last]]
