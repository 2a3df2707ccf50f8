"""README.md of a run: a model card for whoever finds the folder."""

from __future__ import annotations

from typing import Any

from foretune.models.loading_code import loading_code


def model_card(comparison: dict[str, Any]) -> str:
    """The card, in Markdown, with the front matter that the hub reads."""
    from foretune.training.outcome import folder_name

    best = comparison["verdict"]["best"]
    bases = {base["name"]: base for base in comparison["bases"]}
    chosen = bases[best] if best in bases else next(iter(bases.values()))
    path = chosen.get("path") or "base"
    collection = comparison["collection"]
    seen, number = collection.get("num_seen"), collection["num_unseen"]
    tasks = "task" if number == 1 else "tasks"
    some_task = folder_name(comparison["scores"][-1]["task"])
    retrained = "" if seen is None else f" retrained on {seen} tasks and"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [foretune, meta-learning, peft]",
        "---",
        "",
        f"# {comparison['title']}",
        "",
        comparison["verdict"]["sentence"],
        "",
        f"Bases{retrained} compared by adapting each to {number} {tasks} that no retraining saw. "
        "`report.html` shows the "
        "few-shot curves, the differences by task and the costs; `comparison.json` holds every "
        "score; `config.yaml` runs it again.",
        "",
        "| base | method | folder |",
        "|---|---|---|",
        *(f"| {b['label']} | {b['method']} | `{b.get('path') or '-'}` |" for b in bases.values()),
        "",
        "```python",
        *loading_code(
            chosen["model_class"],
            path,
            f"adapters/{chosen['name']}/{some_task}",
            chosen["num_labels"],
        ),
        "```",
        "",
    ]
    return "\n".join(lines)
