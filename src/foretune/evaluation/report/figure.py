"""A drawn picture, and how the bases are told apart in all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from foretune.evaluation.report import svg
from foretune.evaluation.report.svg import Ink
from foretune.evaluation.report.view import View

NARROW = 480  # Below this width, labels move above their rows.


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawn picture.

    Args:
        title: What it shows, for those who cannot see it.
        description: What is to be seen in it.
        width: In pixels.
        height: In pixels.
        body: The markup inside the svg element.
    """

    title: str
    description: str
    width: float
    height: float
    body: str

    def inline(self, key: str) -> str:
        """The svg element for the page; `key` makes its ids unique there."""
        return self._element(key, self.body, (0, 0, self.width, self.height))

    def standalone(self, ink: Ink) -> str:
        """The same as a file of its own, with its title, a margin and the paper under it."""
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
    """How one base is told from the others, with and without colour."""

    color: str
    dash: str
    marker: str
    fill: str


def styles(view: View, ink: Ink) -> dict[str, Style]:
    """One style a base; the model as it is is always the grey dotted one."""
    found: dict[str, Style] = {}
    others = 0
    for name in view.names:
        if view.methods[name] == "none":
            found[name] = Style(ink.series[0], svg.DASHES[0], svg.MARKERS[0], ink.paper)
            continue
        index = 1 + others % (len(ink.series) - 1)
        hollow = others >= len(ink.series) - 1
        others += 1
        color = ink.series[index]
        fill = ink.paper if hollow else color
        found[name] = Style(color, svg.DASHES[index], svg.MARKERS[index], fill)
    return found


def value_axis(
    domain: tuple[float, float], y: Callable[[float], float], right: float, factor: float, ink: Ink
) -> tuple[str, float]:
    """Horizontal grid lines with their numbers; the markup and where the plot begins."""
    ticks = [(svg.tick_text(tick, factor), y(tick)) for tick in svg.ticks(*domain)]
    left = max([38.0, *(svg.text_width(label, 12) for label, _ in ticks)]) + 8
    parts = []
    for label, at in ticks:
        parts.append(svg.line(left, at, right, at, ink.line))
        parts.append(svg.text(label, left - 8, at + 4, ink.muted, anchor="end", size=12))
    return "".join(parts), left
