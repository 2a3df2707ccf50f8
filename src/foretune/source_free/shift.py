"""A standalone HTML page: F1 per class before and after adaptation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foretune.evaluation.report import svg
from foretune.evaluation.report.figure import Figure
from foretune.evaluation.report.svg import LIGHT, Ink
from foretune.files import write_whole

ROW, TOP, WIDTH = 30.0, 16.0, 640.0


def shift_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[str]]:
    """Rows (label, rows, F1 before, F1 after, difference) per class, then macro-F1 and accuracy."""
    pairs = [
        (str(b["label"]), b["rows"], b["f1"], a["f1"])
        for b, a in zip(before["classes"], after["classes"], strict=True)
    ]
    pairs.append(("macro-F1", before["rows"], before["macro_f1"], after["macro_f1"]))
    pairs.append(("accuracy", before["rows"], before["accuracy"], after["accuracy"]))
    return [[label, str(rows), *_figures(b, a)] for label, rows, b, a in pairs]


def _figures(before: float | None, after: float | None) -> list[str]:
    shown = ["-" if value is None else f"{value:.3f}" for value in (before, after)]
    if before is None or after is None:
        return [*shown, "-"]
    return [*shown, f"{after - before:+.3f}".replace("-", "−")]


def shift_figure(before: Mapping[str, Any], after: Mapping[str, Any], ink: Ink) -> Figure:
    """A figure with one line per class, from its F1 before (hollow) to its F1 after (filled)."""
    classes = list(zip(before["classes"], after["classes"], strict=True))
    left = 16 + max(svg.text_width(svg.shorten(str(b["label"]), 160)) for b, _ in classes)
    x = svg.linear((0.0, 1.0), (left, WIDTH - 16))
    bottom = TOP + ROW * len(classes)
    parts = [svg.line(x(v), TOP, x(v), bottom, ink.line) for v in (0, 0.25, 0.5, 0.75, 1)]
    parts += [
        svg.text(f"{v:g}", x(v), bottom + 18, ink.muted, anchor="middle", size=12)
        for v in (0, 0.25, 0.5, 0.75, 1)
    ]
    for index, (b, a) in enumerate(classes):
        y = TOP + ROW * (index + 0.5)
        label = svg.shorten(str(b["label"]), 160)
        parts.append(svg.text(label, left - 10, y + 4, ink.text, anchor="end"))
        if b["f1"] is None or a["f1"] is None:
            continue
        colour = ink.series[3] if a["f1"] >= b["f1"] else ink.series[2]
        parts.append(svg.line(x(b["f1"]), y, x(a["f1"]), y, colour, width=3))
        parts.append(svg.marker("circle", x(b["f1"]), y, colour, ink.paper))
        parts.append(svg.marker("circle", x(a["f1"]), y, colour, colour))
    return Figure(
        title="F1 per class before (hollow) and after (filled) adaptation",
        description="; ".join(
            f"{row[0]} {row[2]} to {row[3]}" for row in shift_rows(before, after)
        ),
        width=WIDTH,
        height=bottom + 28,
        body="".join(parts),
    )


def write_shift(
    path: Path, title: str, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Writes one self-contained HTML file with the figure and the table."""
    figure = shift_figure(before, after, LIGHT)
    head = ["class", "rows", "F1 before", "F1 after", "difference"]
    body = "".join(_row("td", row) for row in shift_rows(before, after))
    style = (
        f"body{{font-family:{svg.FONT};color:{LIGHT.text};max-width:44rem;margin:2rem auto;"
        "padding:0 1rem}svg{max-width:100%;height:auto}table{border-collapse:collapse}"
        "td,th{text-align:right;padding:.2rem .8rem}td:first-child,th:first-child{text-align:left}"
        f"td{{border-top:1px solid {LIGHT.line}}}"
    )
    write_whole(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="generator" content="foretune">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{svg.content(title)}</title><style>{style}</style></head><body>"
        f"<h1>{svg.content(title)}</h1><p>{svg.content(figure.title)}.</p>"
        f"{figure.inline('shift')}<table>{_row('th', head)}{body}</table></body></html>\n",
    )


def _row(cell: str, values: Sequence[str]) -> str:
    return svg.tag("tr", *[svg.tag(cell, svg.content(value)) for value in values])
