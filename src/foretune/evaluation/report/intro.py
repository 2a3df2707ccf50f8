"""The first lines of a report: what was compared, on what data, with which model, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from foretune.evaluation.report.view import View
from foretune.evaluation.wording import counted


def compared(view: View) -> str:
    """What was compared, on what data and with which model, in a sentence."""
    recipe = _recipe(view.comparison)
    bases = listed([view.labels[name] for name in view.names])
    ways = "as ways to prepare" if len(view.names) > 1 else "as a way to prepare"
    verb = "were compared" if len(view.names) > 1 else "was measured"
    model = _model(recipe.get("model") or {}) or _classes(view)
    source = (recipe.get("tasks") or {}).get("source")
    data = f", on {PurePath(source).name}" if isinstance(source, str) else ""
    tasks = _tasks(view.comparison.get("collection") or {})
    sentence = f"{bases} {verb} {ways} {model} for new tasks{data}{': ' * bool(tasks)}{tasks}."
    return sentence[:1].upper() + sentence[1:]


def facts(view: View) -> str:
    """How it was measured, in a line."""
    adapt = view.comparison["adapt"]
    steps = f" for {counted(adapt['steps'], 'step')}" if adapt.get("steps") else ""
    how = f"with {adapt['method']}{steps}"
    if "methods" in adapt:  # each base in its own way
        how = f"as was best on held-out tasks, in at most {counted(adapt['steps'], 'step')}"
    repeats = {row.get("repeat", row["seed"]) for row in view.comparison["scores"]}
    draws = len({row["seed"] for row in view.comparison["scores"]}) // len(repeats)
    times = counted(len(repeats), "repeat") + f" of {counted(draws, 'draw')}" * (draws > 1)
    scored = f"Scores are {view.scale.axis}, on rows that no training saw"
    return "; ".join([f"{scored}; each task adapted {how}, {times}", *view.rows_drawn()]) + "."


def listed(names: list[str]) -> str:
    """Names as a list in a sentence.

    >>> listed(["a", "b", "c"])
    'a, b and c'
    """
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _tasks(collection: Mapping[str, Any]) -> str:
    parts = []
    if "num_seen" in collection:
        rows = f" ({collection['rows_seen']:,} rows)" if collection.get("rows_seen") else ""
        parts.append(f"{counted(collection['num_seen'], 'task')}{rows} to learn from")
    if "num_unseen" in collection:
        noun = "other task" if parts else "task"
        turns = f" in each of {collection['turns']} turns" if "turns" in collection else ""
        parts.append(f"{counted(collection['num_unseen'], noun)}{turns} to be scored on")
    return ", ".join(parts)


def _recipe(comparison: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first of the recipes in a comparison, as it was written."""
    try:
        recipe = yaml.safe_load(comparison.get("recipe") or "")
    except yaml.YAMLError:  # runs apart that were joined, or another tool's text
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _model(block: Mapping[str, Any]) -> str:
    """The model of a recipe in words; empty where the recipe names none."""
    name = block.get("name") or block.get("file")
    tower = block.get("tower")
    widths = f"a network of {listed([str(width) for width in tower])} units" if tower else ""
    if not isinstance(name, str):
        return widths
    shown = PurePath(name).name
    return f"{widths} on {shown}" if widths else f"the model {shown}"


def _classes(view: View) -> str:
    names = dict.fromkeys(base.get("model_class") for base in view.bases)
    return " and ".join(f"a {name}" for name in names if name) or "a model"
