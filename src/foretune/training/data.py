"""`TaskData`: the encoded rows of each slot; samplers: which rows the batch of a step holds.

A sampler is a pure function of the seed and the step, so a resumed run needs no sampler state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from foretune.errors import UserError
from foretune.tasks.batch import Batch
from foretune.tasks.objectives import Objective
from foretune.tasks.task import Task, TaskCollection

Pick = tuple[int, int]  # (slot, index of a training row)


@dataclass(frozen=True)
class SlotRows:
    """The examples of one slot: a task, or one draw of shots from a task."""

    key: str
    train: Sequence[Any]
    validation: Sequence[Any] = ()
    test: Sequence[Any] = ()
    task: str = ""
    draw: int = 0


@dataclass
class TaskData:
    """The rows of every slot, encoded once.

    Args:
        slots: The examples, not yet encoded.
        objective: Encodes and collates them.
    """

    slots: Sequence[SlotRows]
    objective: Objective
    _encoded: dict[tuple[int, str], list[dict]] = field(default_factory=dict)
    _memo: dict[tuple[str, int], dict] = field(default_factory=dict)

    @classmethod
    def of(cls, tasks: TaskCollection, objective: Objective) -> TaskData:
        """One slot for each task.

        Raises:
            UserError: A task has nothing to train on.
        """
        for task in tasks:
            if not task.train:
                raise UserError(
                    f'task "{task.name}" has no training rows; give it rows of split "train"'
                )
        return cls([slot_of(task) for task in tasks], objective)

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def keys(self) -> list[str]:
        return [slot.key for slot in self.slots]

    def rows(self, slot: int, split: str) -> list[dict]:
        """The encoded rows of one slot; an example that several slots share is encoded once."""
        if (slot, split) not in self._encoded:
            source = self.slots[slot]
            task = source.task or source.key
            encoded = []
            for example in getattr(source, split):
                memo = (task, id(example))
                if memo not in self._memo:
                    self._memo[memo] = self.objective.encode(example, task)
                encoded.append(self._memo[memo])
            self._encoded[slot, split] = encoded
        return self._encoded[slot, split]

    def batch(
        self, picks: Sequence[Pick], split: str, *, train: bool, seed: Sequence[int]
    ) -> Batch:
        """The batch of these rows, in the order of their slots."""
        picks = sorted(picks, key=lambda pick: pick[0])
        rows = [self.rows(slot, split)[i] for slot, i in picks]
        rng = np.random.default_rng(list(seed))
        return self.objective.collate(rows, [slot for slot, _ in picks], train=train, rng=rng)


def slot_of(task: Task) -> SlotRows:
    """The whole task as one slot."""
    return SlotRows(task.name, task.train, task.validation, task.test, task=task.name)


class Sampler(Protocol):
    """Which training rows the batch of a step holds."""

    def picks(self, step: int) -> list[Pick]: ...


@dataclass
class PerTaskSampler:
    """The next `batch_size` rows of each of `tasks_per_step` tasks, task after task in a circle.

    Each task goes through its own rows in a new order each time. A task with fewer rows than
    `batch_size` gives all that it has. `repeat` batches in a row are of the same tasks: an
    episode.
    """

    sizes: Sequence[int]
    batch_size: int
    tasks_per_step: int | None
    seed: int
    keys: Sequence[str]
    repeat: int = 1
    _orders: dict[int, tuple[int, np.ndarray]] = field(default_factory=dict)

    def picks(self, step: int) -> list[Pick]:
        num_tasks = len(self.sizes)
        together = min(self.tasks_per_step or num_tasks, num_tasks)
        found: list[Pick] = []
        episode, part = divmod(step, self.repeat)
        for turn in range(episode * together, (episode + 1) * together):
            slot, visit = turn % num_tasks, (turn // num_tasks) * self.repeat + part
            count = min(self.batch_size, self.sizes[slot])
            found += [(slot, self._row(slot, visit * count + i)) for i in range(count)]
        return found

    def _row(self, slot: int, position: int) -> int:
        """The row at `position` of the endless stream of permutations of the slot's rows."""
        epoch, place = divmod(position, self.sizes[slot])
        known = self._orders.get(slot)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([self.seed, number_of(self.keys[slot]), epoch])
            known = self._orders[slot] = (epoch, rng.permutation(self.sizes[slot]))
        return int(known[1][place])


@dataclass
class PooledSampler:
    """The next `count` rows of all tasks' rows, shuffled together, in a new order each epoch."""

    sizes: Sequence[int]
    count: int
    seed: int
    _order: tuple[int, np.ndarray] | None = None

    def picks(self, step: int) -> list[Pick]:
        ends = np.cumsum(self.sizes)
        total = int(ends[-1])
        found: list[Pick] = []
        for position in range(step * self.count, (step + 1) * self.count):
            epoch, place = divmod(position, total)
            if self._order is None or self._order[0] != epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order = (epoch, rng.permutation(total))
            row = int(self._order[1][place])
            slot = int(np.searchsorted(ends, row, side="right"))
            found.append((slot, row - int(ends[slot] - self.sizes[slot])))
        return found


def number_of(key: str) -> int:
    """A number that depends on the text alone, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
