"""How well each class is recognised: precision, recall, F1, and their mean over the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def class_report(
    truth: Sequence[int], predicted: Sequence[int], labels: Sequence[object]
) -> dict[str, Any]:
    """Accuracy, macro-F1 and each class's figures.

    A class that neither occurs nor is predicted has no F1 and does not count in the mean; one that
    occurs but is never predicted has 0.

    Args:
        truth: Right class of each row, as its place in `labels`.
        predicted: Predicted class, likewise.
        labels: The classes.

    Returns:
        "accuracy", "macro_f1", "rows" and "classes": label, rows, predicted, precision, recall, f1.

    >>> class_report([0, 0, 1], [0, 1, 1], ["walk", "sit"])["macro_f1"]
    0.6666666666666666
    """
    pairs = list(zip(truth, predicted, strict=True))
    classes: list[dict[str, Any]] = []
    for place, label in enumerate(labels):
        hits = sum(t == p == place for t, p in pairs)
        rows, said = sum(t == place for t, _ in pairs), sum(p == place for _, p in pairs)
        classes.append(
            {
                "label": label,
                "rows": rows,
                "predicted": said,
                "precision": hits / said if said else None,
                "recall": hits / rows if rows else None,
                "f1": 2 * hits / (rows + said) if rows + said else None,
            }
        )
    known = [c["f1"] for c in classes if c["f1"] is not None]
    return {
        "accuracy": sum(t == p for t, p in pairs) / len(pairs) if pairs else None,
        "macro_f1": sum(known) / len(known) if known else None,
        "rows": len(pairs),
        "classes": classes,
    }
