"""Which pictures a comparison has, by name."""

from __future__ import annotations

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
    """Every picture that the comparison has data for, by its file name."""
    found = {"few-shot-curves": few_shot_curves(view, width, ink)}
    for shots in view.shots:
        if view.against_controls(shots):
            found[forest_name(shots)] = forest(view, shots, width, ink)
    focus = view.focus()
    if focus is not None:
        found["task-differences"] = task_differences(view, focus, width, ink)
    if view.rank_scores():
        found["spectrum-scores"] = spectrum_scores(view, width, ink)
    if view.singular_values():
        found["singular-values"] = singular_values(view, width, ink)
    return found


def forest_name(shots: int | None) -> str:
    """The name of the picture of paired differences at `shots`."""
    return f"differences-{'all' if shots is None else shots}"
