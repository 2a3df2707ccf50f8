"""Building blocks of the SVG figures: tags, colours, markers, scales and ticks."""

from __future__ import annotations

import dataclasses
import math
import unicodedata
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape, quoteattr

from foretune.printable import printable


@dataclasses.dataclass(frozen=True)
class Ink:
    """Colours of a figure.

    Args:
        text: Colour of labels.
        muted: Colour of notes and of numbers at axes.
        line: Colour of grid lines.
        paper: Colour of the background and inside hollow markers.
        series: Colours of the bases, the unmodified model first.
    """

    text: str
    muted: str
    line: str
    paper: str
    series: tuple[str, ...]


LIGHT = Ink(
    text="#1f2328",
    muted="#5b626b",
    line="#dfdcd5",
    paper="#ffffff",
    series=("#6b7079", "#1f5fa8", "#c2410c", "#237a4b", "#7c3fa8", "#0e7490", "#a3246b", "#846400"),
)
DARK = Ink(
    text="#e8e6e1",
    muted="#a3a8b0",
    line="#363a41",
    paper="#17191c",
    series=("#a0a5ae", "#7db3f0", "#ff9a62", "#6fcf97", "#c79bf0", "#5cc8dc", "#f28bc0", "#d9b84a"),
)
PAGE = Ink(
    text="var(--text)",
    muted="var(--muted)",
    line="var(--line)",
    paper="var(--paper)",
    series=tuple(f"var(--series-{index})" for index in range(len(LIGHT.series))),
)
DASHES = ("2 3", "7 4", "", "7 3 2 3", "12 4", "1 4", "4 2", "9 2 2 2 2 2")
MARKERS = ("circle", "square", "diamond", "up", "down", "plus", "cross", "bar")
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def content(text: object) -> str:
    """Text escaped as markup."""
    return escape(printable(str(text)))


def tag(name: str, *children: str, **attributes: object) -> str:
    """One element; children are markup, attributes are escaped and `_` becomes a hyphen."""
    markup = "".join(
        f" {key.strip('_').replace('_', '-')}={quoteattr(_value(value))}"
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{markup}>{''.join(children)}</{name}>" if children else f"<{name}{markup}/>"


def _value(value: object) -> str:
    return (
        f"{value:.2f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else printable(str(value))
    )


def text(
    written: object,
    x: float,
    y: float,
    ink: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: int = 400,
    halo: str = "",
) -> str:
    """A line of text with its baseline at y; a halo keeps it readable over lines."""
    style = f"fill:{ink};font-size:{size}px;font-weight:{weight}"
    if halo:
        style += f";stroke:{halo};stroke-width:5px;stroke-linejoin:round;paint-order:stroke"
    return tag("text", content(written), x=x, y=y, text_anchor=anchor, style=style)


def line(
    x1: float, y1: float, x2: float, y2: float, ink: str, *, width: float = 1, dash: str = ""
) -> str:
    """A straight line."""
    style = f"stroke:{ink};stroke-width:{width:g}" + (f";stroke-dasharray:{dash}" if dash else "")
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, style=style)


def polyline(points: Sequence[tuple[float, float]], ink: str, *, dash: str = "") -> str:
    """A line through points."""
    style = f"fill:none;stroke:{ink};stroke-width:2;stroke-linejoin:round"
    style += f";stroke-dasharray:{dash}" if dash else ""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), style=style)


def marker(kind: str, x: float, y: float, ink: str, fill: str, *, size: float = 4.5) -> str:
    """A marker around (x, y); `kind` is one of MARKERS."""
    style = f"fill:{fill};stroke:{ink};stroke-width:2"
    if kind == "circle":
        return tag("circle", cx=x, cy=y, r=size, style=style)
    s = size
    corners = {
        "square": [(-s, -s), (s, -s), (s, s), (-s, s)],
        "diamond": [(0, -1.3 * s), (1.3 * s, 0), (0, 1.3 * s), (-1.3 * s, 0)],
        "up": [(0, -1.2 * s), (1.2 * s, s), (-1.2 * s, s)],
        "down": [(0, 1.2 * s), (1.2 * s, -s), (-1.2 * s, -s)],
        "bar": [(-1.3 * s, -0.4 * s), (1.3 * s, -0.4 * s), (1.3 * s, 0.4 * s), (-1.3 * s, 0.4 * s)],
    }
    if kind in corners:
        points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners[kind])
        return tag("polygon", points=points, style=style)
    path = f"M{x - s:.1f} {y:.1f}h{2 * s:g}M{x:.1f} {y - s:.1f}v{2 * s:g}"
    turn = f"rotate(45 {x:.1f} {y:.1f})" if kind == "cross" else None
    return tag("path", d=path, transform=turn, style=style)


def text_width(written: str, size: int = 13) -> float:
    """A generous estimate of a text's width in pixels, whatever the font."""
    return sum(_glyph_width(glyph) for glyph in written) * size


def _glyph_width(glyph: str) -> float:
    if glyph in "iljtfrI.,:;'|()[] ":
        return 0.4
    if glyph in "mwMW@%" or unicodedata.east_asian_width(glyph) in "WF":
        return 1.0
    return 0.72 if glyph.isupper() else 0.62


def shorten(written: str, width: float, size: int = 13) -> str:
    """The text, truncated with an ellipsis if it is wider than `width` pixels."""
    if text_width(written, size) <= width:
        return written
    while len(written) > 1 and text_width(written + "…", size) > width:
        written = written[:-1]
    return written.rstrip() + "…"


def linear(domain: tuple[float, float], pixels: tuple[float, float]) -> Callable[[float], float]:
    """The linear map from the domain to pixels."""
    (low, high), (first, last) = domain, pixels
    return lambda value: first + (value - low) / (high - low) * (last - first)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """As many evenly spaced round numbers between low and high as there can be, at most `most`.

    >>> ticks(0.31, 0.52), ticks(61.0, 86.0)
    ([0.35, 0.4, 0.45, 0.5], [65.0, 70.0, 75.0, 80.0, 85.0])
    """
    power = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    for step in (power * nice for nice in (1, 2, 2.5, 5, 10, 20, 25, 50, 100)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of the values with a margin on both sides, never empty."""
    low, high = min(values), max(values)
    margin = (high - low) * share or abs(high) * share or 1.0
    return low - margin, high + margin


def tick_text(value: float, factor: float) -> str:
    """The label of a tick in the unit of the metric."""
    return f"{value * factor:g}".replace("-", "−")
