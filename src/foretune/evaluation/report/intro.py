"""The first lines of a report: what was compared, on what data, with which model, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from foretune.evaluation.report.view import View
from foretune.evaluation.wording import counted, listed


def compared(view: View) -> str:
    """What was compared, with which model and on what data, in words."""
    recipe = _recipe(view.comparison)
    bases = listed([view.labels[name] for name in view.names])
    number = len(view.names)
    ways, verb = ("ways", "were compared") if number > 1 else ("way", "was measured")
    model = _model(recipe.get("model") or {}) or _classes(view)
    data = _data(view.comparison, recipe)
    prepared = f"{_spelt(number)} {ways} to prepare {model} for tasks that it has not seen"
    sentences = [f"{prepared} {verb}: {bases}."]
    tasks = _tasks(view.comparison.get("collection") or {})
    if data or tasks:
        sentences.append(f"The data: {data}{', with ' * bool(data and tasks)}{tasks}.")
    return " ".join(sentences)


def headline(view: View) -> tuple[str, str, str]:
    """The verdict's sentence as its answer, the numbers that support it, and the other bases."""
    sentence, start = str(view.comparison["verdict"]["sentence"]), 0
    if view.best in view.labels and view.methods[view.best] != "none":  # that has another name
        label = view.labels[view.best]  # which may hold a colon
        start = sentence.index(label) + len(label) if label in sentence else 0
    first, stop, rest = sentence[start:].partition(". ")
    answer, colon, margins = first.partition(": ")
    return sentence[:start] + answer + colon.strip(), margins + stop.strip(), rest


def facts(view: View) -> str:
    """How it was measured, in a few sentences."""
    adapt = view.comparison["adapt"]
    steps = f" for {counted(adapt['steps'], 'step')}" if adapt.get("steps") else ""
    how = f"with {adapt['method']}{steps}"
    if "methods" in adapt:  # each base in its own way
        how = (
            f"in the way that was best on held-out tasks, for at most "
            f"{counted(adapt['steps'], 'step')}"
        )
    repeats = {row.get("repeat", row["seed"]) for row in view.comparison["scores"]}
    draws = len({row["seed"] for row in view.comparison["scores"]}) // len(repeats)
    times = counted(len(repeats), "repeat") + f" of {counted(draws, 'draw')}" * (draws > 1)
    sentences = [
        f"Scores are {view.scale.axis}, on rows that no training saw, in {times}.",
        f"Each base was adapted to each task {how}.",
    ]
    drawn = view.rows_drawn()
    return " ".join([*sentences, *([f"Rows to adapt on: {'; '.join(drawn)}."] if drawn else [])])


def _tasks(collection: Mapping[str, Any]) -> str:
    parts = []
    if "num_seen" in collection:
        rows = f" ({collection['rows_seen']:,} rows)" if collection.get("rows_seen") else ""
        parts.append(f"{counted(collection['num_seen'], 'task')}{rows} to learn from")
    if "num_unseen" in collection:
        noun = "other task" if parts else "task"
        turns = f" in each of {collection['turns']} turns" if "turns" in collection else ""
        parts.append(f"{counted(collection['num_unseen'], noun)}{turns} to be scored on")
    return " and ".join(parts)


def _data(comparison: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The name of the data; empty where it is not recorded."""
    source = (recipe.get("tasks") or {}).get("source") or comparison.get("data")
    return PurePath(source).name if isinstance(source, str) else ""


def _spelt(number: int) -> str:
    """A number at the beginning of a sentence."""
    words = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
    return words[number - 1] if number <= len(words) else str(number)


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
