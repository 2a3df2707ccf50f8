"""Checks of one row: does it have what its kind of objective reads? One message per fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.printable import in_one_line
from foretune.tasks.file_formats import Unreadable, check_unicode, short
from foretune.tasks.messages import checked_messages
from foretune.tasks.preferences import SIDES, checked_pair
from foretune.tasks.readers import Row
from foretune.tasks.split_names import SplitNames

NEEDS = {
    "choice": "context with candidates and answer, or context with response",
    "classification": "text with label, or x with y",
    "causal-lm": "text, or prompt with completion, or messages",
    "preference": "prompt with chosen and rejected",
    "denoising": "x",
    "regression": "x with y",
    "prompts": "text with label, image with label, or x with y",
    "unlabelled": "x",
}
CLASSES = ("classification", "prompts")  # kinds whose examples have one label each


def task_of(row: Row, task_column: str) -> str:
    """The name of the row's task.

    Raises:
        UserError: The row has no such column, or it holds no name.
    """
    value = readable(row, task_column)
    if value is None and task_column in row.fields:
        raise UserError(f"{row.place}: {task_column} is empty: each row needs a task name")
    if value is None:
        raise UserError(
            f'{row.place}: no "{task_column}" column; it has {_names(row.fields)}. '
            f"Set task_column to the column that names the task."
            f"{did_you_mean(task_column, row.fields)}"
        )
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{row.place}: {task_column} must be text, got {short(value)}")
    check_unicode(str(value), f"{row.place}, {task_column}")
    if not str(value).strip():
        raise UserError(f"{row.place}: {task_column} is empty: each row needs a task name")
    return str(value)


def split_of(row: Row, splits: SplitNames | None = None) -> str:
    """The split that the row's split column and its file name, else "train".

    Args:
        row: The row.
        splits: The names of splits; None for the usual ones.

    Returns:
        One of `SPLITS`, or `LEFT_OUT`.

    Raises:
        UserError: The column holds no name of a split, or another than the file's.
    """
    value = readable(row, "split")
    if value is None:
        return row.split or "train"
    if not isinstance(value, str):
        value = short(value)
    split = (splits or SplitNames()).split_of(value, row.place)
    if row.split not in (None, split):
        raise UserError(
            f'{row.place}: the row says split "{value}", but its file is of {row.split}: '
            "correct the row, or rename the file"
        )
    return split


def readable(row: Row, column: str) -> Any:
    """The cell of a column that is read; None if there is none.

    Raises:
        UserError: The cell could not be decoded.
    """
    cell = row.fields.get(column)
    if isinstance(cell, Unreadable):
        raise UserError(f"{row.place}: {column}: {cell.reason}")
    return cell


def example_of(row: Row, kind: str, drop: tuple[str, ...]) -> dict[str, Any]:
    """The row as a checked example of `kind`, without null fields and the columns in `drop`.

    Cells that could not be decoded are left out too, where `kind` does not read their columns.

    Raises:
        UserError: The row lacks a field, or a field holds something that `kind` cannot read.
    """
    example = {k: v for k, v in row.fields.items() if v is not None and k not in drop}
    if kind == "choice":
        _check_choice(example, row)
    elif kind == "causal-lm":
        _check_language(example, row)
    elif kind == "preference":
        for field in ("prompt", *SIDES):
            if isinstance(value := readable(row, field), str):
                check_unicode(value, f"{row.place}, {field}")
        checked_pair(example, row.place)
    elif kind == "prompts" and "image" in example and "text" not in example:
        _need(example, ("image", "label"), row, kind)
        _check_text(example["image"], "image", row)
        _check_label(example["label"], "label", row)
        if row.unit != "image":  # a file in a table is named from where the table is
            example["image"] = str(Path(row.file).parent / example["image"])
    elif kind in CLASSES and ("text" in example or not {"x", "y"} & example.keys()):
        _need(example, ("text", "label"), row, kind)
        _check_text(example["text"], "text", row)
        _check_label(example["label"], "label", row)
    elif kind == "denoising":
        _need(example, ("x",), row, kind)
        example = {k: v for k, v in example.items() if k == "x" or _may_be_argument(v)}
        example["x"] = _array(example["x"], "x", row)
    else:
        _need(example, ("x",) if kind == "unlabelled" else ("x", "y"), row, kind)
        example["x"] = _array(example["x"], "x", row)
        if "y" in example and kind in (*CLASSES, "unlabelled"):
            example["y"] = _scalar(example["y"])
            _check_label(example["y"], "y", row)
        elif "y" in example:
            example["y"] = _target(example["y"], row)
    return {k: v for k, v in example.items() if not isinstance(v, Unreadable)}


def _check_choice(example: dict[str, Any], row: Row) -> None:
    drawn = "response" in example and "candidates" not in example and "answer" not in example
    _need(example, ("context",) if drawn else ("context", "candidates", "answer"), row, "choice")
    context = example["context"]
    if isinstance(context, list):
        if not context:
            raise UserError(f"{row.place}: context is empty: it needs at least one turn")
        for turn in context:
            _check_text(turn, "a turn of context", row)
    else:
        _check_text(context, "context", row)
    if drawn:
        _check_text(example["response"], "response", row)
        return
    candidates, answer = example["candidates"], example["answer"]
    if not isinstance(candidates, list):
        raise UserError(
            f"{row.place}: candidates must be a list, got {short(candidates)}"
            f"{_text_only(candidates, row)}"
        )
    if len(candidates) < 2:
        raise UserError(f"{row.place}: at least 2 candidates are needed, got {len(candidates)}")
    for candidate in candidates:
        _check_text(candidate, "a candidate", row)
    check_repeats(candidates, row.place)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise UserError(
            f"{row.place}: answer is the position of the correct candidate, got {short(answer)}"
            f"{_text_only(answer, row)}"
        )
    if not 0 <= answer < len(candidates):
        raise UserError(
            f"{row.place}: answer is outside the candidates: got answer={short(answer)} "
            f"with {len(candidates)} candidates (counted from 0)"
        )


def check_repeats(candidates: Sequence[str], where: str) -> None:
    """Check that no candidate of a choice is given twice, as the right one and a wrong one perhaps.

    Raises:
        UserError: One is.
    """
    first: dict[str, int] = {}
    for i, candidate in enumerate(candidates):
        if first.setdefault(candidate, i) != i:
            raise UserError(
                f"{where}: candidates {first[candidate] + 1} and {i + 1} are the same "
                f"({short(candidate)}): remove one"
            )


def _check_language(example: dict[str, Any], row: Row) -> None:
    readable(row, "messages")
    if "messages" in example:
        example["messages"] = checked_messages(example["messages"], f"{row.place}: messages")
        return
    fields = ("text",) if "text" in example else ("prompt", "completion")
    _need(example, fields, row, "causal-lm")
    for field in fields:
        _check_text(example[field], field, row)


def _need(example: dict[str, Any], fields: tuple[str, ...], row: Row, kind: str) -> None:
    """Check that the example has all these fields, and that they could be decoded.

    Raises:
        UserError: It lacks some, or one could not.
    """
    for field in fields:
        readable(row, field)
    missing = [field for field in fields if field not in example]
    if missing:
        present = {k: v for k, v in row.fields.items() if v is not None}
        article = "an" if kind[0] in "aeiou" else "a"
        raise UserError(
            f"{row.place}: {' and '.join(missing)} missing: {article} {kind} row needs "
            f"{NEEDS[kind]}; this one has {_names(present)}"
        )


def _check_text(value: Any, field: str, row: Row) -> None:
    if not isinstance(value, str):
        raise UserError(f"{row.place}: {field} must be text, got {short(value)}")
    check_unicode(value, f"{row.place}, {field}")
    if not value.strip():
        raise UserError(f"{row.place}: {field} is empty")


def _check_label(value: Any, field: str, row: Row) -> None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        hint = ": write it as text or as a whole number" if isinstance(value, (bool, float)) else ""
        raise UserError(
            f"{row.place}: {field} must be a class (text or a whole number), got "
            f"{short(value)}{hint}"
        )
    check_unicode(str(value), f"{row.place}, {field}")
    if not str(value).strip():
        raise UserError(f"{row.place}: {field} is empty")


def _scalar(value: Any) -> Any:
    return value.item() if getattr(value, "shape", None) == () else value


def _target(value: Any, row: Row) -> Any:
    """A target that is not a label: a finite float, or an array of finite numbers.

    Raises:
        UserError: It is neither.
    """
    import math

    value = _scalar(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise UserError(f"{row.place}: y must be a finite number, got {short(value)}")
        return number
    return _array(value, "y", row)


def _may_be_argument(cell: Any) -> bool:
    """Whether a denoiser may take a cell beside x: an array, a number, or a text to encode."""
    import numpy as np

    if isinstance(cell, list):
        try:
            cell = np.asarray(cell, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            return False
    return isinstance(cell, np.ndarray | np.generic | int | float | str)


def _array(value: Any, field: str, row: Row) -> Any:
    """A NumPy array of finite numbers; lists become float32, arrays keep their dtype.

    Raises:
        UserError: It is not a non-empty array of finite numbers.
    """
    import numpy as np

    if not isinstance(value, (list, np.ndarray)):
        raise UserError(
            f"{row.place}: {field} must be an array of numbers, got {short(value)}"
            f"{_text_only(value, row)}"
        )
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        array = np.asarray("no numbers")
    if array.dtype.kind not in "fiub":
        raise UserError(
            f"{row.place}: {field} must be an array of numbers with rows of equal length, "
            f"got {short(value)}"
        )
    if not array.size:
        raise UserError(f"{row.place}: {field} is empty")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{row.place}: {field} holds NaN or infinity")
    return array


def _names(fields: Mapping[str, Any]) -> str:
    return in_one_line(", ".join(sorted(fields))) if fields else "no fields"


def _text_only(value: Any, row: Row) -> str:
    """A hint for rows of a format without numbers and lists."""
    is_table = isinstance(value, str) and any(s in row.file.casefold() for s in (".csv", ".tsv"))
    return " (a CSV or TSV file holds text only: write .jsonl or .parquet)" if is_table else ""
