"""`foretune plan`: what a recipe would do, and its cost."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, Overrides, emit, emit_json, quiet_stdout, table
from foretune.tasks.labels import shown


def plan(
    recipe: Annotated[str, typer.Argument(help="Packaged recipe (see foretune ls) or YAML file.")],
    changes: Overrides = None,
    json: Json = False,
) -> None:
    """Say beforehand whether retraining pays, and what it costs.

    Shows tasks, leaks, parameters, memory and time. Times a few training steps of each method and
    saves nothing.
    """
    from foretune.recipes.schema import load_recipe

    loaded = load_recipe(recipe, changes or [])
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.plan import plan_recipe

        planned = plan_recipe(loaded, StderrConsole()).to_dict()
    emit_json(planned) if json else emit(plan_text(planned))


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan as text."""
    parts = [_conflict(plan["conflict"]), _tasks("seen", plan["seen"])]
    if plan["notes"]:
        parts.insert(1, "\n".join(["before you run", *map(_wrapped, plan["notes"])]))
    if plan["unseen"]:
        parts.append(_tasks("unseen", plan["unseen"]))
    if plan["labels"]:
        parts.append(_labels(plan["labels"]))
    if plan["drawn"]:
        parts.append("rows to adapt on\n" + "\n".join(f"  {line}" for line in plan["drawn"]))
    parts.append(_leaks(plan["leaks"]))
    if plan["shared_inputs"]:
        parts.append(_shared_inputs(plan["shared_inputs"]))
    rows = [_cost(cost) for cost in [*plan["retrain"], *([plan["adapt"]] if plan["adapt"] else [])]]
    header = ["method", "base", "adapter per task", "head per task", "s per step", "total"]
    parts.append("trainable parameters and time\n" + table(header, rows))
    memory = plan["peak_memory_mb"]
    peak = f", up to {memory:.0f} MB of memory" if memory else ""
    parts.append(f"Total: about {duration(plan['seconds'])}{peak} (measured on a few steps).")
    return "\n\n".join(parts)


def _conflict(conflict: Mapping[str, Any]) -> str:
    """Whether retraining is likely to pay, as text of at most 80 columns."""
    from foretune.evaluation.conflict_text import (
        QUESTION,
        about_tasks,
        conflict_rows,
        expectation,
    )

    if "unmeasured" in conflict:
        return _wrapped(f"{QUESTION} {conflict['unmeasured'].capitalize()}.")
    header, *rows = conflict_rows(conflict)
    scores = textwrap.indent(table(header, rows), "  ")
    sentences = _wrapped(about_tasks(conflict))
    expected = "\n".join(map(_wrapped, expectation(conflict).splitlines()))
    return "\n\n".join([f"{QUESTION}\n{sentences}", scores, expected])


def _wrapped(text: str) -> str:
    """The text in lines of at most 80 columns, indented."""
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="  ")


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, as text.

    >>> duration(42), duration(600), duration(9000)
    ('42 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _tasks(side: str, tasks: Mapping[str, Mapping[str, int]], most: int = 12) -> str:
    rows = [[name, *splits.values()] for name, splits in list(tasks.items())[:most]]
    splits = list(next(iter(tasks.values())))
    if len(tasks) > most:
        rest = list(tasks.values())[most:]
        rows.append([f"and {len(rest)} more", *(sum(task[s] for task in rest) for s in splits)])
    noun = "task" if len(tasks) == 1 else "tasks"
    return f"{len(tasks)} {side} {noun}\n" + table([f"{side} task", *splits], rows)


def _labels(labels: Mapping[str, list[Any]], most: int = 8) -> str:
    """The label sets, the most frequent first, and the tasks that have them.

    >>> print(_labels({"a": ["no", "yes"], "b": ["no", "yes"], "c": [1, 2]}))
    labels
      2 tasks, such as a: 'no', 'yes'
      c: 1, 2
    """
    tasks: dict[str, list[str]] = {}
    for name, of_task in labels.items():
        tasks.setdefault(shown(of_task), []).append(name)
    sets = sorted(tasks.items(), key=lambda item: -len(item[1]))
    lines = [
        f"  {names[0] if len(names) == 1 else f'{len(names)} tasks, such as {names[0]}'}: {text}"
        for text, names in sets[:most]
    ]
    more = [f"  and {len(sets) - most} other sets of labels"] if len(sets) > most else []
    return "\n".join(["labels", *lines, *more])


def _leaks(leaks: list[Mapping[str, Any]], most: int = 8) -> str:
    if not leaks:
        return (
            "leaks: none found (no example is in two of train, validation and test, or in seen "
            "and unseen tasks)"
        )
    lines = []
    for leak in sorted(leaks, key=lambda leak: -leak["count"])[:most]:
        first, second = leak["splits"]
        task = "the task" if leak["task"] == leak["other_task"] else leak["task"]
        places = f" ({', '.join(leak['places'])})" if leak["places"] else ""
        lines.append(
            f"  {leak['other_task']}: {leak['count']} {second} examples are also {first} examples "
            f"of {task}, such as {leak['sample']!r}{places}"
        )
    more = [f"  and {len(leaks) - most} more"] if len(leaks) > most else []
    return "\n".join(["leaks: scores will be too high", *lines, *more])


def _shared_inputs(shared: list[Mapping[str, Any]]) -> str:
    count, total, same = (sum(t[key] for t in shared) for key in ("count", "total", "same_answer"))
    text = (
        f"shared inputs: {count} of {total} test inputs of unseen tasks are also in seen tasks, "
        f"{same} of them with the same answer, such as {shared[0]['sample']!r}. Each task answers "
        "in its own way; scores hold for new tasks that answer such inputs, too."
    )
    return textwrap.fill(text, 80, subsequent_indent="  ")


def _cost(cost: Mapping[str, Any]) -> list[str]:
    roles = cost["parameters"]
    numbers = [f"{roles[r]:,}" if r in roles else "-" for r in ("base", "adapter", "head")]
    step = "-" if cost["step_seconds"] is None else f"{cost['step_seconds']:.2f}"
    return [cost["name"], *numbers, step, duration(cost["seconds"])]
