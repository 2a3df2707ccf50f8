"""Precision, recall and F1 per class, accuracy and macro-F1."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def class_report(
    truth: Sequence[int], picked: Sequence[Sequence[float]], labels: Sequence[object]
) -> dict[str, Any]:
    """Accuracy, macro-F1 and the scores of each class.

    A class that neither occurs nor is predicted has no F1 and does not count in the mean; one that
    occurs but is never predicted has an F1 of 0.

    Args:
        truth: True class of each example, as an index into `labels`.
        picked: The share of each class in the prediction of each example, as `accuracy.picks` gives
            it: 1 for the predicted class, 1/k for each of k that are tied.
        labels: The classes.

    Returns:
        "accuracy", "macro_f1", "rows" (the number of examples) and "classes": for each class its
        label, rows, predicted (how often it was), precision, recall and f1.

    >>> class_report([0, 0, 1], [[1, 0], [0, 1], [0, 1]], ["walk", "sit"])["macro_f1"]
    0.6666666666666666
    """
    pairs = list(zip(truth, picked, strict=True))
    classes: list[dict[str, Any]] = []
    for index, label in enumerate(labels):
        hits = _total(shares[index] for t, shares in pairs if t == index)
        num_true = sum(t == index for t, _ in pairs)
        num_predicted = _total(shares[index] for shares in picked)
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
        "accuracy": _total(shares[t] for t, shares in pairs) / len(pairs) if pairs else None,
        "macro_f1": sum(f1_scores) / len(f1_scores) if f1_scores else None,
        "rows": len(pairs),
        "classes": classes,
    }


def _total(shares: Iterable[float]) -> int | float:
    """The sum of the shares, an int unless ties make it a fraction."""
    total = math.fsum(shares)
    return int(total) if total.is_integer() else total
