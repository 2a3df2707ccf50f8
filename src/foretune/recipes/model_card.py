"""README.md of a run: a model card for readers of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretune.printable import markdown


def model_card(comparison: dict[str, Any], folder: Path = Path()) -> str:
    """The model card in Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        comparison: The content of `comparison.json`.
        folder: Its folder.
    """
    from foretune.evaluation.report.advice import WHERE, advice, run_again
    from foretune.evaluation.report.view import View

    collection = comparison["collection"]
    seen, number = collection.get("num_seen"), collection["num_unseen"]
    tasks = "task" if number == 1 else "tasks"
    retrained = "" if seen is None else f" retrained on {seen} tasks and"
    drawn = "".join(f"; {part}" for part in View(comparison).rows_drawn())
    lines = [
        "---",
        "library_name: transformers",
        "tags: [foretune, meta-learning, peft]",
        "---",
        "",
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
