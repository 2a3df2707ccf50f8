"""An HTML page with the metrics of forecasts and pictures of scenes with the forecast modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foretune.evaluation.report.svg import LIGHT, content, polyline, tag, text
from foretune.forecasting.scenes import Arrays

SIDE = 340.0
COLOURS = {"history": LIGHT.series[1], "truth": LIGHT.series[3], "mode": LIGHT.series[2]}


def scene_figure(scene: Arrays, modes: np.ndarray, probabilities: np.ndarray) -> str:
    """SVG of a scene in its focal frame, with the focal agent's heading up.

    Args:
        scene: As `in_focal_frame` returns it.
        modes: (K, F, 2) in m.
        probabilities: (K,) of the modes; a likelier mode has a more opaque line.
    """
    paths = [_from_origin(modes[k]) for k in range(len(modes))]
    truth = _from_origin(scene["future"][0, scene["future"][0, :, 2] > 0, :2])
    past = scene["past"][0, scene["history"][0, :, 3] > 0]
    points = np.concatenate([*paths, truth, past])
    low, high = points.min(0) - 5, points.max(0) + 5
    middle, reach = (low + high) / 2, max((high - low).max() / 2, 5.0)

    def to_page(xy: np.ndarray) -> list[tuple[float, float]]:
        # x, the heading, points up the page; y points left.
        scaled = (xy - middle) / reach * SIDE / 2
        return [(SIDE / 2 - y, SIDE / 2 - x) for x, y in scaled.tolist()]

    parts = [
        polyline(to_page(lane[lane[:, 2] > 0, :2] + pose[:2]), LIGHT.line)
        for lane, pose in zip(scene["lanes"], scene["lane_pose"], strict=True)
    ]
    for agent in range(1, len(scene["kind"])):
        observed = scene["history"][agent, :, 3] > 0
        track = scene["past"][agent, observed] + scene["agent_pose"][agent, :2]
        parts.append(polyline(to_page(track), LIGHT.series[0], dash="2 3"))
    parts.append(polyline(to_page(past), COLOURS["history"]))
    for path, probability in zip(paths, probabilities.tolist(), strict=True):
        line = polyline(to_page(path), COLOURS["mode"])
        parts.append(tag("g", line, opacity=round(0.25 + 0.75 * probability, 2)))
        x, y = to_page(path[-1:])[0]
        parts.append(text(f"{probability:.0%}", x, y, LIGHT.text, size=10, halo=LIGHT.paper))
    parts.append(polyline(to_page(truth), COLOURS["truth"], dash="7 4"))
    return tag(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {SIDE:g} {SIDE:g}",
        width=SIDE,
        height=SIDE,
        role="img",
    )


def _from_origin(points: np.ndarray) -> np.ndarray:
    """(n + 1, 2): the points after the focal agent's present position, the origin."""
    return np.concatenate([np.zeros((1, 2)), points])


def forecast_page(
    rows: Sequence[Mapping[str, Any]], figures: Sequence[tuple[str, str]], title: str
) -> str:
    """A self-contained HTML page with the table of metrics and the pictures.

    Args:
        rows: Rows of the table; all have the same keys.
        figures: (caption, SVG) of each picture.
        title: Title of the page.
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
            ("ground truth", COLOURS["truth"]),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="generator" content="foretune">'
        f"<title>{content(title)}</title>"
        f"<style>{style}</style></head><body><h1>{content(title)}</h1>"
        f"{tag('table', header, *body)}"
        f"<p>Distances are in metres. In the pictures: {legend}; the focal agent heads up.</p>"
        f"{''.join(pictures)}</body></html>\n"
    )
