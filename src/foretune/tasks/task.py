"""`Task`: a named set of examples. `TaskCollection`: tasks that share one `Objective`."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from foretune.errors import UserError, did_you_mean
from foretune.tasks.digest import digest_of
from foretune.tasks.example import SPLITS, Example
from foretune.tasks.row_store import join

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from foretune.tasks.batch import Batch


@dataclass(frozen=True)
class Task:
    """A named set of examples.

    Args:
        name: Unique within its collection.
        train: Examples to learn from (for an unseen task: the pool from which shots are drawn).
        validation: Examples on which checkpoints and learning rates are chosen.
        test: Examples that only the final score uses.
    """

    name: str
    train: Sequence[Example] = ()
    validation: Sequence[Example] = ()
    test: Sequence[Example] = ()

    def split(self, name: str) -> Sequence[Example]:
        """The examples of one of "train", "validation", "test".

        Raises:
            UserError: There is no such split.
        """
        if name not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}; got {name!r}")
        examples: Sequence[Example] = getattr(self, name)
        return examples

    def __len__(self) -> int:
        return sum(len(self.split(name)) for name in SPLITS)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal examples in the same order and splits."""
        return digest_of({name: self.split(name) for name in SPLITS})


class Objective(Protocol):
    """How examples become batches, with one loss and one score per example.

    An objective is a frozen dataclass that subclasses this protocol. `fit` returns a new one that
    has learnt from a collection what its batches need (label sets, chance level); only a fitted
    objective encodes. Members with a default here need not be overridden.

    Attributes:
        kind: The name of the objective in recipes and on the command line.
        select_by_loss: Whether held-out tasks select how to adapt by the loss, because the score,
            such as an accuracy, says little about each example.
    """

    kind: ClassVar[str]
    select_by_loss: ClassVar[bool] = False

    @property
    def metric(self) -> str:
        """The name of the score; higher is always better."""
        ...

    @property
    def head(self) -> str:
        """The head that `load_model` should give the model."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of text examples; None where examples are arrays."""
        return None

    @property
    def space(self) -> tuple[Any, ...] | None:
        """The labels of the outputs where all tasks share them, else None."""
        return None

    def chance(self) -> float | None:
        """The expected score of a random guess; None where it is undefined."""
        return None

    def num_outputs(self) -> int | None:
        """The number of outputs of the head; None where the objective does not determine it."""
        return None

    def output_labels(self, task: str) -> tuple[Any, ...] | None:
        """The labels of a head's outputs in a task, in order; None where outputs have no labels."""
        return None

    def common_labels(self) -> tuple[str, ...] | None:
        """The labels, as texts, that the outputs of a head stand for in every task, in order.

        Empty where outputs have no labels; None where they stand for other labels in other tasks.
        """
        return ()

    def fit(self, tasks: TaskCollection) -> Self:
        """The objective with what it learns from the tasks, such as label sets; checks the data.

        Raises:
            UserError: An example does not fit the objective; the message names task and split.
        """
        ...

    def bind(self, model: nn.Module) -> Self:
        """The objective with what it derives from the model before any training."""
        return self

    def freeze(self, model: nn.Module) -> None:
        """Freezes the parts of the model that this objective never trains."""
        return None

    def shared(self) -> Self:
        """The form for one head that serves all tasks; itself if there is no difference."""
        return self

    def local(self) -> Self:
        """The form for one head per task; itself if there is no difference."""
        return self

    def encode(self, example: Example, task: str) -> dict[str, Any]:
        """One example as lists of ints and arrays; done once per example, before training."""
        ...

    def sample(self, row: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """The encoded example after the random draws that training makes for it."""
        return row

    def token_ids(
        self, row: Mapping[str, Any], *, encoder_decoder: bool = False
    ) -> Iterable[Sequence[int]]:
        """The token ids of each text of an encoded example, as the model reads it at once."""
        return [row["input_ids"]] if "input_ids" in row else []

    def size(self, row: Mapping[str, Any]) -> int:
        """The number of tokens of an encoded example; 1 for an example of arrays."""
        return 1

    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        """Stacks encoded examples; `slots[i]` is the slot of the task that example i belongs to."""
        ...

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(n,) differentiable losses, one per example."""
        ...

    def scores(self, model: Any, batch: Batch) -> Tensor:
        """(n,) scores, one per example; higher is better."""
        ...

    def scores_and_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(n,) scores and (n,) losses, by which ways to adapt are compared (`select_by_loss`).

        Overridden where a single pass gives both.
        """
        return self.scores(model, batch), self.losses(model, batch)

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """(n, k) what is predicted: logits of labels, scores of candidates, or values.

        Of labels and candidates the highest is the prediction, the softmax its probabilities; −inf
        where a row has fewer. It does not depend on the rows' answers.

        Raises:
            UserError: This kind of objective predicts nothing of a row.
        """
        raise UserError(f"{self.kind} tells nothing of a row that could be predicted")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields with "kind"; `make_objective(tokenizer=…, **fields)` restores it."""
        ...


@dataclass(frozen=True)
class TaskCollection:
    """Tasks that share one objective.

    Args:
        tasks: One or more tasks with unique names.
        objective: How examples become batches, losses and scores; None until one is chosen.

    Raises:
        UserError: There are no tasks, a task is empty, or two tasks have the same name.
    """

    tasks: tuple[Task, ...]
    objective: Objective | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise UserError("a collection needs at least one task, got none")
        seen: set[str] = set()
        for task in self.tasks:
            if task.name in seen:
                raise UserError(f'task names must be unique, but two tasks are named "{task.name}"')
            if not len(task):
                raise UserError(f'task "{task.name}" is empty: it needs at least one example')
            seen.add(task.name)

    @property
    def names(self) -> list[str]:
        """The names of the tasks, in order."""
        return [task.name for task in self.tasks]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, name: str) -> Task:
        task = self._by_name.get(name)
        if task is None:
            raise UserError(f'no task "{name}" in this collection.{did_you_mean(name, self.names)}')
        return task

    @cached_property
    def _by_name(self) -> dict[str, Task]:
        return {task.name: task for task in self.tasks}

    def subset(self, names: Iterable[str]) -> TaskCollection:
        """The tasks with these names, in this order."""
        return replace(self, tasks=tuple(self[name] for name in names))

    def without(self, names: Iterable[str]) -> TaskCollection:
        """All tasks but those with these names."""
        excluded = set(names)
        return self.subset([name for name in self.names if name not in excluded])

    def with_objective(self, objective: Objective) -> TaskCollection:
        """The same tasks with another objective."""
        return replace(self, objective=objective)

    def split(
        self, unseen: int | Sequence[str], seed: int = 0
    ) -> tuple[TaskCollection, TaskCollection]:
        """(seen, unseen) tasks, disjoint.

        Args:
            unseen: Number of unseen tasks, which are drawn, or their names.
            seed: Random seed of the draw.

        Raises:
            UserError: There is no such task, or no task would be seen or unseen.
        """
        if isinstance(unseen, int):
            if not 0 < unseen < len(self):
                raise UserError(
                    f"unseen must leave at least one task on each side: got unseen={unseen} "
                    f"of {len(self)} task{'s' if len(self) > 1 else ''}"
                )
            chosen = set(random.Random(seed).sample(sorted(self.names), unseen))
        else:
            chosen = {self[name].name for name in unseen}
            if not 0 < len(chosen) < len(self):
                raise UserError(
                    f"unseen must leave at least one task on each side: it names {len(chosen)} "
                    f"of {len(self)} tasks"
                )
        seen_names = [n for n in self.names if n not in chosen]
        return self.subset(seen_names), self.subset([n for n in self.names if n in chosen])

    def groups(self, size: int, seed: int = 0) -> list[list[str]]:
        """The task names, shuffled and split into groups of `size`; the last may be smaller.

        Raises:
            UserError: The size is not between 1 and the number of tasks − 1.

        >>> tasks = TaskCollection(tuple(Task(n, ({"x": 1},)) for n in "abcde"))
        >>> sorted(map(len, tasks.groups(2)))
        [1, 2, 2]
        """
        if not 0 < size < len(self):
            raise UserError(f"cannot split {len(self)} tasks into groups of {size}")
        names = sorted(self.names)
        random.Random(seed).shuffle(names)
        return [names[i : i + size] for i in range(0, len(names), size)]

    def pooled(self, name: str = "all") -> Task:
        """One task with the examples of all tasks."""
        splits = {split: join([task.split(split) for task in self]) for split in SPLITS}
        return Task(name, **splits)
