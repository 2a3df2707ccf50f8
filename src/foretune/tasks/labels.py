"""Which labels are the same, and in which order they are numbered.

A label is identified by its text, as a task is by its name: 1, 1.0, True and "1" are one label, and
so are two Unicode spellings (NFC and NFD) of the same letters; white space around it does not
count. A set of labels holds each of them once, as a number if any row has it as a number.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from foretune.tasks.example import Example

Label = str | int | float


def plain_label(label: Label) -> Label:
    r"""The label in the form that tells it from others: a whole number, or stripped text in NFC.

    >>> plain_label(True), plain_label(2.0), plain_label("cafe\u0301 ") == "caf\u00e9"
    (1, 2, True)
    """
    if isinstance(label, str):
        return unicodedata.normalize("NFC", label.strip())
    return int(label) if float(label).is_integer() else label


@functools.lru_cache(maxsize=4096)
def label_text(label: Label) -> str:
    """The text that identifies a label.

    >>> label_text(1), label_text("1"), label_text(1.5)
    ('1', '1', '1.5')
    """
    return str(plain_label(label))


def sort_labels(labels: Iterable[Label]) -> tuple[Label, ...]:
    """The distinct labels: numbers by value, then texts in alphabetical order.

    >>> sort_labels(["b", 10, "1", 9, 1, "a"])
    (1, 9, 10, 'a', 'b')
    """
    distinct: dict[str, Label] = {}
    for label in map(plain_label, dict.fromkeys(labels)):
        if not isinstance(label, str) or str(label) not in distinct:
            distinct[str(label)] = label
    return tuple(sorted(distinct.values(), key=lambda v: (isinstance(v, str), v)))


@functools.lru_cache(maxsize=4096)
def label_places(labels: tuple[Label, ...]) -> Mapping[str, int]:
    """The index of each label, by the text that identifies it."""
    return {label_text(label): index for index, label in reversed(list(enumerate(labels)))}


def label_of(example: Example) -> str:
    """The text that identifies the label of a labelled example."""
    import numpy as np

    return label_text(example["label"] if "label" in example else np.asarray(example["y"]).item())


def shown(labels: Sequence[Any], most: int = 10) -> str:
    """The first `most` labels and the number of further ones, for an error message."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + more
