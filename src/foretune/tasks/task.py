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
        train: Rows to learn from (for an unseen task: the pool from which shots are drawn).
        validation: Rows on which checkpoints and learning rates are chosen.
        test: Rows that only the final score sees.
    """

    name: str
    train: Sequence[Example] = ()
    validation: Sequence[Example] = ()
    test: Sequence[Example] = ()

    def split(self, name: str) -> Sequence[Example]:
        """The rows of one of "train", "validation", "test"."""
        if name not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}; got {name!r}")
        rows: Sequence[Example] = getattr(self, name)
        return rows

    def __len__(self) -> int:
        return sum(len(self.split(name)) for name in SPLITS)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal rows in the same order and splits."""
        return digest_of({name: self.split(name) for name in SPLITS})


class Objective(Protocol):
    """How examples become batches, one loss and one score per example.

    An objective is a frozen dataclass that subclasses this protocol. `fit` returns a new one that
    has learnt from a collection what its batches need (label sets, chance level); only a fitted
    objective encodes. Whatever has a default here need not be written again.

    Attributes:
        kind: As recipes and the command line spell it.
    """

    kind: ClassVar[str]

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
        """What turns text into token ids; None where examples are arrays."""
        return None

    @property
    def space(self) -> tuple[Any, ...] | None:
        """The labels of the outputs, where all tasks share them; None where they do not."""
        return None

    def chance(self) -> float | None:
        """The score of a blind guess; None where there is no such thing."""
        return None

    def num_outputs(self) -> int | None:
        """The width of the head; None when there is no head to size."""
        return None

    def output_labels(self, task: str) -> tuple[Any, ...] | None:
        """The labels of a head's outputs in a task, in order; None where outputs are no labels."""
        return None

    def fit(self, tasks: TaskCollection) -> Self:
        """The objective after learning label sets and the like; checks the data on the way.

        Raises:
            UserError: An example does not fit the objective; the message names task and split.
        """
        ...

    def bind(self, model: nn.Module) -> Self:
        """The objective with what it reads off the model before any training."""
        return self

    def freeze(self, model: nn.Module) -> None:
        """Freezes the parts of the model that this objective never trains."""
        return None

    def shared(self) -> Self:
        """The form whose one head serves all tasks; itself when there is no difference."""
        return self

    def local(self) -> Self:
        """The form for one head per task; itself when there is no difference."""
        return self

    def encode(self, example: Example, task: str) -> dict[str, Any]:
        """One example as lists of ints and arrays, so that it is tokenised only once."""
        ...

    def sample(self, row: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """The encoded example after the random choices that training makes for it."""
        return row

    def size(self, row: Mapping[str, Any]) -> int:
        """Tokens of an encoded example that the model reads; 1 for an example of arrays."""
        return 1

    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        """Stacks encoded examples; `slots[i]` is the slot of the task that example i belongs to."""
        ...

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(n,) one differentiable loss per example."""
        ...

    def scores(self, model: Any, batch: Batch) -> Tensor:
        """(n,) one score per example, higher is better."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields with "kind"; `make_objective(tokenizer=…, **fields)` gives it back."""
        ...


@dataclass(frozen=True)
class TaskCollection:
    """Tasks that share one objective.

    Args:
        tasks: At least one; names must be unique.
        objective: How examples become batches, losses and scores; None until one is chosen.

    Raises:
        UserError: No tasks, an empty task, or a name that stands twice.
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
                raise UserError(f'task names must be unique, "{task.name}" stands twice')
            if not len(task):
                raise UserError(f'task "{task.name}" is empty: it needs at least one example')
            seen.add(task.name)

    @property
    def names(self) -> list[str]:
        return [task.name for task in self.tasks]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, name: str) -> Task:
        found = self._by_name.get(name)
        if found is None:
            raise UserError(f'no task "{name}" in this collection.{did_you_mean(name, self.names)}')
        return found

    @cached_property
    def _by_name(self) -> dict[str, Task]:
        return {task.name: task for task in self.tasks}

    def subset(self, names: Iterable[str]) -> TaskCollection:
        """The tasks of these names, in this order."""
        return replace(self, tasks=tuple(self[name] for name in names))

    def without(self, names: Iterable[str]) -> TaskCollection:
        """All tasks but those of these names."""
        left_out = set(names)
        return self.subset([name for name in self.names if name not in left_out])

    def with_objective(self, objective: Objective) -> TaskCollection:
        """The same tasks under another objective."""
        return replace(self, objective=objective)

    def split(
        self, unseen: int | Sequence[str], seed: int = 0
    ) -> tuple[TaskCollection, TaskCollection]:
        """(seen, unseen) tasks, disjoint.

        Args:
            unseen: How many tasks to set aside (drawn with `seed`), or their names.
            seed: Seeds the draw.
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
        """The task names shuffled and cut into groups of `size`, the last one possibly smaller.

        >>> tasks = TaskCollection(tuple(Task(n, ({"x": 1},)) for n in "abcde"))
        >>> sorted(map(len, tasks.groups(2)))
        [1, 2, 2]
        """
        if not 0 < size < len(self):
            raise UserError(f"groups of {size} cannot be made of {len(self)} tasks")
        names = sorted(self.names)
        random.Random(seed).shuffle(names)
        return [names[i : i + size] for i in range(0, len(names), size)]

    def pooled(self, name: str = "all") -> Task:
        """One task that holds the rows of all."""
        rows = {split: join([task.split(split) for task in self]) for split in SPLITS}
        return Task(name, **rows)
