"""A measured conflict in words, for `foretune plan` and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foretune.evaluation.wording import MINUS, counted

QUESTION = "Does retraining with adapters pay?"
STEPS = {
    "blank": "the most frequent label",
    "alone": "its own rows alone",
    "pooled": "all tasks pooled",
    "offset": "+ an offset per task",
    "own": "+ a free difference per task",
    "low rank": "+ a rank-{rank} difference per task",
}
ADVICE = {
    "PEFT-ML": "Tasks differ in few directions, and a few rows of a new task tell where it is.",
    "pool": "Other tasks help a new one, but that tasks differ in few directions does not "
    "(`standard`).",
    "keep the model": "A new task's own rows do about as well without the other tasks (`none`).",
}


def conflict_rows(conflict: Mapping[str, Any]) -> list[list[str]]:
    """The header and the rows of a table of scores: a step in each row, a number of shots a column.

    Args:
        conflict: `Conflict.to_dict()`.
    """
    shots = conflict["by_shots"]
    rows = [[conflict["unit"], *("all" if s["shots"] is None else str(s["shots"]) for s in shots)]]
    rows.append(["rows of a task (median)", *(str(s["rows"]) for s in shots)])
    for name, label in STEPS.items():
        if name in shots[0]["scores"]:
            if name == "blank" and conflict["over"] == "responses":
                label = "the model as it is"
            cells = [_level(conflict, s["scores"][name][0]) for s in shots]
            rows.append([label.format(rank=conflict["rank"]), *cells])
    if not conflict["own_labels"]:
        gains = [_signed(conflict, s["gain"][0]) for s in shots]
        rows.append(["expected gain of PEFT-ML", *gains])
    return rows


def about_tasks(conflict: Mapping[str, Any]) -> str:
    """What was measured, in a sentence or two.

    Args:
        conflict: `Conflict.to_dict()`.
    """
    tasks, rows = counted(conflict["num_tasks"], "seen task"), f"{conflict['num_rows']:,} rows"
    if conflict["over"] == "inputs":
        share = f"{100 * conflict['shared_inputs']:.0f} %"
        text = f"{tasks}, {rows}. They share their inputs: {share} of the rows have one that "
        text += "several other tasks answer, too."
    else:
        text = f"{tasks}, {rows}, measured on features of the inputs, which tasks do not share."
    if conflict["own_labels"]:
        text += " Labels differ from task to task, so none can be pooled."
    return f"{text} Tasks were held out in turn: {_metric(conflict)} on their other rows."


def expectation(conflict: Mapping[str, Any]) -> str:
    """The expected gain with its interval, and the advice.

    Args:
        conflict: `Conflict.to_dict()`.
    """
    advice = f"Advice: {conflict['advice']}. {ADVICE[conflict['advice']]}"
    if conflict["own_labels"]:
        return advice
    mean, low, high = (_signed(conflict, value) for value in conflict["expected_gain"])
    unit = "points of accuracy" if conflict["metric"] == "accuracy" else "of R²"
    last = conflict["by_shots"][-1]["r2"]
    steps = [name for name in ("pooled", "offset", "low rank") if name in last]
    r2 = ", ".join(f"{last[name]:.2f} {name}" for name in steps).replace("-", MINUS)
    return (
        f"Expected gain of PEFT-ML over pooling: {mean} {unit} ({low} to {high}), mean over the "
        f"numbers of rows. R² with the most rows: {r2}.\n{advice}"
    )


def _metric(conflict: Mapping[str, Any]) -> str:
    return "accuracy in %" if conflict["metric"] == "accuracy" else "R²"


def _level(conflict: Mapping[str, Any], score: float) -> str:
    text = f"{100 * score:.1f}" if conflict["metric"] == "accuracy" else f"{score:.2f}"
    return text.replace("-", MINUS)


def _signed(conflict: Mapping[str, Any], difference: float) -> str:
    text = _level(conflict, difference)
    return text if float(text.replace(MINUS, "-")) == 0 or text[0] == MINUS else f"+{text}"
