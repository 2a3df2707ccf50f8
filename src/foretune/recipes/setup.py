"""From a recipe to what the verbs take: a model, and collections with their objective."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from foretune.errors import UserError
from foretune.recipes.console import Console
from foretune.recipes.schema import Recipe
from foretune.tasks.example import SPLITS
from foretune.tasks.objectives import make_objective
from foretune.tasks.readers import one_line
from foretune.tasks.sources import load_tasks
from foretune.tasks.task import Task, TaskCollection


@dataclass(frozen=True)
class Setup:
    """What a recipe's run begins with.

    Args:
        recipe: The recipe.
        model: The model before any retraining.
        tokenizer: None for arrays.
        seen: Tasks to learn from, with their objective.
        search: Tasks on which rates are searched, by adapting to them a base that did not meet
            them, with many rows to be scored on (`held_out.exam`). They are none of the seen ones
            where rates of adapting are searched, because these are chosen for the final bases;
            else they are some of the seen ones.
        unseen: Tasks to adapt to, with their objective; None when the recipe sets none aside.
    """

    recipe: Recipe
    model: Any
    tokenizer: Any
    seen: TaskCollection
    search: TaskCollection
    unseen: TaskCollection | None

    @property
    def known(self) -> list[Task]:
        """The tasks to learn from and to search on."""
        return list({task.name: task for task in (*self.search, *self.seen)}.values())

    @property
    def turns(self) -> int:
        """Repeats after which each task has been an unseen one, where they take turns; else 1."""
        if not self.recipe.tasks.rotate or self.unseen is None:
            return 1
        size = self.recipe.tasks.unseen
        assert isinstance(size, int)  # Source sees to it
        return -(-(len(self.known) + len(self.unseen)) // size)


def set_up(recipe: Recipe, console: Console, repeat: int = 0) -> Setup:
    """Reads the tasks, then the model: bad data should not have to wait for a model."""
    from foretune.evaluation.held_out import exam

    seen, unseen = read_tasks(recipe, repeat)
    searched = search_names(recipe, seen)
    about = f"tasks: {_counted(seen)} seen"
    if searched:
        about += f", of which {len(searched)} choose the learning rates"
    console.say(about + (f", {_counted(unseen)} unseen" if unseen else ""))
    # Label spaces are learnt before there is a tokenizer, because the head's width depends on them.
    objective = make_objective(recipe.objective.kind, None, **recipe.objective_fields())
    fitted = objective.fit(seen)
    model, tokenizer = load(recipe, fitted, seen)
    console.say(f"model: {recipe.model.name or recipe.model.file}")
    seen = seen.with_objective(with_tokenizer(fitted, tokenizer))
    if recipe.model.file is not None:
        _check_forward(model, seen)
    if unseen is not None:
        own = with_tokenizer(objective.fit(unseen), tokenizer)
        unseen = unseen.with_objective(own)
    search = seen
    if searched:
        block, shots = recipe.tasks, recipe.adapt.row_counts
        search = exam(seen.subset(searched), shots, block.seed, block.group_column)
    if len(recipe.adapt.rates) > 1:
        seen = seen.without(searched)
    setup = Setup(recipe, model, tokenizer, seen, search, unseen)
    if recipe.seeds % setup.turns:
        raise UserError(
            f"tasks.rotate: groups of {recipe.tasks.unseen} make {setup.turns} turns here, and "
            f"seeds={recipe.seeds} is no multiple of that: seeds={setup.turns} would do"
        )
    return setup


def read_tasks(recipe: Recipe, repeat: int = 0) -> tuple[TaskCollection, TaskCollection | None]:
    """The (seen, unseen) tasks of a recipe in that repeat, without an objective."""
    return load_tasks(recipe.source(repeat), recipe.objective.kind)


def search_names(recipe: Recipe, seen: TaskCollection) -> list[str]:
    """The seen tasks that choose learning rates; none where nothing is searched.

    On tasks that it was retrained on, a base says little about how well it adapts.
    """
    if len(recipe.adapt.rates) < 2 and not recipe.searches:
        return []
    if len(seen) < 2:
        raise UserError(
            "learning_rates are searched on a seen task that no trial retrains on, and there is "
            "only one seen task: give one learning_rate to retrain with and one to adapt with"
        )
    number = min(recipe.adapt.search_tasks, max(1, len(seen) // 4))
    chosen = set(random.Random(recipe.tasks.seed).sample(sorted(seen.names), number))
    return [name for name in seen.names if name in chosen]


def load(recipe: Recipe, objective: Any, tasks: TaskCollection) -> tuple[Any, Any]:
    """(model, tokenizer) of a recipe; the tokenizer is None for a model of the user's own."""
    from foretune.models import loading, surgery

    block = recipe.model
    if block.file is not None:
        import torch

        with torch.random.fork_rng():
            # Fresh weights must be the same ones when the run is resumed.
            torch.manual_seed(0)
            model = loading.load_module(block.file, block.factory, **block.args)
        if block.trainable_layers is not None:
            surgery.freeze_lower(model, block.trainable_layers)
        return model, None
    assert block.name is not None  # the schema sees to it
    return loading.load_model(
        block.name,
        head=head_of(objective, tasks),
        num_labels=objective.num_outputs(),
        trainable_layers=block.trainable_layers,
        trust_remote_code=block.trust_remote_code,
    )


def _check_forward(model: Any, tasks: TaskCollection) -> None:
    """Shows the user's model one row.

    Raises:
        UserError: It cannot take the row, or its output does not fit the objective.
    """
    import torch

    from foretune.training.data import TaskData
    from foretune.training.model_copies import fresh_copy
    from foretune.training.verbs import objective_of

    objective = objective_of(tasks)
    data = TaskData.of(tasks, objective)
    tried = fresh_copy(model, objective, 0).eval()
    [batch] = data.step([(0, 0)], "train", train=False, seed=[0]).chunks
    try:
        with torch.no_grad():
            objective.losses(tried, batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = getattr(data.slots[0].train[0].get("x"), "shape", None)
        raise UserError(
            f"the model of model.file cannot be trained on these rows, whose x has the shape "
            f"{shape}: {one_line(error)}"
        ) from error


def head_of(objective: Any, tasks: TaskCollection) -> Any:
    """The head that `load_model` should give the model for these tasks."""
    if objective.kind == "classification":
        row = next(row for task in tasks for split in SPLITS for row in task.split(split))
        return "classification" if "text" in row else "image-classification"
    return objective.head


def with_tokenizer(objective: Any, tokenizer: Any) -> Any:
    """The objective with the model's tokenizer, where it has a place for one."""
    if "tokenizer" not in {field.name for field in dataclasses.fields(objective)}:
        return objective
    return dataclasses.replace(objective, tokenizer=tokenizer)


def need_unseen(setup: Setup) -> TaskCollection:
    """The unseen tasks.

    Raises:
        UserError: The recipe sets none aside.
    """
    if setup.unseen is None:
        raise UserError(
            "nothing to compare on: set tasks.unseen to a number of tasks, to their names, or to "
            "a second source"
        )
    return setup.unseen


def _counted(tasks: TaskCollection) -> Any:
    return f"{len(tasks)} ({sum(map(len, tasks))} rows)"
