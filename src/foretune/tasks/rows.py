"""Checks of one row: does it have what its kind of objective reads? One message per fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.tasks.readers import SPLIT_NAMES, Row

NEEDS = {
    "choice": "context with candidates and answer, or context with response",
    "classification": "text with label, or x with y",
    "causal-lm": "text, or prompt with completion",
    "denoising": "x",
    "regression": "x with y",
    "prompts": "text with label, or x with y",
    "unlabelled": "x",
}
CLASSES = ("classification", "prompts")  # kinds whose examples have one label each


def task_of(row: Row, task_column: str) -> str:
    """The name of the row's task.

    Raises:
        UserError: The row has no such column, or it holds no name.
    """
    value = row.fields.get(task_column)
    if value is None:
        raise UserError(
            f'{row.place}: no "{task_column}" column; it has {_names(row.fields)}. '
            f"Set task_column to the column that names the task."
            f"{did_you_mean(task_column, row.fields)}"
        )
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{row.place}: {task_column} must be text, got {_short(value)}")
    check_unicode(str(value), f"{row.place}, {task_column}")
    if not str(value).strip():
        raise UserError(f"{row.place}: {task_column} is empty: each row needs a task name")
    return str(value)


def split_of(row: Row) -> str:
    """The split of the row's split column, else of its file, else "train".

    Raises:
        UserError: The column holds no name of a split.
    """
    value = row.fields.get("split")
    value = row.split if value is None else value
    if value is None:
        return "train"
    split = SPLIT_NAMES.get(value) if isinstance(value, str) else None
    if split is None:
        raise UserError(
            f"{row.place}: split must be train, validation (or valid, dev) or test; "
            f"got {_short(value)}"
        )
    return split


def example_of(row: Row, kind: str, drop: tuple[str, ...]) -> dict[str, Any]:
    """The row as a checked example of `kind`, without null fields and the columns in `drop`.

    Raises:
        UserError: The row lacks a field, or a field holds something that `kind` cannot read.
    """
    example = {k: v for k, v in row.fields.items() if v is not None and k not in drop}
    if kind == "choice":
        _check_choice(example, row)
    elif kind == "causal-lm":
        _check_language(example, row)
    elif kind in CLASSES and "text" in example:
        _need(example, ("label",), row, kind)
        _check_text(example["text"], "text", row)
        _check_label(example["label"], "label", row)
    elif kind == "denoising":
        _need(example, ("x",), row, kind)
        example = {"x": _array(example["x"], "x", row)}
    else:
        _need(example, ("x",) if kind == "unlabelled" else ("x", "y"), row, kind)
        example["x"] = _array(example["x"], "x", row)
        if "y" not in example:
            return example
        if kind in (*CLASSES, "unlabelled"):
            example["y"] = _scalar(example["y"])
            _check_label(example["y"], "y", row)
        else:
            example["y"] = _target(example["y"], row)
    return example


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
        raise UserError(f"{row.place}: candidates must be a list, got {_short(candidates)}")
    if len(candidates) < 2:
        raise UserError(f"{row.place}: at least 2 candidates are needed, got {len(candidates)}")
    for candidate in candidates:
        _check_text(candidate, "a candidate", row)
    check_repeats(candidates, row.place)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise UserError(
            f"{row.place}: answer is the position of the correct candidate, got {_short(answer)}"
        )
    if not 0 <= answer < len(candidates):
        raise UserError(
            f"{row.place}: answer is outside the candidates: got answer={answer} "
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
                f"({_short(candidate)}): remove one"
            )


def _check_language(example: dict[str, Any], row: Row) -> None:
    fields = ("text",) if "text" in example else ("prompt", "completion")
    _need(example, fields, row, "causal-lm")
    for field in fields:
        _check_text(example[field], field, row)


def _need(example: dict[str, Any], fields: tuple[str, ...], row: Row, kind: str) -> None:
    """Check that the example has all these fields.

    Raises:
        UserError: It lacks some.
    """
    missing = [field for field in fields if field not in example]
    if missing:
        present = {k: v for k, v in row.fields.items() if v is not None}
        article = "an" if kind[0] in "aeiou" else "a"
        raise UserError(
            f"{row.place}: {' and '.join(missing)} missing: {article} {kind} row needs "
            f"{NEEDS[kind]}; this one has {_names(present)}"
        )


def check_unicode(text: str, where: str) -> None:
    """Check that a text can be written as UTF-8, which no tokenizer or file can do without.

    Args:
        text: The text.
        where: What and where it is, for the message.

    Raises:
        UserError: It holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(
            f"{where}: character {error.start + 1} is half of a surrogate pair ({half}), which is "
            "no text: write the whole character"
        ) from error


def _check_text(value: Any, field: str, row: Row) -> None:
    if not isinstance(value, str):
        raise UserError(f"{row.place}: {field} must be text, got {_short(value)}")
    check_unicode(value, f"{row.place}, {field}")
    if not value.strip():
        raise UserError(f"{row.place}: {field} is empty")


def _check_label(value: Any, field: str, row: Row) -> None:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(
            f"{row.place}: {field} must be a class (text or a whole number), got {_short(value)}"
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
        if not math.isfinite(value):
            raise UserError(f"{row.place}: y must be a finite number, got {value}")
        return float(value)
    return _array(value, "y", row)


def _array(value: Any, field: str, row: Row) -> Any:
    """A NumPy array of finite numbers; lists become float32, arrays keep their dtype.

    Raises:
        UserError: It is not a non-empty array of finite numbers.
    """
    import numpy as np

    if not isinstance(value, (list, np.ndarray)):
        raise UserError(f"{row.place}: {field} must be an array of numbers, got {_short(value)}")
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError):
        array = np.asarray("no numbers")
    if array.dtype.kind not in "fiub":
        raise UserError(
            f"{row.place}: {field} must be an array of numbers with rows of equal length, "
            f"got {_short(value)}"
        )
    if not array.size:
        raise UserError(f"{row.place}: {field} is empty")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"{row.place}: {field} holds NaN or infinity")
    return array


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(sorted(fields)) if fields else "no fields"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
