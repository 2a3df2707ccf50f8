"""Figures with one line per base: few-shot curves and the spectrum."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from foretune.evaluation.report import svg
from foretune.evaluation.report.figure import (
    NARROW,
    Figure,
    Style,
    legend,
    styles,
    value_axis,
)
from foretune.evaluation.report.svg import Ink
from foretune.evaluation.report.view import Mean, View
from foretune.evaluation.statistics import mean_interval


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart: a base with its points (column, mean), from left to right."""

    label: str
    style: Style
    points: Sequence[tuple[int, Mean]]


def few_shot_curves(view: View, width: int, ink: Ink) -> Figure:
    """Mean score with its interval against the number of shots, one line per base."""
    base_styles = styles(view, ink)
    series = [
        Series(
            view.labels[name],
            base_styles[name],
            [(i, view.means[name, k]) for i, k in enumerate(view.shots) if (name, k) in view.means],
        )
        for name in view.names
    ]
    leader = view.leader(view.judged)
    described = f"One line per base, {len(series)} in all; the table below holds the numbers."
    if leader is not None:
        at = view.shots_label(view.judged)
        described = f"At {at}, {view.labels[leader]} has the highest mean. {described}"
    names = ["0" if k == 0 else "all" if k is None else f"{k}" for k in view.shots]
    return _line_chart(
        [line for line in series if line.points],
        names,
        width,
        ink,
        title=f"Mean {view.scale.metric} on unseen tasks against the number of shots",
        description=described,
        x_title=f"{view.shots_unit} to adapt on" + " (0: before adapting)" * (0 in view.shots),
        y_title=view.scale.axis,
        factor=view.scale.factor,
        rule=(view.chance, "chance"),
    )


def spectrum_scores(view: View, width: int, ink: Ink) -> Figure:
    """Mean score with adapters of each rank, one line per base."""
    scores, base_styles = view.rank_scores(), styles(view, ink)
    ranks = sorted({rank for _, rank in scores})
    series = [
        Series(
            view.labels[name],
            base_styles[name],
            [
                (i, Mean(*mean_interval([[value] for value in scores[name, rank]])))
                for i, rank in enumerate(ranks)
                if (name, rank) in scores
            ],
        )
        for name in view.names
    ]
    return _line_chart(
        [line for line in series if line.points],
        [str(rank) for rank in ranks],
        width,
        ink,
        title=f"Mean {view.scale.metric} against the rank of the adapters",
        description="A line that is high on the left belongs to a base that needs little change.",
        x_title="rank",
        y_title=view.scale.axis,
        factor=view.scale.factor,
    )


def singular_values(view: View, width: int, ink: Ink) -> Figure:
    """Mean singular values of the changes by full fine-tuning, one line per base."""
    curves, base_styles = view.singular_values(), styles(view, ink)
    longest = max(len(curve) for curve in curves.values())
    series = [
        Series(
            view.labels[name],
            base_styles[name],
            [(i, Mean(v, v, v)) for i, v in enumerate(curves[name])],
        )
        for name in view.names
        if name in curves
    ]
    label_step = max(1, -(-longest // (16 if width >= NARROW else 8)))
    return _line_chart(
        series,
        [str(i + 1) if i % label_step == 0 else "" for i in range(longest)],
        width,
        ink,
        title="Singular values of the tasks' changes relative to the largest",
        description="A line that falls fast belongs to changes of low rank.",
        x_title="index, averaged over modules and tasks",
        y_title="share of the largest",
        factor=1.0,
        dodge=0.0,
    )


def _line_chart(
    series: Sequence[Series],
    columns: Sequence[str],
    width: int,
    ink: Ink,
    *,
    title: str,
    description: str,
    x_title: str,
    y_title: str,
    factor: float,
    rule: tuple[float | None, str] = (None, ""),
    dodge: float = 7.0,
) -> Figure:
    """Lines over evenly spaced columns, with intervals, a legend above and labelled axes."""
    head, top = legend([(line.label, line.style) for line in series], width, ink)
    top += 34.0
    bottom = top + (300.0 if width >= NARROW else 230.0)
    right = width - 10.0
    domain = svg.padded([v for line in series for _, m in line.points for v in (m.low, m.high)])
    y = svg.linear(domain, (bottom, top))
    grid, left = value_axis(domain, y, right, factor, ink)
    step = (right - left) / len(columns)
    parts = [head, svg.text(y_title, 0, top - 14, ink.muted, size=12), grid]
    for index, label in enumerate(columns):
        x = left + step * (index + 0.5)
        parts.append(svg.text(label, x, bottom + 18, ink.muted, anchor="middle", size=12))
    middle = (left + right) / 2
    parts.append(svg.text(x_title, middle, bottom + 38, ink.muted, anchor="middle", size=12))
    level, name = rule
    if level is not None and domain[0] <= level <= domain[1]:
        parts.append(svg.line(left, y(level), right, y(level), ink.muted, dash="1 3"))
        parts.append(
            svg.text(name, right, y(level) - 5, ink.muted, anchor="end", size=12, halo=ink.paper)
        )
    # Points of one column are drawn side by side, so that their intervals do not overlap.
    if len(columns) == 1:
        dodge *= 6
    dodge = min(dodge, 0.6 * step / len(series))
    for index, line in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * dodge
        places = [(left + step * (i + 0.5) + shift, mean) for i, mean in line.points]
        parts.append(_draw_line(places, line.style, y))
    return Figure(title, description, width, bottom + 46, "".join(parts))


def _draw_line(
    places: Sequence[tuple[float, Mean]], style: Style, y: Callable[[float], float]
) -> str:
    bars = [
        svg.line(x, y(mean.low), x, y(mean.high), style.color, width=1.5)
        for x, mean in places
        if mean.high > mean.low
    ]
    through = svg.polyline([(x, y(m.mean)) for x, m in places], style.color, dash=style.dash)
    dots = [svg.marker(style.marker, x, y(m.mean), style.color, style.fill) for x, m in places]
    return "".join([*bars, through, *dots])
