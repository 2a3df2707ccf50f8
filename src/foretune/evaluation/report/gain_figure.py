"""The gain of one base over another against what was measured before training, by collection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import product

from foretune.evaluation.report import svg
from foretune.evaluation.report.figure import NARROW, Figure, value_axis
from foretune.evaluation.report.svg import Ink
from foretune.evaluation.report.view import Mean

Box = tuple[float, float, float, float]  # left, top, right, bottom

SIZE = 12  # of the names, in pixels


@dataclasses.dataclass(frozen=True)
class Collection:
    """A collection of tasks in the figure.

    Args:
        label: Its name.
        predicted: What was measured before training, with its interval.
        gain: What was gained, with its interval.
    """

    label: str
    predicted: Mean
    gain: Mean

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the gain excludes zero."""
        return self.gain.low > 0 or self.gain.high < 0


def gain_against_conflict(
    collections: Sequence[Collection],
    width: int,
    ink: Ink,
    *,
    x_title: str,
    y_title: str,
    title: str = "Gain against measured conflict",
    x_factor: float = 100.0,
    y_factor: float = 100.0,
) -> Figure:
    """A point with both intervals and its name per collection; filled where the gain is clear.

    A narrow figure has numbers at its points, and their names below.

    Args:
        collections: At least one.
        width: Width in pixels.
        ink: Colours.
        x_title: What was measured before training, with its unit.
        y_title: What was gained, with its unit.
        title: What the figure shows, for screen readers.
        x_factor: Factor between a measured value and its written number.
        y_factor: Factor between a gain and its written number.

    Raises:
        ValueError: There are no collections.
    """
    if not collections:
        raise ValueError("a figure of gains needs at least one collection")
    x_domain = svg.padded([0.0, *_ends([c.predicted for c in collections])])
    y_domain = svg.padded([0.0, *_ends([c.gain for c in collections])])
    top, bottom = 34.0, 34.0 + (380.0 if width >= NARROW else 300.0)
    right = width - 8.0
    y = svg.linear(y_domain, (bottom, top))
    grid, left = value_axis(y_domain, y, right, y_factor, ink)
    x = svg.linear(x_domain, (left + 4, right - 4))
    parts = [svg.text(y_title, 0, 14, ink.muted, size=SIZE), grid]
    parts.append(svg.line(left, y(0), right, y(0), ink.muted))
    for tick in svg.ticks(*x_domain, most=max(3, int((right - left) / 60))):
        parts.append(svg.line(x(tick), bottom, x(tick), bottom + 5, ink.muted))
        label = svg.tick_text(tick, x_factor)
        parts.append(svg.text(label, x(tick), bottom + 19, ink.muted, anchor="middle", size=SIZE))
    middle = (left + right) / 2
    parts.append(svg.text(x_title, middle, bottom + 39, ink.muted, anchor="middle", size=SIZE))
    parts += [_cross(collection, x, y, ink) for collection in collections]
    places = [(x(c.predicted.mean), y(c.gain.mean)) for c in collections]
    lines = [box for c in collections for box in _bars(c, x, y)]
    room = (left, top - 12, right, bottom)
    labels = [collection.label for collection in collections]
    below, height = "", 0.0
    if width < NARROW:
        below, height = _numbered(labels, bottom + 62, width, ink)
        labels = [str(number + 1) for number in range(len(labels))]
    parts += [*_names(labels, places, lines, room, ink), below]
    clear = sum(collection.is_clear for collection in collections)
    described = (
        f"{len(collections)} collections; {clear} of the gains have an interval without zero and "
        "are filled."
    )
    return Figure(title, described, width, bottom + 46 + height, "".join(parts))


def _numbered(labels: Sequence[str], top: float, width: int, ink: Ink) -> tuple[str, float]:
    """The names with their numbers, in as many rows as needed: (markup, height)."""
    parts, x, y = [], 0.0, top
    for number, label in enumerate(labels):
        shown = svg.shorten(f"{number + 1} {label}", width, SIZE)
        needed = svg.text_width(shown, SIZE) + 14
        if x > 0 and x + needed > width:
            x, y = 0.0, y + 18
        parts.append(svg.text(shown, x, y, ink.text, size=SIZE))
        x += needed
    return "".join(parts), y + 8 - top


def _ends(means: Sequence[Mean]) -> list[float]:
    return [end for mean in means for end in (mean.low, mean.high)]


def _cross(
    collection: Collection, x: Callable[[float], float], y: Callable[[float], float], ink: Ink
) -> str:
    color, (predicted, gain) = ink.series[1], (collection.predicted, collection.gain)
    at_x, at_y = x(predicted.mean), y(gain.mean)
    fill = color if collection.is_clear else ink.paper
    return svg.tag(
        "g",
        svg.tag("title", svg.content(collection.label)),
        svg.line(x(predicted.low), at_y, x(predicted.high), at_y, color, width=1),
        svg.line(at_x, y(gain.low), at_x, y(gain.high), color, width=1.5),
        svg.marker("circle", at_x, at_y, color, fill),
    )


def _bars(
    collection: Collection, x: Callable[[float], float], y: Callable[[float], float]
) -> list[Box]:
    """The areas of a collection's two intervals, that names should leave free."""
    predicted, gain = collection.predicted, collection.gain
    at_x, at_y = x(predicted.mean), y(gain.mean)
    return [
        (x(predicted.low), at_y - 1, x(predicted.high), at_y + 1),
        (at_x - 1, y(gain.high), at_x + 1, y(gain.low)),
    ]


def _names(
    labels: Sequence[str],
    places: Sequence[tuple[float, float]],
    lines: Sequence[Box],
    room: Box,
    ink: Ink,
) -> list[str]:
    """The names beside their points, each where it hides least of points, lines and other names."""
    occupied: list[Box] = [(px - 6, py - 6, px + 6, py + 6) for px, py in places] + [*lines]
    parts = []
    for label, (px, py) in zip(labels, places, strict=True):
        shown = svg.shorten(label, room[2] - room[0], SIZE)
        wide = svg.text_width(shown, SIZE)
        candidates = [
            (
                px + dx if dx > 0 else px + dx - wide,
                py + dy,
                px + dx + wide * (dx > 0),
                py + dy + 14,
            )
            for dx, dy in product((9.0, -9.0), (-15.0, 1.0, -26.0, 12.0, -38.0, 24.0))
        ]
        box = min(
            (_moved_inside(candidate, room) for candidate in candidates),
            key=lambda candidate: (
                sum(_overlap(candidate, hidden) for hidden in occupied)
                + 2 * _away(candidate, px, py)
            ),
        )
        occupied.append(box)
        parts.append(svg.text(shown, box[0], box[1] + 11, ink.text, size=SIZE, halo=ink.paper))
    return parts


def _moved_inside(box: Box, room: Box) -> Box:
    dx = max(room[0] - box[0], 0.0) + min(room[2] - box[2], 0.0)
    dy = max(room[1] - box[1], 0.0) + min(room[3] - box[3], 0.0)
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def _away(box: Box, x: float, y: float) -> float:
    """How far a point is from the middle of the nearest side of a box."""
    beside = min(abs(box[0] - x), abs(box[2] - x))
    return beside + abs((box[1] + box[3]) / 2 - y)


def _overlap(a: Box, b: Box) -> float:
    """The common area of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
