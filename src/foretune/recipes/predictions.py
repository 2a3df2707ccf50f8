"""What a row without an answer is read as, and what its prediction is written as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from foretune.errors import UserError
from foretune.files import LABELS_FILE
from foretune.formats import read_json
from foretune.models.surgery import head_labels, head_width
from foretune.printable import in_one_line
from foretune.tasks.readers import Row
from foretune.tasks.rows import CLASSES, example_of

PREDICTION = "prediction"
COLUMNS = (PREDICTION, "probability", "probabilities", "prediction_index", "scores")
Prediction = dict[str, Any]  # the columns that are added to a row


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row that is to be answered.

    Args:
        row: The row, with renamed columns.
        adapter: The folder of the adapter, or of the task's own model.
        number: Its position among all rows.
    """

    row: Row
    adapter: Path
    number: int


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
    reads = {"choice": ("context", "candidates"), "preference": ("prompt", "candidates")}.get(
        kind, ("x",) if kind == "regression" or "text" not in fields else ("text",)
    )
    missing = [name for name in reads if name not in fields]
    if missing:
        names = "text or x" if kind in CLASSES else " and ".join(missing)
        raise UserError(
            f"{row.place}: {names} missing, it has {in_one_line(', '.join(fields))}: "
            "tasks.columns.NAME=... renames a column"
        )
    if kind in CLASSES:
        label = objective.labels[str(question.adapter)][0]
        fields |= {"label": label} if "text" in fields else {"y": label}
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


def prediction_of(
    question: Question, kind: str, outputs: Sequence[np.ndarray], labels: Sequence[Any]
) -> Prediction:
    """The columns of a prediction.

    Args:
        question: The row.
        kind: Kind of objective.
        outputs: (k,) outputs of each of the row's examples.
        labels: The label of each output; None for one that is none of the task's.
    """
    if kind == "regression":
        values = outputs[0].tolist()
        return {PREDICTION: values[0] if len(values) == 1 else values}
    if kind in ("choice", "preference"):
        candidates = question.row.fields["candidates"]
        scores = outputs[0][: len(candidates)]
        if kind == "preference":
            scores = np.array([values[0] for values in outputs])
        best, probabilities = int(scores.argmax()), _softmax(scores)
        return {
            PREDICTION: candidates[best],
            "prediction_index": best,
            "probability": float(probabilities[best]),
            "scores": scores.tolist(),
        }
    is_label = np.array([label is not None for label in labels])
    probabilities = _softmax(np.where(is_label, outputs[0][: len(labels)], -np.inf))
    by_label = {
        str(label): float(probability)
        for label, probability in zip(labels, probabilities, strict=True)
        if label is not None
    }
    best = int(probabilities.argmax())
    return {
        PREDICTION: labels[best],
        "probability": float(probabilities[best]),
        "probabilities": by_label,
    }


def labels_of(folder: Path, model: nn.Module) -> list[Any]:
    """The label of each output of a task's head; None where it is none of the task's."""
    if (folder / LABELS_FILE).is_file():
        return read_json(folder / LABELS_FILE, list[str | int | float | None])
    names = head_labels(model)
    return list(names) if names is not None else list(range(head_width(model) or 0))


def _candidates(row: Row) -> list[Any]:
    """The answers among which one is preferred.

    Raises:
        UserError: There are not two or more.
    """
    candidates = row.fields.get("candidates")
    if not isinstance(candidates, list) or len(candidates) < 2:
        raise UserError(
            f"{row.place}: a row whose preferred answer is predicted has prompt and candidates, a "
            "list of two answers or more"
        )
    return candidates


def prompt_of(row: Row) -> Any:
    """What is continued or answered: a text, or the turns before the last one of the assistant.

    Raises:
        UserError: The row has none.
    """
    messages = row.fields.get("messages")
    if isinstance(messages, list) and messages:
        last = messages[-1]
        answered = isinstance(last, dict) and last.get("role") == "assistant"
        return messages[:-1] if answered else messages
    for name in ("prompt", "text"):
        value = row.fields.get(name)
        if isinstance(value, str):
            return value
    raise UserError(f"{row.place}: neither messages, nor prompt, nor text: nothing to continue")


def _softmax(values: np.ndarray) -> np.ndarray:
    """(k,) probabilities."""
    shifted = np.exp(values.astype(np.float64) - values.max())
    return shifted / shifted.sum()
