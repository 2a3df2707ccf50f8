"""`recipe_conflict`: whether a recipe's retraining is likely to pay, before anything is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

from foretune.errors import UserError
from foretune.evaluation.conflict import KINDS, Conflict
from foretune.recipes.console import Console
from foretune.recipes.setup import Setup
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.drawn_rows import undrawn
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
    # Few of the rows will be read: their distractors are drawn anew, from one another.
    splits = ("train", "validation")
    tasks = [
        Task(t.name, **{split: undrawn(t.split(split)) for split in splits}) for t in setup.seen
    ]

    def draw(part: TaskCollection) -> TaskCollection:
        own_task = source.candidates_from == "own"
        columns = source.group_column
        return draw_candidates(part, source.num_candidates, source.seed, None, columns, own_task)

    try:
        return conflict_on(
            setup.model,
            dataclasses.replace(setup.seen, tasks=tuple(tasks)),
            shots=recipe.adapt.row_counts,
            draw_candidates=draw,
            seed=source.seed,
        )
    except UserError as error:
        return f"it cannot be measured: {error}"


def conflict_record(conflict: Conflict | str) -> dict[str, Any]:
    """What `recipe_conflict` returned, as JSON types."""
    return {"unmeasured": conflict} if isinstance(conflict, str) else conflict.to_dict()
