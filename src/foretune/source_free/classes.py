"""Precision, recall and F1 per class, accuracy and macro-F1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def class_report(
    truth: Sequence[int], predicted: Sequence[int], labels: Sequence[object]
) -> dict[str, Any]:
    """Accuracy, macro-F1 and the scores of each class.

    A class that neither occurs nor is predicted has no F1 and does not count in the mean; one that
    occurs but is never predicted has an F1 of 0.

    Args:
        truth: True class of each example, as an index into `labels`.
        predicted: Predicted class of each example, likewise.
        labels: The classes.

    Returns:
        "accuracy", "macro_f1", "rows" (the number of examples) and "classes": for each class its
        label, rows, predicted (how often it was), precision, recall and f1.

    >>> class_report([0, 0, 1], [0, 1, 1], ["walk", "sit"])["macro_f1"]
    0.6666666666666666
    """
    pairs = list(zip(truth, predicted, strict=True))
    classes: list[dict[str, Any]] = []
    for index, label in enumerate(labels):
        hits = sum(t == p == index for t, p in pairs)
        num_true = sum(t == index for t, _ in pairs)
        num_predicted = sum(p == index for _, p in pairs)
        classes.append(
            {
                "label": label,
                "rows": num_true,
                "predicted": num_predicted,
                "precision": hits / num_predicted if num_predicted else None,
                "recall": hits / num_true if num_true else None,
                "f1": 2 * hits / (num_true + num_predicted) if num_true + num_predicted else None,
            }
        )
    f1_scores = [c["f1"] for c in classes if c["f1"] is not None]
    return {
        "accuracy": sum(t == p for t, p in pairs) / len(pairs) if pairs else None,
        "macro_f1": sum(f1_scores) / len(f1_scores) if f1_scores else None,
        "rows": len(pairs),
        "classes": classes,
    }
