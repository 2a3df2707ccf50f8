"""The figures of a comparison, by file name."""

from __future__ import annotations

from foretune.evaluation.report.curve_figure import retraining_curves
from foretune.evaluation.report.difference_figures import forest, task_differences
from foretune.evaluation.report.figure import Figure
from foretune.evaluation.report.line_figures import (
    few_shot_curves,
    singular_values,
    spectrum_scores,
)
from foretune.evaluation.report.svg import Ink
from foretune.evaluation.report.view import View


def all_figures(view: View, width: int, ink: Ink) -> dict[str, Figure]:
    """All figures that the comparison has data for, by file name."""
    figures = {"few-shot-curves": few_shot_curves(view, width, ink)}
    for shots in view.shots:
        if view.against_controls(shots):
            figures[forest_name(shots)] = forest(view, shots, width, ink)
    focus = view.focus()
    if focus is not None:
        figures["task-differences"] = task_differences(view, focus, width, ink)
    if view.retraining_curves():
        figures["retraining-curves"] = retraining_curves(view, width, ink)
    if view.rank_scores():
        figures["spectrum-scores"] = spectrum_scores(view, width, ink)
    if view.singular_values():
        figures["singular-values"] = singular_values(view, width, ink)
    return figures


def forest_name(shots: int | None) -> str:
    """The file name of the figure of paired differences at `shots`."""
    return f"differences-{'all' if shots is None else shots}"
