"""`recipe_conflict`: whether a recipe's retraining is likely to pay, before anything is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from foretune.errors import UserError
from foretune.evaluation.conflict import KINDS, Conflict
from foretune.recipes.console import Console
from foretune.recipes.setup import Setup
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.example import DrawnExample, Example
from foretune.tasks.responses import true_response
from foretune.tasks.task import Task, TaskCollection


def recipe_conflict(setup: Setup, console: Console) -> Conflict | str:
    """The conflict of a recipe's seen tasks, or why it cannot be measured.

    Args:
        setup: The recipe's model and tasks.
        console: Is told that it takes some seconds.
    """
    from foretune.evaluation.frozen_features import conflict_on

    recipe = setup.recipe
    if recipe.objective.kind not in KINDS:
        return f"it cannot be measured for {recipe.objective.kind}"
    console.say("measuring how far tasks contradict one another")
    source = recipe.source()

    def redraw(part: TaskCollection) -> TaskCollection:
        own_task = source.candidates_from == "own"
        columns, part = source.group_column, _without_candidates(part)
        return draw_candidates(part, source.num_candidates, source.seed, None, columns, own_task)

    try:
        return conflict_on(
            setup.model,
            setup.all_seen,
            shots=recipe.adapt.row_counts,
            redraw=redraw,
            seed=source.seed,
        )
    except UserError as error:
        return f"it cannot be measured: {error}"


def conflict_record(conflict: Conflict | str) -> dict[str, Any]:
    """What `recipe_conflict` returned, as JSON types."""
    return {"unmeasured": conflict} if isinstance(conflict, str) else conflict.to_dict()


def _without_candidates(tasks: TaskCollection) -> TaskCollection:
    """The tasks without test rows, and without candidates that were drawn."""

    def rows(examples: Sequence[Example]) -> list[Example]:
        return [_without_drawn(e) if isinstance(e, DrawnExample) else e for e in examples]

    bare = [Task(t.name, train=rows(t.train), validation=rows(t.validation)) for t in tasks]
    return dataclasses.replace(tasks, tasks=tuple(bare))


def _without_drawn(example: DrawnExample) -> Example:
    fields = {key: value for key, value in example.items() if key not in ("candidates", "answer")}
    return {**fields, "response": true_response(example)}
