"""Runs an experiment panel by panel, and writes what people and machines read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foretune.files import write_whole
from foretune.theory.panel import Panel, Settings, Table

PAPER = (
    'Block et al., "Meta-Learning Adaptable Foundation Models" (2024), revised as "Provable '
    'Meta-Learning with Low-Rank Adaptations" (2025), arXiv:2410.22264'
)


def panels_of(experiment: str) -> list[Panel]:
    """The panels of "linear" or "shallow"."""
    if experiment == "linear":
        from foretune.theory import linear_panels

        return linear_panels.PANELS
    from foretune.theory import shallow_panels

    return shallow_panels.PANELS


def run_panels(
    settings: Settings, folder: Path, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Runs the panels that are not in the folder yet, and writes result.json, README.md, figures.

    Args:
        settings: A recipe's values; `panels` names those to run, None runs all.
        folder: Where the results go; `panels/NAME.json` is written when a panel is done.
        say: Is told how it goes.

    Returns:
        What result.json holds: {"title", "experiment", "scale", "settings", "panels"}.
    """
    found: dict[str, Any] = {}
    panels = [
        panel
        for panel in panels_of(settings["experiment"])
        if settings["panels"] is None or panel.name in settings["panels"]
    ]
    for panel in panels:
        path = folder / "panels" / f"{panel.name}.json"
        if path.is_file():
            say(f"{panel.name}: already done")
        else:
            start = time.process_time()
            rows = panel.rows({**settings, "folder": folder, "say": say})
            seconds = round(time.process_time() - start, 1)
            write_whole(path, json.dumps({"cpu_seconds": seconds, "rows": rows}))
            say(f"{panel.name}: {seconds:.0f} s of CPU time")
        found[panel.name] = json.loads(path.read_text("utf-8"))
    result = {
        "title": settings["name"],
        **{key: settings[key] for key in ("experiment", "scale")},
        "settings": {key: value for key, value in settings.items() if key != "out"},
        "panels": found,
    }
    figures = draw_figures(result, folder / "figures", say)
    write_whole(folder / "result.json", json.dumps(result, ensure_ascii=False) + "\n")
    write_whole(folder / "README.md", page(result, figures))
    return result


def draw_figures(
    result: dict[str, Any], folder: Path, say: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """Draws the panels that have a figure into the folder: {panel: file name}.

    Without matplotlib there are none, and `say` is told.
    """
    panels = [p for p in panels_of(result["experiment"]) if p.name in result["panels"] and p.figure]
    if panels and find_spec("matplotlib") is None:
        say("no figures: they need matplotlib (pip install matplotlib), then run with --resume")
        return {}
    drawn = {}
    for panel in panels:
        assert panel.figure is not None
        panel.figure(result["panels"][panel.name]["rows"], folder / f"{panel.name}.svg")
        drawn[panel.name] = f"{panel.name}.svg"
    return drawn


def tables(result: dict[str, Any]) -> list[tuple[Panel, Table, str]]:
    """(panel, its table, what it says) of every panel of a result."""
    return [
        (panel, panel.table(rows), panel.finding(rows))
        for panel in panels_of(result["experiment"])
        if panel.name in result["panels"]
        for rows in [result["panels"][panel.name]["rows"]]
    ]


def page(result: dict[str, Any], figures: dict[str, str]) -> str:
    """The result as Markdown.

    Args:
        result: What result.json holds.
        figures: {panel: file name below figures/}.
    """
    settings = result["settings"]
    shown = ("seeds", "noise", "outer_steps", "retrain_epochs", "adapt_epochs", "num_problems")
    numbers = ", ".join(f"{key} {settings[key]}" for key in shown if key in settings)
    seconds = sum(panel["cpu_seconds"] for panel in result["panels"].values())
    parts = [
        f"# {result['title']}",
        f"The {result['experiment']} experiment of {PAPER}. Scale {result['scale']}: {numbers}; "
        f"{seconds:.0f} s of CPU time in all. Cells are the median over the seeds, with the least "
        "and the greatest. LoRA-ML is the paper's name for PEFT-ML with LoRA, SR for standard "
        "retraining.",
    ]
    for panel, table, finding in tables(result):
        parts += [
            f"## {panel.title}",
            f"**The paper.** {panel.paper}",
            f"**Here.** {panel.here}",
            markdown(table),
            f"**Found.** {finding}",
        ]
        if panel.name in figures:
            parts.append(f"![{panel.title}](figures/{figures[panel.name]})")
    return "\n\n".join(parts) + "\n"


def markdown(table: Table) -> str:
    """A table as Markdown.

    >>> print(markdown(Table(["k", "error"], [["1", "0.5"]])))
    | k | error |
    |---|---|
    | 1 | 0.5 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in [table.header, *table.rows]]
    lines.insert(1, "|" + "---|" * len(table.header))
    return "\n".join(lines)
