"""README.md of a run: a model card for readers of the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretune.printable import markdown


def model_card(comparison: dict[str, Any], folder: Path = Path()) -> str:
    """The model card in Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        comparison: The content of `comparison.json`.
        folder: Its folder, in which the code of the card runs.
    """
    from foretune.evaluation.report.snippet import load_lines
    from foretune.evaluation.report.view import View

    best = comparison["verdict"]["best"]
    bases = {base["name"]: base for base in comparison["bases"]}
    chosen = bases[best] if best in bases else next(iter(bases.values()))
    path = chosen.get("path") or "base"
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
        "costs; `comparison.json` has all scores; `foretune run config.yaml` repeats the run.",
        "",
        "| base | method | folder |",
        "|---|---|---|",
        *(
            f"| {markdown(b['label'])} | {b['method']} | `{b.get('path') or '-'}` |"
            for b in bases.values()
        ),
        "",
        "```python",
        *load_lines({**chosen, "path": path}, folder),
        "```",
        "",
    ]
    return "\n".join(lines)
