"""What a comparison of fusions says, in words: a table, and advice that follows from it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TOLD = "smile routing=task"
LABELS = {
    "base": "base, not tuned",
    "separate models": "each task's own model",
    TOLD: "smile routing=task (told the task)",
}
MEASURES = {
    "accuracy": "accuracy, %",
    "agreement": "same answer as the task's own model, %",
    "log-likelihood": "log-likelihood per token, nats",
}


def name_of(method: Mapping[str, Any]) -> str:
    """The name of a fusion in the table.

    Args:
        method: Its record as a mapping.

    >>> name_of({"name": "smile", "gate": "weights", "routing": "sequence"})
    'smile gate=weights routing=sequence'
    """
    if method["name"] != "smile":
        return str(method["name"])
    if method["routing"] == "task":
        return TOLD
    return f"smile gate={method['gate']} routing={method['routing']}"


def table_of(measured: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table.

    Args:
        measured: As `Comparison.to_dict` gives it.
    """
    tasks = list(measured["held_out_rows"])
    header = [MEASURES[measured["measure"]], *tasks, *["mean"] * (len(tasks) > 1)]
    rows = []
    for candidate in measured["candidates"]:
        figures = [candidate["tasks"][task] for task in tasks]
        figures += [candidate["mean"]] * (len(tasks) > 1)
        label = LABELS.get(candidate["name"], candidate["name"])
        rows.append([label, *(number(measured, figure) for figure in figures)])
    return header, rows


def advice(measured: Mapping[str, Any], asked: str | None) -> list[str]:
    """What follows from the table.

    Args:
        measured: As `Comparison.to_dict` gives it.
        asked: Name of the candidate that was asked for; None for the choice of `auto`.
    """
    candidates = {candidate["name"]: candidate for candidate in measured["candidates"]}
    best, chosen = measured["best"], measured["chosen"]
    lines = []
    if best == chosen:
        lines.append(f"Best: {best}.")
    else:
        lines.append(
            f"Best: {best}. Simplest within one standard error of it "
            f"({number(measured, candidates[chosen]['behind_best'][1])}): {chosen}."
        )
    lines += _on_being_told(measured, candidates)
    if asked is not None and asked != chosen and asked in candidates:
        behind, error = candidates[asked]["behind_best"]
        if behind > error:
            lines.append(
                f"{asked}, which was asked for, is {number(measured, behind)} (standard error "
                f"{number(measured, error)}) behind the best: `foretune fuse auto` takes {chosen}."
            )
    return lines


def number(measured: Mapping[str, Any], value: float) -> str:
    """A score or a difference of scores in the unit of the table."""
    return f"{value:.3f}" if measured["measure"] == "log-likelihood" else f"{100 * value:.1f}"


def held_out_text(measured: Mapping[str, Any]) -> str:
    """How many rows of each task measured."""
    parts = [f"{count} of {task}" for task, count in measured["held_out_rows"].items()]
    return f"Measured on held-out rows ({', '.join(parts)}), which made no gate:"


def _on_being_told(
    measured: Mapping[str, Any], candidates: Mapping[str, Mapping[str, Any]]
) -> Sequence[str]:
    """That who names the task of each request can have more."""
    if measured["own_heads"] or TOLD not in candidates:
        if measured["chosen"] == TOLD:
            return [
                "Each task has its own head, so set_task(NAME) names the task anyway and chooses "
                "the experts too; serving the models separately is as good. Without being told: "
                f"{measured['chosen_untold']}."
            ]
        return []
    behind, error = candidates[TOLD]["behind_best"]
    if -behind <= error:
        return []
    return [
        f"Where requests name their task, smile routing=task is {number(measured, -behind)} "
        "better, and so is serving the models separately."
    ]
