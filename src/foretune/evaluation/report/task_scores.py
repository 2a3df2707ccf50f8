"""Every score: the table of the page, task by task, and the CSV file beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from foretune.evaluation.report.view import View
from foretune.evaluation.wording import shots_phrase
from foretune.printable import printable

COLUMNS = (
    *("base", "label", "task", "shots", "repeat", "seed"),
    *("metric", "score", "num_train", "num_rows"),
)


def score_table(view: View) -> dict[str, Any]:
    """The score of every base on every task at the judged shots, and the difference that decides.

    The difference comes first, as a narrow page shows it; it is missing where nothing is compared.
    """
    focus = view.focus()
    names = [name for name in view.names if (name, view.judged) in view.means]
    table: dict[str, Any] = {"at": shots_phrase(view.judged, view.shots_unit), "focus": None}
    differences: dict[str, float] = {}
    if focus is not None:
        first = dict.fromkeys([focus.a, focus.b, *reversed(view.controls)])
        names = [*first, *(name for name in names if name not in first)]
        differences = dict(view.task_differences(focus.a, focus.b, view.judged))
        table["focus"] = {
            "a": view.labels[focus.a],
            "b": view.rival(focus.b),
            "wins": focus.wins,
            "losses": focus.losses,
            "ties": focus.ties,
        }
    scores = {name: view.task_means(name, view.judged) for name in names}
    # Those with a difference come first, in its order.
    tasks = [*differences, *sorted({task for means in scores.values() for task in means})]
    table["columns"] = [view.labels[name] for name in names]
    table["rows"] = [
        {
            "task": task,
            "difference": _cell(differences.get(task), view.scale.signed),
            "scores": [_cell(scores[name].get(task), view.scale.level) for name in names],
        }
        for task in dict.fromkeys(tasks)
    ]
    return table


def _cell(value: float | None, write: Any) -> tuple[str, str]:
    """(what is shown, what is sorted by)."""
    return ("–", "") if value is None else (write(value), f"{value:.9g}")


def scores_csv(comparison: Mapping[str, Any]) -> str:
    """All scores of a comparison as CSV, a row each; shots and num_train may be "all" or empty."""
    labels = {base["name"]: base["label"] for base in comparison["bases"]}
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for score in comparison["scores"]:
        row = {
            **score,
            "label": labels[score["base"]],
            "metric": comparison["metric"]["name"],
            "shots": "all" if score["shots"] is None else score["shots"],
        }
        writer.writerow({k: printable(v) if isinstance(v, str) else v for k, v in row.items()})
    return file.getvalue()
