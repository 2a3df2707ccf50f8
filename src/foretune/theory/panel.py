"""`Panel`: one question of an experiment, with its numbers, table, figure and answer in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Settings = Mapping[str, Any]
PanelRows = list[dict[str, Any]]  # the numbers of a panel, JSON values only


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        header: Column headers.
        rows: Cells of each line, one per column.
    """

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Panel:
    """One question of an experiment.

    Args:
        name: Name in the recipe's `panels` and of the file that holds the rows.
        title: Heading of the table.
        paper: What the paper states.
        here: How the numbers are computed here, and how that differs from the paper.
        rows: Computes the numbers from the recipe's settings.
        table: Formats the rows as a table.
        finding: States the result in a sentence or two, computed from the rows.
        figure: Draws the rows into a file; None for a panel without a figure.
    """

    name: str
    title: str
    paper: str
    here: str
    rows: Callable[[Settings], PanelRows]
    table: Callable[[PanelRows], Table]
    finding: Callable[[PanelRows], str]
    figure: Callable[[PanelRows, Path], None] | None = None


def numbers(values: Any) -> list[float]:
    """An array's values as a flat list of floats with six significant digits."""
    return [float(f"{value:.6g}") for value in np.ravel(values)]


def median(values: Sequence[float]) -> float:
    """The median as a float."""
    return float(np.median(values))


def short(value: float) -> str:
    """A number with at most three significant digits.

    >>> short(1.96e-5), short(42.67), short(0.1234), short(155.2)
    ('2.0e-05', '42.7', '0.123', '155')
    """
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def spread(values: Sequence[float]) -> str:
    """Median and range, usually over the seeds.

    >>> spread([1.0, 3.0, 2.0])
    '2 [1, 3]'
    """
    return f"{short(median(values))} [{short(min(values))}, {short(max(values))}]"
