"""Runs an experiment panel by panel and writes its tables, figures and raw numbers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foretune.files import CARD_FILE, write_whole
from foretune.formats import read_json, stamped
from foretune.theory.panel import Panel, Settings, Table

RESULT_FILE = "result.json"
FORMAT = "foretune-experiment-1"  # of result.json and panels/NAME.json
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
    """Run the panels that are not in the folder yet, then write result.json, README.md and figures.

    Args:
        settings: A recipe's values; `panels` names the panels to run, None runs all.
        folder: Folder of the results; `panels/NAME.json` is written when a panel is done.
        say: Receives progress messages.

    Returns:
        The content of result.json: {"title", "experiment", "scale", "settings", "panels"}.
    """
    panel_results: dict[str, Any] = {}
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
            write_whole(path, json.dumps(stamped({"cpu_seconds": seconds, "rows": rows}, FORMAT)))
            say(f"{panel.name}: {seconds:.0f} s of CPU time")
        panel_results[panel.name] = read_json(path, dict[str, Any], FORMAT)
    result = {
        "title": settings["name"],
        **{key: settings[key] for key in ("experiment", "scale")},
        "settings": {key: value for key, value in settings.items() if key != "out"},
        "panels": panel_results,
    }
    figures = draw_figures(result, folder / "figures", say)
    record = stamped(result, FORMAT)
    write_whole(folder / RESULT_FILE, json.dumps(record, ensure_ascii=False) + "\n")
    write_whole(folder / CARD_FILE, page(result, figures))
    return result


def draw_figures(
    result: dict[str, Any], folder: Path, say: Callable[[str], None] = lambda line: None
) -> dict[str, str]:
    """Draw the figures of the panels that have one.

    Args:
        result: The content of result.json.
        folder: Folder of the figures.
        say: Receives a message if matplotlib is missing.

    Returns:
        {panel: file name}; empty without matplotlib.
    """
    panels = [p for p in panels_of(result["experiment"]) if p.name in result["panels"] and p.figure]
    if panels and find_spec("matplotlib") is None:
        say("no figures without matplotlib: pip install matplotlib, then run with --resume")
        return {}
    figures = {}
    for panel in panels:
        assert panel.figure is not None
        panel.figure(result["panels"][panel.name]["rows"], folder / f"{panel.name}.svg")
        figures[panel.name] = f"{panel.name}.svg"
    return figures


def tables(result: dict[str, Any]) -> list[tuple[Panel, Table, str]]:
    """(panel, table, finding) of each panel of a result."""
    return [
        (panel, panel.table(rows), panel.finding(rows))
        for panel in panels_of(result["experiment"])
        if panel.name in result["panels"]
        for rows in [result["panels"][panel.name]["rows"]]
    ]


def page(result: dict[str, Any], figures: dict[str, str]) -> str:
    """The result as a page of Markdown.

    Args:
        result: The content of result.json.
        figures: {panel: file name below figures/}.
    """
    settings = result["settings"]
    keys = ("seeds", "noise", "outer_steps", "retrain_epochs", "adapt_epochs", "num_problems")
    numbers = ", ".join(f"{key} {settings[key]}" for key in keys if key in settings)
    seconds = sum(panel["cpu_seconds"] for panel in result["panels"].values())
    parts = [
        f"# {result['title']}",
        f"The {result['experiment']} experiment of {PAPER}. Scale {result['scale']}: {numbers}; "
        f"{seconds:.0f} s of CPU time in total. Cells are the median over the seeds, with the "
        "minimum and maximum in brackets. LoRA-ML is the paper's name for PEFT-ML with LoRA, SR "
        "that for standard retraining.",
    ]
    for panel, table, finding in tables(result):
        parts += [
            f"## {panel.title}",
            f"**The paper.** {panel.paper}",
            f"**Here.** {panel.here}",
            markdown(table),
            f"**Result.** {finding}",
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
