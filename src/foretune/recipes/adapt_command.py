"""The command that a run prints at its end: adapt the best base to new tasks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foretune.recipes.schema import Recipe


def adapt_command(recipe: Recipe, comparison: Mapping[str, Any]) -> str:
    """The `foretune adapt` command that adapts the best base of a run to new tasks as the run did.

    Its folder says how it is adapted, unless the recipe fixed that.
    """
    base = best_base(comparison)
    changes: dict[str, Any] = {}
    if not recipe.adapt.searches:
        changes = recipe.adapt.model_dump(
            mode="json", exclude_defaults=True, exclude={"shots", "draws", "search_tasks"}
        )
    reading = {"task_column", "group_column", "columns", "num_candidates", "candidate_pool"}
    reading |= {"candidates_from", "candidate_seed", "splits", "messages"}
    data = recipe.tasks.model_dump(mode="json", exclude_defaults=True, include=reading)
    changes |= {f"tasks.{key}": value for key, value in data.items()}
    settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    words = [str(recipe.folder / base["path"]), "--tasks", "NEW.jsonl"]
    if recipe.model.file or recipe.model.trust_remote_code:
        words.append("--trust-remote-code")  # as the recipe did, by naming the file
    return shlex.join(["foretune", "adapt", *words, *settings])


def best_base(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """The base of the verdict or, without one, that with the highest mean at its shots."""
    verdict = comparison["verdict"]
    rows = [row for row in comparison["means"] if row["shots"] == verdict["shots"]]
    best = verdict["best"] or max(rows, key=lambda row: row["mean"])["base"]
    return next(base for base in comparison["bases"] if base["name"] == best)
