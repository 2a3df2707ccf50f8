"""N-way K-shot episodes: small tasks drawn from the classes of a larger one.

Vinyals et al., "Matching networks for one shot learning", NeurIPS 2016, arXiv:1606.04080, 4.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foretune.errors import UserError, did_you_mean
from foretune.run import check_int
from foretune.tasks.labels import label_of
from foretune.tasks.row_store import select
from foretune.tasks.rows import CLASSES
from foretune.tasks.task import Task, TaskCollection


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """How episodes are drawn.

    Args:
        number: Number of episodes.
        ways: Classes of an episode.
        shots: Training examples of each class.
        queries: Test examples of each class.
    """

    number: int = 100
    ways: int = 5
    shots: int = 1
    queries: int = 15

    def __post_init__(self) -> None:
        check_int("episodes.number", self.number, 1)
        check_int("episodes.ways", self.ways, 2)
        check_int("episodes.shots", self.shots, 1)
        check_int("episodes.queries", self.queries, 1)

    @classmethod
    def of(cls, fields: Any) -> Episodes:
        """Episodes from a mapping of their fields.

        Raises:
            UserError: It is none, or a field is unknown or out of range.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(fields, Mapping):
            raise UserError(f"episodes must map {', '.join(names)} to numbers, got {fields!r}")
        for name in fields:
            if name not in names:
                raise UserError(f'episodes have no "{name}".{did_you_mean(str(name), names)}')
        return cls(**fields)


def draw_episodes(
    tasks: TaskCollection, how: Episodes, seed: int = 0, *, kind: str = "classification"
) -> TaskCollection:
    """The episodes "episode 1", "episode 2", …, each of the classes of one of the tasks in turn.

    No example is both a training and a test example of an episode. Where a task has test examples,
    those of an episode are drawn from them, else all are drawn from its training examples.

    Args:
        tasks: Labelled tasks, whose classes are drawn.
        how: Number and size of the episodes.
        seed: Random seed of the draws; a larger number of episodes begins with the same ones.
        kind: The kind of objective, whose examples must have labels.

    Raises:
        UserError: The examples have no labels, or a task has too few classes with enough examples.
    """
    if kind not in CLASSES:
        raise UserError(
            f"episodes are drawn from classes, which {kind} does not have; they are for "
            f"{' and '.join(CLASSES)}"
        )
    pools = [_Pool.of(task, how) for task in tasks]
    drawn = [
        pools[number % len(pools)].episode(f"episode {number + 1}", how, [seed, number])
        for number in range(how.number)
    ]
    return TaskCollection(tuple(drawn), tasks.objective)


@dataclass(frozen=True)
class _Pool:
    """The places of a task's examples, by class, for the classes that have enough of them."""

    task: Task
    train: Mapping[str, Sequence[int]]
    test: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, task: Task, how: Episodes) -> _Pool:
        train, test = _by_class(task.train), _by_class(task.test)
        needed = how.shots + (0 if task.test else how.queries)
        enough = {
            label: rows
            for label, rows in train.items()
            if len(rows) >= needed and (not task.test or len(test.get(label, ())) >= how.queries)
        }
        if len(enough) < how.ways:
            split = f"{how.queries} test ones" if task.test else f"{how.queries} more for the test"
            raise UserError(
                f"episodes of {how.ways} ways need {how.ways} classes with {how.shots} training "
                f'examples and {split}; task "{task.name}" has {len(enough)} of {len(train)}: set '
                "episodes.ways, shots or queries lower"
            )
        return cls(task, enough, test)

    def episode(self, name: str, how: Episodes, seed: Sequence[int]) -> Task:
        """One episode."""
        rng = np.random.default_rng(seed)
        labels = sorted(self.train)
        train: list[int] = []
        test: list[int] = []
        for i in sorted(rng.choice(len(labels), how.ways, replace=False).tolist()):
            order = rng.permutation(self.train[labels[i]]).tolist()
            train += order[: how.shots]
            if self.task.test:
                test += rng.permutation(self.test[labels[i]]).tolist()[: how.queries]
            else:
                test += order[how.shots : how.shots + how.queries]
        rows = self.task.test if self.task.test else self.task.train
        return Task(name, select(self.task.train, train), (), select(rows, test))


def _by_class(rows: Sequence[Any]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[label_of(row)].append(i)
    return places
