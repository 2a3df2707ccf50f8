"""The figures of the experiments, as SVG files that are the same in every run."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from foretune.files import write_whole
from foretune.theory.panel import PanelRows

COLOURS = {"peft-ml": "#1f6feb", "standard": "#d1570f", "none": "#6e7781", "full": "#8250df"}
NAMES = {
    "peft-ml": "LoRA-ML",
    "standard": "SR",
    "none": "none",
    "full": "SR, every weight fine-tuned",
}
STYLE: Any = {
    "svg.hashsalt": "foretune",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
ERROR = "‖Ŵ − W*‖² on the unseen task"


@contextmanager
def figure(
    path: Path, columns: int, width: float = 4.2, height: float = 3.3
) -> Iterator[list[Any]]:
    """Axes side by side, saved at the end of the block.

    Args:
        path: The SVG to write.
        columns: Number of axes.
        width: Width of each in inches.
        height: Height of each in inches.

    Yields:
        The axes.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(width * columns, height), layout="constrained")
        FigureCanvasSVG(canvas)
        yield list(canvas.subplots(1, columns, squeeze=False)[0])
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Two decimals are enough and halve the file size.
    write_whole(path, re.sub(r"(\d\.\d\d)\d+", r"\1", text.getvalue()))


def band(axis: Any, x: Sequence[float], values: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw the medians of `values`, one list per x, as a line and their ranges as a band."""
    axis.plot(x, [np.median(v) for v in values], marker="o", markersize=3.5, **style)
    fill = {key: style[key] for key in style.keys() & {"color"}}
    low, high = [min(v) for v in values], [max(v) for v in values]
    axis.fill_between(x, low, high, alpha=0.15, linewidth=0, **fill)


def rank_at_test(rows: PanelRows, path: Path) -> None:
    """Draw the error against the rank at test, with one axis per k."""
    ks = list(dict.fromkeys(row["k"] for row in rows))
    with figure(path, len(ks)) as axes:
        for axis, k in zip(axes, ks, strict=True):
            for name in ("standard", "peft-ml"):
                line = [row for row in rows if row["k"] == k and row["base"] == name]
                x = [row["rank"] for row in line]
                values = [row["error"] for row in line]
                band(axis, x, values, color=COLOURS[name], label=NAMES[name])
            for at, text in ((k, "k"), (4 * k, "k(T+1)")):
                axis.axvline(at, color="#6e7781", linewidth=0.8, linestyle=":")
                axis.text(at, 1.0, f" {text}", transform=axis.get_xaxis_transform(), va="bottom")
            axis.set(yscale="log", xlabel=f"LoRA rank at test (T = 3, k = {k})", ylabel=ERROR)
            axis.set_xticks(x)
            axis.legend()


def curves(rows: PanelRows, path: Path) -> None:
    """Draw the error against fine-tuning steps, with one axis per varied key."""
    keys = list(dict.fromkeys(row["key"] for row in rows))
    dashes = ("-", "--", ":", "-.")
    with figure(path, len(keys), width=3.2) as axes:
        for axis, key in zip(axes, keys, strict=True):
            curves_of_key = [row for row in rows if row["key"] == key]
            values = list(dict.fromkeys(row["value"] for row in curves_of_key))
            for row in curves_of_key:
                rank = f", rank {row['rank']}" if (key, row["value"]) == ("T", 2) else ""
                colour = COLOURS[row["base"]]
                dash = dashes[values.index(row["value"]) % len(dashes)]
                label = f"{key}={row['value']}{rank}, {NAMES[row['base']]}"
                axis.plot(row["steps"], row["median"], linestyle=dash, label=label, color=colour)
                axis.fill_between(row["steps"], row["low"], row["high"], alpha=0.1, color=colour)
            axis.set(xscale="log", yscale="log", xlabel="fine-tuning steps")
            axis.legend(fontsize=6)
        axes[0].set_ylabel(ERROR)


def singular_values(rows: PanelRows, path: Path) -> None:
    """Draw the singular values of A_hat − A*, with one axis per number of tasks."""
    tasks = list(dict.fromkeys(row["T"] for row in rows))
    with figure(path, len(tasks)) as axes:
        for axis, num_tasks in zip(axes, tasks, strict=True):
            for row in rows:
                if row["T"] == num_tasks:
                    x = list(range(1, len(row["values"]) + 1))
                    values = list(zip(*row["each"], strict=True))
                    name = row["base"]
                    band(axis, x, values, color=COLOURS[name], label=NAMES[name])
            axis.set(yscale="log", xlabel=f"index (T = {num_tasks}, k = 1)")
            axis.set_xticks(x)
            axis.legend()
        axes[0].set_ylabel("singular value of Â − A*")


def rate(rows: PanelRows, path: Path) -> None:
    """Draw the error against the number of shots, with the theoretical line."""
    with figure(path, 1) as (axis,):
        x = [row["n"] for row in rows]
        for name, label, colour in (
            ("peft-ml", "LoRA-ML", COLOURS["peft-ml"]),
            ("exact", "from A* itself", COLOURS["none"]),
        ):
            band(axis, x, [row[name] for row in rows], color=colour, label=label)
        line = [row["theory"] for row in rows]
        axis.plot(x, line, "k--", linewidth=1, label="noise²(2dk − k²)/n")
        axis.set(xscale="log", yscale="log", xlabel="shots n", ylabel=ERROR)
        axis.legend()


def offsets(rows: PanelRows, path: Path) -> None:
    """Draw the error against the number of tasks, for positive and for zero-mean offsets."""
    kinds = list(dict.fromkeys(row["offsets"] for row in rows))
    with figure(path, len(kinds)) as axes:
        for axis, kind in zip(axes, kinds, strict=True):
            line = [row for row in rows if row["offsets"] == kind]
            x = [row["T"] for row in line]
            for name in ("standard", "peft-ml"):
                values = [row[name] for row in line]
                band(axis, x, values, color=COLOURS[name], label=NAMES[name])
            limits = [row["limit"] for row in line]
            axis.plot(x, limits, "k--", linewidth=1, label="large-T value for SR")
            axis.set(
                xscale="log", yscale="log", xlabel=f"seen tasks T ({kind} offsets)", ylabel=ERROR
            )
            axis.legend()


def shallow(rows: PanelRows, path: Path) -> None:
    """Draw the held-out error of each base, by dimension and by number of tasks."""
    with figure(path, 2) as axes:
        for axis, key in zip(axes, ("d", "T"), strict=True):
            line = [row for row in rows if key in row["varies"] and row["rank"] == row["k"]]
            line.sort(key=lambda row: row[key])
            x = [row[key] for row in line]
            for name in ("none", "full", "standard", "peft-ml"):
                values = [row["held_out"][name] for row in line]
                band(axis, x, values, color=COLOURS[name], label=NAMES[name])
            label = "dimension d" if key == "d" else "seen tasks T"
            axis.set(yscale="log", xlabel=label, ylabel="squared error on new inputs")
            axis.set_xticks(x)
        axes[0].legend()
