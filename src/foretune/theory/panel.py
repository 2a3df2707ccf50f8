"""`Panel`: one question of an experiment, its numbers, table, figure and answer in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Settings = Mapping[str, Any]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Columns of text under a title."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Panel:
    """One question of an experiment.

    Args:
        name: In the recipe's `panels`, and of the file that holds its rows.
        title: Heading of the table.
        paper: What the paper says.
        here: How the numbers are made here, and what differs.
        rows: The numbers, from the recipe's settings: JSON values only.
        table: The rows as text.
        finding: What the rows say, in a sentence or two, computed from them.
        figure: Draws the rows into a file, if there is anything to draw.
    """

    name: str
    title: str
    paper: str
    here: str
    rows: Callable[[Settings], Rows]
    table: Callable[[Rows], Table]
    finding: Callable[[Rows], str]
    figure: Callable[[Rows, Path], None] | None = None


def numbers(values: Any) -> list[float]:
    """Values as JSON holds them, with six digits."""
    return [float(f"{value:.6g}") for value in np.ravel(values)]


def median(values: Sequence[float]) -> float:
    """The median, of the raw values that a row keeps."""
    return float(np.median(values))


def short(value: float) -> str:
    """Three digits at most.

    >>> short(1.96e-5), short(42.67), short(0.1234), short(155.2)
    ('2.0e-05', '42.7', '0.123', '155')
    """
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def spread(values: Sequence[float]) -> str:
    """Median and range over the seeds.

    >>> spread([1.0, 3.0, 2.0])
    '2 [1, 3]'
    """
    return f"{short(median(values))} [{short(min(values))}, {short(max(values))}]"
