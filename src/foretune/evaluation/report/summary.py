"""The comparison as a small table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foretune.evaluation.report.view import View


def summary_rows(comparison: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """One row per base: its means, and its differences from the controls at the judged shots.

    Args:
        comparison: The content of `comparison.json`.

    Returns:
        The header, and rows with as many cells, in plain text: a label may contain any character,
        so escape it for a terminal that reads markup. An empty cell was not measured.
    """
    view = View(comparison)
    at = view.shots_label(view.judged)
    header = [f"mean {view.scale.axis}", *(view.shots_label(shots) for shots in view.shots)]
    header += [f"over {view.rival(control)}, {at}" for control in view.controls]
    rows = []
    for name in view.names:
        row = [view.labels[name]]
        for shots in view.shots:
            mean = view.means.get((name, shots))
            row.append("" if mean is None else view.scale.level(mean.mean))
        for control in view.controls:
            pair = None if control == name else view.contrast(name, control, view.judged)
            row.append("" if pair is None else view.difference_text(pair))
        rows.append(row)
    return header, rows
