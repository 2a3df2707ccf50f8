"""Rows without answers, each with the adapter that answers it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.printable import in_one_line
from foretune.recipes.adapter_list import adapters_by_task, is_adapter
from foretune.tasks.file_formats import check_unicode
from foretune.tasks.messages import checked_turns, with_message_names
from foretune.tasks.readers import Row, read_rows
from foretune.tasks.rows import CLASSES, check_repeats, example_of, readable, task_of
from foretune.tasks.sources import Source, check_renames_of
from foretune.training.outcome import folder_name, suffixed_name

READS = {  # kind of objective → what a row must have beside its task
    "choice": ("context", "candidates"),
    "preference": ("prompt", "candidates"),
    "regression": ("x",),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row that is to be answered.

    Args:
        row: The row, with renamed columns.
        columns: Its columns as they were read.
        adapter: The folder of the adapter, or of the task's own model.
        number: Its position among all rows.
    """

    row: Row
    columns: Mapping[str, Any]
    adapter: Path
    number: int


def read_questions(source: Source, adapters: Path, added: Collection[str]) -> list[Question]:
    """The rows with their adapters.

    Args:
        source: Where the rows are, and how they are read.
        adapters: A PEFT folder or a model, which answers all rows, or a folder of such folders.
        added: Columns that a prediction has.

    Raises:
        UserError: There is no adapter or no row, a row names no task or one without an adapter, a
            cell cannot be read, or a row has a column that is added.
    """
    by_task = None if is_adapter(adapters) else adapters_by_task(adapters)
    questions: list[Question] = []
    names: set[str] = set()
    for row in read_rows(source.source):
        for name, value in row.fields.items():
            readable(row, name)
            if isinstance(value, str):
                check_unicode(value, f"{row.place}, {name}")
            if name in added:
                raise UserError(
                    f"{row.place}: a column {name} is there already, and a prediction adds one of "
                    "that name: rename it"
                )
        names.update(row.fields)
        fields = {source.columns.get(name, name): value for name, value in row.fields.items()}
        if source.messages:
            fields = with_message_names(fields, source.messages)
        renamed = row._replace(fields=fields)
        folder = adapters
        if by_task is not None:
            task = task_of(renamed, source.task_column)
            match = _adapter_of(task, by_task)
            if match is None:
                raise UserError(
                    f"{row.place}: no adapter of task {in_one_line(task)} in {adapters}, which has "
                    f"{len({*by_task.values()})}.{did_you_mean(task, by_task)}"
                )
            folder = match
        questions.append(
            Question(row=renamed, columns=row.fields, adapter=folder, number=len(questions))
        )
    if not questions:
        raise UserError(f"{source.source} has no rows")
    check_renames_of(source, sorted(names))
    return questions


def has_predictions(file: Path) -> bool:
    """Whether a file is a table with a column of predictions."""
    if not file.is_file():
        return False
    try:
        return "prediction" in next(read_rows(str(file))).fields
    except (UserError, StopIteration):
        return False


def _adapter_of(task: str, by_task: Mapping[str, Path]) -> Path | None:
    """The folder of a task, whose name a file system may have confused with another one's."""
    if task in by_task and by_task[task].name != task:
        return by_task[task]  # as the folder records
    names = (suffixed_name(task), task, folder_name(task))
    return next((by_task[name] for name in names if name in by_task), None)


def examples_of(question: Question, kind: str, objective: Any) -> Iterator[dict[str, Any]]:
    """The row as examples with an answer, which no prediction depends on.

    Args:
        question: The row.
        kind: Kind of objective.
        objective: The objective, which knows labels of the row's task.

    Yields:
        One example; of preferences, one for each candidate.

    Raises:
        UserError: The row lacks something that is read.
    """
    row = question.row
    fields: dict[str, Any] = {k: v for k, v in row.fields.items() if v is not None}
    is_image = kind == "prompts" and "image" in fields and "text" not in fields
    of_array = ("image",) if is_image else ("x",)
    is_text = "text" in fields or not {"x", *of_array} & fields.keys()
    reads = READS.get(kind, ("text",) if is_text else of_array)
    missing = [name for name in reads if name not in fields]
    if missing:
        names = "text or x" if kind in CLASSES else " and ".join(missing)
        raise UserError(
            f"{row.place}: {names} missing, it has {in_one_line(', '.join(fields))}: "
            "tasks.columns.NAME=... renames a column"
        )
    if kind in CLASSES:
        label = objective.labels[str(question.adapter)][0]
        fields |= {"label": label} if is_image or "text" in fields else {"y": label}
    elif kind == "regression":
        fields["y"] = 0.0
    elif kind == "choice":
        fields["answer"] = 0
    elif kind == "preference":
        candidates = _candidates(row)
        for i, candidate in enumerate(candidates):
            pair = {"chosen": candidate, "rejected": candidates[i - 1]}
            yield example_of(row._replace(fields={**fields, **pair}), kind, ("split",))
        return
    yield example_of(row._replace(fields=fields), kind, ("split",))


def _candidates(row: Row) -> Sequence[Any]:
    """The answers among which one is preferred.

    Raises:
        UserError: There are not two or more that differ.
    """
    candidates = row.fields.get("candidates")
    if not isinstance(candidates, list) or len(candidates) < 2:
        raise UserError(
            f"{row.place}: candidates must be a list of two answers or more, got "
            f"{in_one_line(str(candidates))[:60]}"
        )
    for i, candidate in enumerate(candidates, start=1):
        if not candidate or (isinstance(candidate, str) and not candidate.strip()):
            raise UserError(f"{row.place}: candidate {i} is empty")
    check_repeats([str(candidate) for candidate in candidates], row.place)
    return candidates


def prompt_of(row: Row) -> Any:
    """What is continued or answered: a text, or the turns before the last one of the assistant.

    Raises:
        UserError: The row has none.
    """
    if row.fields.get("messages") is not None:
        turns = checked_turns(row.fields["messages"], f"{row.place}: messages")
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if not turns:
            raise UserError(f"{row.place}: messages have no turn to be answered")
        return turns
    for name in ("prompt", "text"):
        value = row.fields.get(name)
        if isinstance(value, str):
            return value
    raise UserError(f"{row.place}: neither messages, nor prompt, nor text: nothing to continue")
