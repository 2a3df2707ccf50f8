"""`Figure`, a drawn SVG figure, and the style of each base in all figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from foretune.evaluation.report import svg
from foretune.evaluation.report.svg import Ink
from foretune.evaluation.report.view import View

NARROW = 480  # Below this width (pixels), labels move above their rows.


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Args:
        title: What it shows, for screen readers.
        description: What can be seen in it, for screen readers.
        width: Width in pixels.
        height: Height in pixels.
        body: The markup inside the svg element.
    """

    title: str
    description: str
    width: float
    height: float
    body: str

    def inline(self, key: str) -> str:
        """The svg element for the page; `key` is the prefix that makes its ids unique."""
        return self._element(key, self.body, (0, 0, self.width, self.height))

    def standalone(self, ink: Ink) -> str:
        """The content of an SVG file, with a visible title, a margin and a background."""
        side, above = 20.0, 52.0
        box = (-side, -above, self.width + 2 * side, self.height + above + side)
        ground = svg.tag(
            "rect", x=box[0], y=box[1], width=box[2], height=box[3], style=f"fill:{ink.paper}"
        )
        head = svg.text(svg.shorten(self.title, self.width, 15), 0, -20, ink.text, size=15)
        element = self._element(
            "figure", ground + head + self.body, box, xmlns="http://www.w3.org/2000/svg"
        )
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{element}\n'

    def _element(
        self,
        key: str,
        body: str,
        box: tuple[float, float, float, float],
        xmlns: str | None = None,
    ) -> str:
        return svg.tag(
            "svg",
            svg.tag("title", svg.content(self.title), id=f"{key}-title"),
            svg.tag("desc", svg.content(self.description), id=f"{key}-desc"),
            body,
            xmlns=xmlns,
            viewBox=" ".join(f"{edge:g}" for edge in box),
            width=box[2],
            height=box[3],
            role="img",
            aria_labelledby=f"{key}-title {key}-desc",
            style=f"font-family:{svg.FONT}",
        )


@dataclasses.dataclass(frozen=True)
class Style:
    """How a base is drawn: distinct with and without colour."""

    color: str
    dash: str
    marker: str
    fill: str


def styles(view: View, ink: Ink) -> dict[str, Style]:
    """One style per base; the unmodified model is always grey and dotted."""
    base_styles: dict[str, Style] = {}
    others = 0
    for name in view.names:
        if view.methods[name] == "none":
            base_styles[name] = Style(ink.series[0], svg.DASHES[0], svg.MARKERS[0], ink.paper)
            continue
        index = 1 + others % (len(ink.series) - 1)
        hollow = others >= len(ink.series) - 1
        others += 1
        color = ink.series[index]
        fill = ink.paper if hollow else color
        base_styles[name] = Style(color, svg.DASHES[index], svg.MARKERS[index], fill)
    return base_styles


def value_axis(
    domain: tuple[float, float], y: Callable[[float], float], right: float, factor: float, ink: Ink
) -> tuple[str, float]:
    """Horizontal grid lines with their numbers: (markup, left edge of the plot)."""
    ticks = [(svg.tick_text(tick, factor), y(tick)) for tick in svg.ticks(*domain)]
    left = max([38.0, *(svg.text_width(label, 12) for label, _ in ticks)]) + 8
    parts = []
    for label, at in ticks:
        parts.append(svg.line(left, at, right, at, ink.line))
        parts.append(svg.text(label, left - 8, at + 4, ink.muted, anchor="end", size=12))
    return "".join(parts), left


def legend(entries: Sequence[tuple[str, Style]], width: int, ink: Ink) -> tuple[str, float]:
    """Line samples with their labels in as many rows as needed: (markup, height)."""
    parts, x, y = [], 0.0, 14.0
    for name, style in entries:
        label = svg.shorten(name, width - 50)
        needed = 44 + svg.text_width(label) + 14
        if x > 0 and x + needed > width:
            x, y = 0.0, y + 22
        parts.append(svg.polyline([(x + 1, y - 4), (x + 35, y - 4)], style.color, dash=style.dash))
        parts.append(svg.marker(style.marker, x + 18, y - 4, style.color, style.fill))
        parts.append(svg.text(label, x + 43, y, ink.text))
        x += needed
    return "".join(parts), y + 8
