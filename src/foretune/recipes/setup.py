"""From a recipe to the arguments of the verbs: a model, and tasks with their objective."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

from foretune.errors import UserError
from foretune.processes import num_processes
from foretune.recipes.console import Console
from foretune.recipes.forgetting import check_forgetting
from foretune.recipes.schema import Recipe
from foretune.recipes.text_checks import Alike, check_texts
from foretune.recipes.trackers import check_trackers
from foretune.tasks.example import SPLITS
from foretune.tasks.file_formats import one_line
from foretune.tasks.labels import label_text
from foretune.tasks.objectives import make_objective
from foretune.tasks.rows import CLASSES
from foretune.tasks.sources import load_tasks
from foretune.tasks.task import TaskCollection


@dataclass(frozen=True)
class Setup:
    """The inputs of a run, and of one of its repeats.

    Args:
        recipe: The recipe.
        model: The model before any retraining.
        tokenizer: The tokenizer of the model; None for arrays.
        all_seen: All tasks that may be retrained on, with their objective.
        unseen: Tasks to adapt to, with their objective; None if the recipe has none.
        seen: The tasks that this repeat retrains on.
        held_out: The other seen tasks, by which everything in this repeat is chosen
            (`held_out.build_search_tasks`); None if nothing is.
        turn: The turn of `tasks.rotate` that the tasks are those of.
    """

    recipe: Recipe
    model: Any
    tokenizer: Any
    all_seen: TaskCollection
    unseen: TaskCollection | None
    seen: TaskCollection
    held_out: TaskCollection | None = None
    turn: int = 0

    @property
    def turns(self) -> int:
        """Repeats after which each task has been unseen once, with `tasks.rotate`; else 1."""
        if not self.recipe.tasks.rotate or self.unseen is None:
            return 1
        size = self.recipe.tasks.unseen
        assert isinstance(size, int)  # checked by Source
        return -(-(len(self.all_seen) + len(self.unseen)) // size)

    @property
    def shots_unit(self) -> str:
        """What a number of shots counts."""
        return "rows per class" if self.recipe.objective.kind in CLASSES else "rows"

    def for_repeat(self, repeat: int) -> Setup:
        """The same inputs with the held-out tasks of another repeat, drawn by its seed.

        Raises:
            UserError: There is only one seen task, or no held-out task has examples to score on.
        """
        names = held_out_names(self.recipe, self.all_seen, repeat)
        if not names:
            return dataclasses.replace(self, seen=self.all_seen, held_out=None)
        from foretune.evaluation.held_out import build_search_tasks

        source, shots = self.recipe.source(self.turn), self.recipe.adapt.row_counts
        return dataclasses.replace(
            self,
            seen=self.all_seen.without(names),
            held_out=build_search_tasks(
                self.all_seen.subset(names), shots, source.seed, source.group_column
            ),
        )


def set_up(recipe: Recipe, console: Console, turn: int = 0, *, weights: bool = True) -> Setup:
    """Reads the tasks, then the model, so that bad data is reported early.

    Args:
        recipe: The recipe.
        console: Receives what was read.
        turn: The turn of `tasks.rotate`, which is the number of the repeat.
        weights: Whether the model's weights are loaded; else it is on the meta device.

    Returns:
        The setup of the repeat with this number.

    Raises:
        UserError: The data or the model does not fit the recipe.
    """
    from foretune.training.loop import check_device

    check_device(recipe.device)
    check_trackers(recipe.trackers)
    seen, unseen = read_tasks(recipe, turn)
    num_held_out = len(held_out_names(recipe, seen, turn))
    counts = f"tasks: {_counted(seen)} seen"
    if num_held_out:
        counts += f" ({num_held_out} of them held out to choose by)"
    console.say(counts + (f", {_counted(unseen)} unseen" if unseen else ""))
    # The labels are collected before the model is loaded: the width of its head depends on them.
    objective = make_objective(recipe.objective.kind, None, **recipe.objective_fields())
    fitted = objective.fit(seen)
    model, tokenizer = load(recipe, fitted, seen, weights=weights)
    console.say(f"model: {recipe.model}" + ("" if weights else ", its shapes alone"))
    check_tokenizer(recipe.model.name or recipe.model.file, tokenizer, fitted, seen)
    seen = seen.with_objective(with_tokenizer(fitted, tokenizer))
    if recipe.model.file is not None:
        _check_forward(model, seen)
    if unseen is not None:
        unseen = unseen.with_objective(with_tokenizer(objective.fit(unseen), tokenizer))
    check_sides(model, seen, unseen, console)
    if recipe.answers and num_processes() > 1:
        raise UserError("questions are answered in a single process: set answers to 0")
    if recipe.answers and not _has_conversations(unseen):
        raise UserError(
            f"answers={recipe.answers}: no test row of an unseen task has messages to answer; set "
            "answers to 0"
        )
    if recipe.forgetting is not None:
        check_forgetting(recipe.forgetting, model, tokenizer)
    setup = Setup(recipe, model, tokenizer, seen, unseen, seen, turn=turn)
    if recipe.seeds % setup.turns:
        raise UserError(
            f"tasks.rotate with unseen={recipe.tasks.unseen} gives {setup.turns} turns; seeds must "
            f"be a multiple of {setup.turns}, got {recipe.seeds}"
        )
    return setup.for_repeat(turn)


def _has_conversations(tasks: TaskCollection | None) -> bool:
    """Whether a test row has `messages`."""
    return any("messages" in row for task in tasks or () for row in task.test)


def check_sides(
    model: Any, seen: TaskCollection, unseen: TaskCollection | None, console: Console
) -> None:
    """Checks all texts of both sides; says where there is nothing to tell apart.

    Raises:
        UserError: The model cannot read a text.
    """
    for tasks in (seen, unseen):
        alike = Alike() if tasks is None else check_texts(tasks, model)
        if alike.count:
            console.say(str(alike))
    labels = {
        label_text(label)
        for tasks in (seen, unseen)
        if tasks is not None and tasks.objective is not None
        for name in tasks.names
        for label in tasks.objective.local().output_labels(name) or ()
        if label is not None
    }
    if len(labels) == 1:
        console.say(f'all rows have the label "{labels.pop()}": there is nothing to learn')


def read_tasks(recipe: Recipe, repeat: int = 0) -> tuple[TaskCollection, TaskCollection | None]:
    """The (seen, unseen) tasks of a recipe in this repeat, without an objective."""
    return load_tasks(recipe.source(repeat), recipe.objective.kind)


def held_out_names(recipe: Recipe, seen: TaskCollection, repeat: int) -> list[str]:
    """Names of the seen tasks that one repeat chooses by; empty if nothing is chosen.

    No base of the repeat is retrained on them, because the score on tasks that a base was retrained
    on says little about how well it adapts. Each repeat draws others, so that the luck of the
    choice is part of what differs between repeats.

    Raises:
        UserError: There is only one seen task.
    """
    if not recipe.holds_out:
        return []
    if len(seen) < 2:
        raise UserError(
            "what to take is chosen on held-out seen tasks, but there is only one seen task: set "
            "retrain.learning_rate, adapt.method and adapt.learning_rate instead"
        )
    number = min(recipe.adapt.search_tasks, max(1, len(seen) // 4))
    rng = random.Random(f"{recipe.source().seed} {repeat}")
    chosen = set(rng.sample(sorted(seen.names), number))
    return [name for name in seen.names if name in chosen]


def load(
    recipe: Recipe, objective: Any, tasks: TaskCollection, *, weights: bool = True
) -> tuple[Any, Any]:
    """(model, tokenizer) of a recipe; the tokenizer is None for a model of arrays.

    Raises:
        UserError: The model cannot be loaded, or a tower does not read such rows.
    """
    from foretune.models import loading, surgery

    block = recipe.model
    if block.tower is not None:
        row = _first_row(tasks)
        if block.name is None:
            return _array_tower(block.tower, row, objective), None
        if "x" in row and "text" not in row:
            raise UserError(
                f"the rows are arrays (x), which {block.name} does not read: for a tower on the "
                "arrays themselves leave model.name out"
            )
    if block.file is not None:
        import torch

        from foretune.models.seeding import seed_generators

        with torch.random.fork_rng():
            # Fresh weights must be the same when the run is resumed.
            seed_generators(0)
            model = loading.load_module(block.file, block.factory, **block.args)
        if block.trainable_layers is not None:
            surgery.freeze_lower(model, block.trainable_layers)
        return model, None
    assert block.name is not None  # checked by ModelBlock
    return loading.load_model(
        block.name,
        head=head_of(objective, tasks),
        num_labels=objective.num_outputs(),
        labels=objective.shared().space or (),
        trainable_layers=block.trainable_layers,
        tower=block.tower,
        chat_template=block.chat_template,
        trust_remote_code=block.trust_remote_code,
        weights=weights,
    )


def _array_tower(widths: list[int], row: Any, objective: Any) -> Any:
    """A tower that reads the arrays of such rows.

    Raises:
        UserError: They are texts.
    """
    import numpy as np

    from foretune.models.tower_models import array_tower

    if "x" not in row:
        raise UserError(
            f"model.tower without model.name reads arrays (x); the rows have {', '.join(row)}: "
            "add the name of an encoder, such as minilm"
        )
    outputs = objective.num_outputs() or np.size(row["y"])
    return array_tower(np.size(row["x"]), widths, outputs)


def _first_row(tasks: TaskCollection) -> Any:
    return next(row for task in tasks for split in SPLITS for row in task.split(split))


def _check_forward(model: Any, tasks: TaskCollection) -> None:
    """Calls the user's model on one row.

    Raises:
        UserError: The call fails, or the output does not fit the objective.
    """
    import torch

    from foretune.training.data import TaskData
    from foretune.training.model_copies import fresh_copy
    from foretune.training.verbs import objective_of

    objective = objective_of(tasks)
    data = TaskData.of(tasks, objective)
    copy = fresh_copy(model, objective, 0).eval()
    [batch] = data.step([(0, 0)], "train", train=False, seed=[0]).chunks
    try:
        with torch.no_grad():
            objective.losses(copy, batch)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = getattr(data.slots[0].train[0].get("x"), "shape", None)
        raise UserError(
            f"the model of model.file cannot be trained on these rows, whose x has the shape "
            f"{shape}: {one_line(error)}"
        ) from error


def head_of(objective: Any, tasks: TaskCollection) -> Any:
    """The head that `load_model` should add for these tasks."""
    if objective.kind == "classification":
        return "classification" if "text" in _first_row(tasks) else "image-classification"
    return objective.head


def check_tokenizer(model: Any, tokenizer: Any, objective: Any, tasks: TaskCollection) -> None:
    """Checks that there is a tokenizer for texts.

    Raises:
        UserError: The rows are texts, and the model came without a tokenizer.
    """
    reads_text = "tokenizer" in {field.name for field in dataclasses.fields(objective)}
    rows = (row for task in tasks for split in SPLITS for row in task.split(split))
    if tokenizer is None and reads_text and not any("x" in row for row in rows):
        raise UserError(
            f"{model} comes without a tokenizer, and the rows are texts: save the tokenizer in the "
            "model's folder, with tokenizer.save_pretrained(folder)"
        )


def with_tokenizer(objective: Any, tokenizer: Any) -> Any:
    """The objective with the tokenizer, if it has a field for one."""
    if "tokenizer" not in {field.name for field in dataclasses.fields(objective)}:
        return objective
    return dataclasses.replace(objective, tokenizer=tokenizer)


def need_unseen(setup: Setup) -> TaskCollection:
    """The unseen tasks of the setup.

    Raises:
        UserError: The recipe has none.
    """
    if setup.unseen is None:
        raise UserError(
            "nothing to compare on: set tasks.unseen to a number of tasks, to their names, or to "
            "a second source"
        )
    return setup.unseen


def _counted(tasks: TaskCollection) -> Any:
    return f"{len(tasks)} ({sum(map(len, tasks))} rows)"
