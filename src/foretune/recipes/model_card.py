"""README.md of a run: a model card for readers of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError
from foretune.files import TOKENIZER_CONFIG_FILE
from foretune.models.hub_card import front_matter, result, task_type
from foretune.printable import markdown
from foretune.recipes.yaml_io import parse_yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TAGS = ("foretune", "meta-learning", "peft")


def model_card(comparison: dict[str, Any], folder: Path = Path()) -> str:
    """The model card in Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        comparison: The content of `comparison.json`.
        folder: Its folder.
    """
    from foretune.evaluation.report.advice import WHERE, advice, best_base, run_again
    from foretune.evaluation.report.view import View

    best, collection = best_base(comparison), comparison["collection"]
    seen, number = collection.get("num_seen"), collection["num_unseen"]
    tasks = "task" if number == 1 else "tasks"
    retrained = "" if seen is None else f" retrained on {seen} tasks and"
    drawn = "".join(f"; {part}" for part in View(comparison).rows_drawn())
    lines = [
        front_matter(
            library="transformers",
            tags=TAGS,
            name=comparison["title"],
            base_model=comparison.get("base_model"),
            datasets=comparison.get("datasets") or [],
            results=results_of(comparison, best["name"], folder / (best.get("path") or "base")),
        ),
        f"# {markdown(comparison['title'])}",
        "",
        markdown(comparison["verdict"]["sentence"]),
        "",
        f"Bases{retrained} compared by adapting each to {number} {tasks} that were not part of "
        f"any retraining{drawn}. `report.html` shows few-shot curves, differences by task and "
        "costs; `comparison.json` and `scores.csv` have all scores.",
        "",
        "| base | method | folder |",
        "|---|---|---|",
        *(
            f"| {markdown(b['label'])} | {b['method']} | `{b.get('path') or '-'}` |"
            for b in comparison["bases"]
        ),
        "",
    ]
    steps = advice(comparison, folder)
    for step in steps:
        lines += [markdown(step.sentence), f"```{step.language}", step.code, "```", ""]
    again = run_again(comparison, folder)
    if again is not None:
        lines += ["To run it again:", "```shell", again, "```", ""]
    if steps or again is not None:
        lines += [WHERE, ""]
    return "\n".join(lines)


def results_of(comparison: dict[str, Any], name: str, base: Path) -> list[EvalResult]:
    """The mean scores of a base on the unseen tasks, as the Hub lists them.

    Args:
        comparison: The content of `comparison.json`.
        name: Name of the base.
        base: Its folder.
    """
    from foretune.evaluation.report.view import View

    view, metric = View(comparison), comparison["metric"]["name"]
    kind = _objective(comparison.get("recipe") or "")
    number = comparison["collection"]["num_unseen"]
    tasks = "task that was" if number == 1 else "tasks that were"
    return [
        result(
            task_type(kind, (base / TOKENIZER_CONFIG_FILE).is_file()),
            f"{number} {tasks} not part of any retraining",
            metric,
            row["mean"],
            f"mean {metric}, {view.shots_label(row['shots'])}",
        )
        for row in comparison["means"]
        if row["base"] == name
    ]


def _objective(recipe: str) -> str | None:
    """The kind of a recipe's objective; None where it names none."""
    try:
        content = parse_yaml(recipe, "the recipe")
    except UserError:  # recipes of runs that were joined
        return None
    objective = content.get("objective") if isinstance(content, dict) else None
    return objective.get("kind") if isinstance(objective, dict) else None
