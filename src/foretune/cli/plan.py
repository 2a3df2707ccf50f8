"""`foretune plan`: what a recipe would do, and its cost."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretune.cli.output import Json, Overrides, emit, emit_json, quiet_stdout, table
from foretune.tasks.labels import shown

if TYPE_CHECKING:
    from foretune.recipes.schema import Recipe


def plan(
    recipe: Annotated[str, typer.Argument(help="Packaged recipe (see foretune ls) or YAML file.")],
    changes: Overrides = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers",
            help="Plan a step layer by layer from the model's config. Weights are not loaded, "
            "and need not be there.",
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=2, help="With --layers: processes over which the base is to be sharded (FSDP2)."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Say beforehand whether retraining pays, and what it costs.

    Shows tasks, leaks, parameters, memory and time. Times a few training steps of each method and
    saves nothing.
    """
    loaded = _checked(recipe, changes or [], layers, processes)
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.plan import plan_recipe

        planned = plan_recipe(
            loaded, StderrConsole(), layers=layers, processes=processes or 1
        ).to_dict()
    emit_json(planned) if json else emit(plan_text(planned))


def _checked(recipe: str, changes: Sequence[str], layers: bool, processes: int | None) -> Recipe:
    """The recipe, once the options fit it; without importing torch.

    Raises:
        UserError: They do not, or there is no such recipe.
    """
    from foretune.errors import UserError
    from foretune.recipes.schema import load_recipe

    if processes is not None and not layers:
        raise UserError("--processes plans a sharded base, layer by layer: add --layers")
    loaded = load_recipe(recipe, changes)
    if layers and (loaded.model.name is None or loaded.model.tower is not None):
        raise UserError(
            "--layers plans a model of texts by its config alone: it needs model.name, and neither "
            "model.file nor model.tower"
        )
    return loaded


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
    costs = [*plan["retrain"], *([plan["adapt"]] if plan["adapt"] else [])]
    layered = [cost for cost in costs if cost["layers"]]
    parts += map(_layers, layered)
    rows = [_cost(cost) for cost in costs]
    header = ["method", "base", "adapter per task", "head per task", "s per step", "total"]
    parts.append("trainable parameters and time\n" + table(header, rows))
    memory = plan["peak_memory_mb"]
    peak = f", up to {memory:.0f} MB of memory" if memory else ""
    how = "planned from shapes" if layered else "measured on a few steps"
    parts.append(f"Total: about {duration(plan['seconds'])}{peak} ({how}).")
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


def _layers(cost: Mapping[str, Any]) -> str:
    """A step of a method, or of adapting, by its parts."""
    plan = cost["layers"]
    columns = ("weights_mb", "training_mb", "kept_mb")
    rows = [
        [
            part["name"],
            f"{part['parameters'] / 1e6:,.1f}",
            *(f"{part[key] / 1024:,.2f}" for key in columns),
            f"{part['flops'] / 1e12:,.2f}",
            f"{part['seconds']:,.1f}",
        ]
        for part in plan["parts"]
    ]
    totals = [sum(part[key] for part in plan["parts"]) for key in columns]
    rows.append(
        [
            "all",
            f"{sum(part['parameters'] for part in plan['parts']) / 1e6:,.1f}",
            *(f"{total / 1024:,.2f}" for total in totals),
            f"{sum(part['flops'] for part in plan['parts']) / 1e12:,.2f}",
            f"{sum(part['seconds'] for part in plan['parts']):,.1f}",
        ]
    )
    header = ["part", "params, M", "weights", "training", "kept", "TFLOP", "s"]
    lines = [
        f"{cost['name']}, a step of {plan['tokens']:,} tokens, layer by layer (GB)",
        table(header, rows),
        _wrapped(
            f"{sum(totals) / 1024:,.1f} GB in one process, {plan['tokens_at_once']:,} tokens at "
            f"once. Training: gradients and optimiser state; kept: for the backward pass. "
            f"Products of {plan['precision']} matrices reach {plan['rate'] / 1e9:,.0f} GFLOP/s "
            "here."
        ),
    ]
    share = plan["share"]
    if share:
        lines.append(
            _wrapped(
                f"In each of {share['processes']} processes (FSDP2): "
                f"{share['memory_mb'] / 1024:,.1f} GB and {share['seconds']:,.1f} s a step, "
                f"without the transfer of {share['received_mb'] / 1024:,.1f} GB."
            )
        )
    return "\n".join(lines)


def _cost(cost: Mapping[str, Any]) -> list[str]:
    roles = cost["parameters"]
    numbers = [f"{roles[r]:,}" if r in roles else "-" for r in ("base", "adapter", "head")]
    step = "-" if cost["step_seconds"] is None else f"{cost['step_seconds']:.2f}"
    return [cost["name"], *numbers, step, duration(cost["seconds"])]
