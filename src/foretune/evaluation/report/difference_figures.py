"""Figures of paired differences: against the controls, and task by task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from foretune.evaluation.report import svg
from foretune.evaluation.report.figure import NARROW, Figure, Style, styles, value_axis
from foretune.evaluation.report.svg import Ink
from foretune.evaluation.report.view import View
from foretune.evaluation.verdict import Contrast

NAMED_TASKS = 40  # With more, tasks are drawn as a strip without names.
BOLD = 1.06  # Width of bold text relative to regular text.


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """Layout of the rows of a forest plot, in pixels.

    Args:
        stacked: Whether the label is above its interval, not beside it.
        left: Left edge of the plot.
        right: Right edge of the plot.
        height: Height of a row.
    """

    stacked: bool
    left: float
    right: float
    height: float


def forest(view: View, shots: int | None, width: int, ink: Ink) -> Figure:
    """Paired differences against each control with their intervals, at one number of shots."""
    groups = view.against_controls(shots)
    # The same scale for all numbers of shots makes their plots comparable.
    all_pairs = [
        pair for k in view.shots for _, members in view.against_controls(k) for pair in members
    ]
    domain = svg.padded([0.0, *(v for pair in all_pairs for v in (pair.low, pair.high))])
    layout = _row_layout(view, all_pairs, width)
    x = svg.linear(domain, (layout.left + 6, layout.right - 6))
    base_styles = styles(view, ink)
    parts: list[str] = []
    y = 6.0
    for b, members in groups:
        title = svg.shorten(f"over {view.rival(b)}", width * 0.93)
        parts.append(svg.text(title, 0, y + 18, ink.text, weight=650, halo=ink.paper))
        y += 24
        for pair in members:
            parts.append(_forest_row(view, pair, base_styles[pair.a], x, y, layout, width, ink))
            y += layout.height
        y += 10
    axis = _bottom_axis(view, x, domain, (layout.left, layout.right), 10.0, y, ink)
    return Figure(
        f"Paired differences in {view.scale.metric}, {view.shots_label(shots)}",
        "Each row is a base's mean difference with its 95 % interval; filled markers are clear.",
        width,
        y + 44,
        axis + "".join(parts),
    )


def _row_layout(view: View, pairs: Sequence[Contrast], width: int) -> RowLayout:
    labels = max(svg.text_width(view.labels[pair.a]) for pair in pairs) + 20
    numbers = max(svg.text_width(view.difference_text(pair)) for pair in pairs) * BOLD + 10
    if width < NARROW or labels + numbers > 0.6 * width:
        return RowLayout(stacked=True, left=8.0, right=width - 8.0, height=38.0)
    return RowLayout(stacked=False, left=labels, right=width - numbers, height=26.0)


def _forest_row(
    view: View,
    pair: Contrast,
    style: Style,
    x: Callable[[float], float],
    top: float,
    layout: RowLayout,
    width: int,
    ink: Ink,
) -> str:
    clear = pair.better or pair.worse
    weight = 650 if clear else 400
    label, numbers = view.labels[pair.a], view.difference_text(pair)
    y = top + (layout.height - 10 if layout.stacked else layout.height / 2)
    baseline = y - 10 if layout.stacked else y + 4.5
    room = width - svg.text_width(numbers, 12) * BOLD - 16 if layout.stacked else layout.left
    size = 12 if layout.stacked else 13
    return "".join(
        (
            svg.text(svg.shorten(label, room), 8, baseline, ink.text, halo=ink.paper),
            svg.text(
                numbers,
                *(width, baseline, ink.text),
                anchor="end",
                size=size,
                weight=weight,
                halo=ink.paper,
            ),
            svg.line(x(pair.low), y, x(pair.high), y, style.color, width=2),
            svg.marker(
                style.marker,
                *(x(pair.difference), y, style.color),
                style.color if clear else ink.paper,
            ),
        )
    )


def task_differences(view: View, focus: Contrast, width: int, ink: Ink) -> Figure:
    """Per-task differences between two bases, sorted; bars with names as long as they fit."""
    differences = view.task_differences(focus.a, focus.b, view.judged)
    title = f"{view.labels[focus.a]} minus {view.rival(focus.b)}, task by task"
    described = f"{focus.wins} tasks above zero, {focus.losses} below, {focus.ties} equal."
    draw = _named_bars if len(differences) <= NAMED_TASKS else _strip
    body, height = draw(view, differences, styles(view, ink)[focus.a].color, width, ink)
    return Figure(title, described, width, height, body)


def _named_bars(
    view: View, differences: Sequence[tuple[str, float]], color: str, width: int, ink: Ink
) -> tuple[str, float]:
    domain = svg.padded([0.0, *(value for _, value in differences)])
    widest = max(svg.text_width(task, 12) for task, _ in differences) + 14
    numbers = max(svg.text_width(view.scale.signed(value), 12) for _, value in differences)
    left, right = min(widest, width * 0.36), width - numbers - 16
    x = svg.linear(domain, (left, right))
    parts = []
    for index, (task, value) in enumerate(differences):
        y = 14.0 + 18 * index
        fill = color if value > 0 else ink.paper
        label = svg.tag("title", svg.content(task)) + svg.text(
            svg.shorten(task, left - 10, 12), left - 10, y + 4, ink.text, anchor="end", size=12
        )
        bar = svg.line(x(0), y, x(value), y, color, width=2) if value else ""
        dot = svg.marker("circle", x(value), y, color, fill, size=3.5)
        number = svg.text(view.scale.signed(value), width, y + 4, ink.muted, anchor="end", size=12)
        parts.append(svg.tag("g", label, bar, dot, number))
    bottom = 14.0 + 18 * len(differences)
    axis = _bottom_axis(view, x, domain, (left, right), 2.0, bottom, ink)
    return axis + "".join(parts), bottom + 44


def _strip(
    view: View, differences: Sequence[tuple[str, float]], color: str, width: int, ink: Ink
) -> tuple[str, float]:
    height, top = 260.0, 26.0
    domain = svg.padded([0.0, *(value for _, value in differences)])
    y = svg.linear(domain, (height - 34, top))
    grid, left = value_axis(domain, y, width, view.scale.factor, ink)
    step = (width - left - 4) / len(differences)
    parts = [svg.text(view.scale.difference_axis, 0, 13, ink.muted, size=12), grid]
    for index, (task, value) in enumerate(differences):
        top_edge, bottom_edge = sorted((y(value), y(0)))
        opacity = 1 if value > 0 else 0.45
        bar = svg.tag(
            "rect",
            svg.tag("title", svg.content(f"{task}: {view.scale.signed(value)}")),
            x=left + step * index,
            y=top_edge,
            width=max(step * 0.82, 0.4),
            height=max(bottom_edge - top_edge, 0.5),
            style=f"fill:{color};fill-opacity:{opacity}",
        )
        parts.append(bar)
    parts.append(svg.line(left, y(0), width, y(0), ink.muted))
    note = f"{len(differences)} tasks, sorted"
    parts.append(svg.text(note, width, height - 10, ink.muted, anchor="end", size=12))
    return "".join(parts), height


def _bottom_axis(
    view: View,
    x: Callable[[float], float],
    domain: tuple[float, float],
    span: tuple[float, float],
    top: float,
    bottom: float,
    ink: Ink,
) -> str:
    """Vertical grid lines (a stronger one at zero), with numbers and a title below."""
    parts = []
    for tick in svg.ticks(*domain, most=max(3, int((span[1] - span[0]) / 55))):
        color = ink.muted if tick == 0 else ink.line
        parts.append(svg.line(x(tick), top, x(tick), bottom, color))
        label = svg.tick_text(tick, view.scale.factor)
        parts.append(svg.text(label, x(tick), bottom + 16, ink.muted, anchor="middle", size=12))
    title = f"difference, {view.scale.difference_axis}"
    middle = (span[0] + span[1]) / 2
    parts.append(svg.text(title, middle, bottom + 36, ink.muted, anchor="middle", size=12))
    return "".join(parts)
