"""What a prediction adds to a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from foretune.errors import UserError
from foretune.files import LABELS_FILE
from foretune.formats import read_json
from foretune.models.surgery import head_labels, head_width
from foretune.recipes.questions import Question

PREDICTION = "prediction"
OF_LABELS = (PREDICTION, "probability", "probabilities")
OF_CANDIDATES = (PREDICTION, "prediction_index", "probability", "scores")
COLUMNS = {  # kind of objective → the columns that are added
    "classification": OF_LABELS,
    "prompts": OF_LABELS,
    "choice": OF_CANDIDATES,
    "preference": OF_CANDIDATES,
    "regression": (PREDICTION,),
    "causal-lm": (PREDICTION,),
}
Prediction = dict[str, Any]  # the columns that are added to a row


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


def output_labels(folder: Path, model: nn.Module) -> list[Any]:
    """The label of each output of a task's head; None where it is none of the task's.

    Raises:
        UserError: The record is damaged.
    """
    file = folder / LABELS_FILE
    if file.is_file():
        labels = read_json(file, list[str | int | float | None])
        if all(label is None for label in labels):
            raise UserError(f"{file} is damaged: it names no label")
        return labels
    names = head_labels(model)
    return list(names) if names is not None else list(range(head_width(model) or 0))


def _softmax(values: np.ndarray) -> np.ndarray:
    """(k,) probabilities."""
    shifted = np.exp(values.astype(np.float64) - values.max())
    return shifted / shifted.sum()
