"""The words of commands that a report shows: adapt as a run did, compare once more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.models.precision import Precision, precision_of
from foretune.models.trusted_code import is_trusted

if TYPE_CHECKING:
    from foretune.recipes.schema import Recipe


def adapt_with(recipe: Recipe) -> list[str]:
    """What follows the base and the rows in `foretune adapt`.

    The folder of a base says how it is adapted, unless the recipe fixed that.
    """
    changes: dict[str, Any] = {}
    if not recipe.adapt.searches:
        changes = recipe.adapt.model_dump(
            mode="json", exclude_defaults=True, exclude={"shots", "draws", "search_tasks"}
        )
    reading = {"task_column", "group_column", "columns", "num_candidates", "candidate_pool"}
    reading |= {"candidates_from", "candidate_seed", "splits", "messages"}
    data = recipe.tasks.model_dump(mode="json", exclude_defaults=True, include=reading)
    changes |= {f"tasks.{key}": value for key, value in data.items()}
    # As the recipe did, by naming the file.
    trusts = bool(recipe.model.file or recipe.model.trust_remote_code)
    settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    return ["--trust-remote-code"] * trusts + settings


def loading_words(objective: str | None) -> list[str]:
    """The options that say how the bases of this command are loaded; empty for the defaults."""
    held = precision_of(None, None)
    words = ["--trust-remote-code"] * is_trusted(False)
    if held != Precision():
        words += ["--dtype", str(held.dtype)]
    words += [] if held.quantize is None else ["--quantize", held.quantize]
    return words + ([] if objective is None else ["--objective", objective])


def compare_words(
    folders: Sequence[Path],
    tasks: str,
    changes: Sequence[str],
    shots: Sequence[int | None],
    draws: int,
    objective: str | None,
) -> list[str]:
    """The words of a `foretune compare` but `--out`; see `compare_folders`."""
    numbers = ",".join("all" if number is None else str(number) for number in shots)
    words = ["foretune", "compare", *map(str, folders), *changes, "--tasks", tasks]
    return [*words, "--shots", numbers, "--seeds", str(draws), *loading_words(objective)]
