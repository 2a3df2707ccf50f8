"""A page with the measures of forecasts and pictures of scenes with the modes over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foretune.evaluation.report.svg import LIGHT, content, polyline, tag, text
from foretune.forecasting.scenes import Arrays

SIDE = 340.0
COLOURS = {"history": LIGHT.series[1], "truth": LIGHT.series[3], "mode": LIGHT.series[2]}


def scene_figure(scene: Arrays, modes: np.ndarray, probabilities: np.ndarray) -> str:
    """SVG of a scene in its focal frame, heading up.

    Args:
        scene: As `in_focal_frame` gives it.
        modes: (K, F, 2) in m.
        probabilities: (K,) of the modes; the likelier, the stronger its line.
    """
    shown = [_path(modes[k]) for k in range(len(modes))]
    truth = _path(scene["future"][0, scene["future"][0, :, 2] > 0, :2])
    past = scene["past"][0, scene["history"][0, :, 3] > 0]
    points = np.concatenate([*shown, truth, past])
    low, high = points.min(0) - 5, points.max(0) + 5
    middle, reach = (low + high) / 2, max((high - low).max() / 2, 5.0)

    def place(xy: np.ndarray) -> list[tuple[float, float]]:
        # The heading, x, goes up the page; left, y, to the left.
        scaled = (xy - middle) / reach * SIDE / 2
        return [(SIDE / 2 - y, SIDE / 2 - x) for x, y in scaled.tolist()]

    parts = [
        polyline(place(lane[lane[:, 2] > 0, :2] + pose[:2]), LIGHT.line)
        for lane, pose in zip(scene["lanes"], scene["lane_pose"], strict=True)
    ]
    for agent in range(1, len(scene["kind"])):
        seen = scene["history"][agent, :, 3] > 0
        track = scene["past"][agent, seen] + scene["agent_pose"][agent, :2]
        parts.append(polyline(place(track), LIGHT.series[0], dash="2 3"))
    parts.append(polyline(place(past), COLOURS["history"]))
    for path, probability in zip(shown, probabilities.tolist(), strict=True):
        line = polyline(place(path), COLOURS["mode"])
        parts.append(tag("g", line, opacity=round(0.25 + 0.75 * probability, 2)))
        x, y = place(path[-1:])[0]
        parts.append(text(f"{probability:.0%}", x, y, LIGHT.text, size=10, halo=LIGHT.paper))
    parts.append(polyline(place(truth), COLOURS["truth"], dash="7 4"))
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {SIDE:g} {SIDE:g}",
        width=SIDE,
        height=SIDE,
        role="img",
    )


def _path(points: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((1, 2)), points])


def forecast_page(
    rows: Sequence[Mapping[str, Any]], figures: Sequence[tuple[str, str]], title: str
) -> str:
    """The HTML page: one file, no server, no network.

    Args:
        rows: Of the table, with the same keys.
        figures: (caption, SVG).
        title: Of the page.
    """
    header = tag("tr", *(tag("th", content(key)) for key in rows[0]))
    body = [
        tag(
            "tr",
            *(tag("td", content(f"{v:.3f}" if isinstance(v, float) else v)) for v in r.values()),
        )
        for r in rows
    ]
    pictures = [tag("figure", svg, tag("figcaption", content(caption))) for caption, svg in figures]
    style = (
        "body{font-family:sans-serif;margin:2em;color:#1f2328}td,th{padding:.2em .8em;"
        "text-align:right}td:first-child,td:nth-child(2){text-align:left}"
        "figure{display:inline-block;margin:1em;border:1px solid #dfdcd5}figcaption{padding:.4em}"
    )
    legend = "".join(
        f'<span style="color:{colour}">{name}</span> '
        for name, colour in (
            ("history", COLOURS["history"]),
            ("forecasts", COLOURS["mode"]),
            ("what happened", COLOURS["truth"]),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{content(title)}</title>"
        f"<style>{style}</style></head><body><h1>{content(title)}</h1>"
        f"{tag('table', header, *body)}<p>Metres. In the pictures: {legend}; the heading is up.</p>"
        f"{''.join(pictures)}</body></html>\n"
    )
