"""Held-out scores during retraining: one line per retraining, in the style of its base."""

from __future__ import annotations

from foretune.evaluation.report import svg
from foretune.evaluation.report.figure import NARROW, Figure, legend, styles, value_axis
from foretune.evaluation.report.svg import Ink
from foretune.evaluation.report.view import View


def retraining_curves(view: View, width: int, ink: Ink) -> Figure:
    """Mean score after adapting to held-out tasks against the steps of retraining.

    Each repeat has a line of its own; a marker is on the state that was taken as the base.
    """
    curves, base_styles = view.retraining_curves(), styles(view, ink)
    names = [name for name in view.names if name in curves]
    points = [point for name in names for curve in curves[name] for point in curve.points]
    head, top = legend([(view.labels[name], base_styles[name]) for name in names], width, ink)
    top += 34.0
    bottom = top + (260.0 if width >= NARROW else 210.0)
    right = width - 10.0
    domain = svg.padded([score for _, score in points])
    y = svg.linear(domain, (bottom, top))
    grid, left = value_axis(domain, y, right, view.scale.factor, ink)
    last = max(step for step, _ in points)
    x = svg.linear((0.0, max(last, 1)), (left + 6, right - 6))
    parts = [head, svg.text(view.scale.axis, 0, top - 14, ink.muted, size=12), grid]
    most = min(int((right - left) / 45), last + 1)  # steps are whole numbers
    for tick in svg.ticks(0.0, max(last, 1), most=max(2, most)):
        label = svg.tick_text(tick, 1.0)
        parts.append(svg.text(label, x(tick), bottom + 18, ink.muted, anchor="middle", size=12))
    title = "steps of retraining"
    middle = (left + right) / 2
    parts.append(svg.text(title, middle, bottom + 38, ink.muted, anchor="middle", size=12))
    for name in names:
        style = base_styles[name]
        for curve in curves[name]:
            places = [(x(step), y(score)) for step, score in curve.points]
            parts.append(svg.polyline(places, style.color, dash=style.dash))
            if curve.chosen is not None:
                at = places[curve.chosen]
                parts.append(svg.marker(style.marker, *at, style.color, style.fill))
    return Figure(
        f"Mean {view.scale.metric} on held-out seen tasks during retraining",
        f"One line per retraining, {sum(len(curves[name]) for name in names)} in all; a marker is "
        "where its base was taken.",
        width,
        bottom + 46,
        "".join(parts),
    )
