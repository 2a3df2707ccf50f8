"""`TaskData`: the encoded rows of each slot; samplers: which rows the batch of a step holds.

A sampler is a pure function of the seed and the step, so a resumed run needs no sampler state.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.batch import Batch
from foretune.tasks.task import Objective, Task, TaskCollection

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


@dataclass(frozen=True)
class Step:
    """The rows of one gradient.

    Args:
        chunks: Batches whose gradients are added up, so that memory holds one of them at a time.
        num_slots: Slots of the whole step, of which other processes may hold some.
        num_rows: Likewise.
        fillers: Batches of weight zero: calls of the model that other processes make too.
        rows: The place of each row of the chunks in its slot, chunk after chunk.
    """

    chunks: tuple[Batch, ...]
    num_slots: int
    num_rows: int
    fillers: tuple[Batch, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def slots(self) -> tuple[int, ...]:
        """The slot of each row, chunk after chunk."""
        return tuple(slot for chunk in self.chunks for slot in chunk.slots)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass
class TaskData:
    """The rows of every slot, encoded when first asked for.

    Args:
        slots: The examples, not yet encoded.
        objective: Encodes and collates them.
        keep: So many tokens of encoded rows are kept (some 36 bytes each); beyond it the oldest
            rows are encoded again when needed.
    """

    slots: Sequence[SlotRows]
    objective: Objective
    keep: int = 5_000_000
    _encoded: OrderedDict[tuple[int, int], dict[str, Any]] = field(default_factory=OrderedDict)
    _held: int = 0

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

    def num_rows(self, slot: int, split: str) -> int:
        return len(getattr(self.slots[slot], split))

    def row(self, slot: int, split: str, i: int) -> dict[str, Any]:
        """An encoded row; slots that share their sequence of rows (draws of a task) share it."""
        source = self.slots[slot]
        rows = getattr(source, split)
        key = (id(rows), i)
        found = self._encoded.get(key)
        if found is None:
            found = self.objective.encode(rows[i], source.task or source.key)
            self._encoded[key] = found
            self._held += self.objective.size(found)
            while self._held > self.keep:
                self._held -= self.objective.size(self._encoded.popitem(last=False)[1])
        return found

    def step(
        self,
        picks: Sequence[Pick],
        split: str,
        *,
        train: bool,
        seed: Sequence[int],
        budget: int | None = None,
        some: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> Step:
        """These rows, in the order of their slots.

        Args:
            picks: (slot, index of a row).
            split: Which rows the indices mean.
            train: Make the random choices of training.
            seed: Seeds them; a slot's choices depend on neither the budget nor the other slots.
            budget: Tokens that a chunk holds, but for rows that are longer alone; None for one
                chunk.
            some: Given the tokens of each row, says which of them the chunks hold; None for all.
        """
        picks = sorted(picks, key=lambda pick: pick[0])
        rows: list[Mapping[str, Any]] = [self.row(slot, split, i) for slot, i in picks]
        if train:
            rngs = {
                slot: np.random.default_rng([*seed, number_of(self.slots[slot].key)])
                for slot in {slot for slot, _ in picks}
            }
            rows = [
                self.objective.sample(row, rngs[slot])
                for row, (slot, _) in zip(rows, picks, strict=True)
            ]
        slots, places = [slot for slot, _ in picks], [i for _, i in picks]
        sizes = [self.objective.size(row) for row in rows]
        if some is not None:
            kept = some(sizes)
            rows, slots = [rows[i] for i in kept], [slots[i] for i in kept]
            places = [places[i] for i in kept]
            sizes = [sizes[i] for i in kept]
        chunks = []
        for start, end in _chunks(sizes, budget):
            chunks.append(self.objective.collate(rows[start:end], slots[start:end]))
        num_slots = len({slot for slot, _ in picks})
        return Step(tuple(chunks), num_slots, len(picks), rows=tuple(places))


def _chunks(sizes: Sequence[int], budget: int | None) -> Iterator[tuple[int, int]]:
    """(start, end) of consecutive rows of about equal size together, none above the budget.

    >>> list(_chunks([5, 5, 5, 5, 5], 10)), list(_chunks([5, 5], None))
    ([(0, 2), (2, 4), (4, 5)], [(0, 2)])
    """
    start, held = 0, 0
    total = sum(sizes)
    share = total / math.ceil(total / budget) if budget and total else math.inf
    for i, size in enumerate(sizes):
        full = held + size > (budget or math.inf) or held >= share
        if i > start and full:
            yield start, i
            start, held = i, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)


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
            found += [(slot, row) for row in self._rows(slot, visit * count, count)]
        return found

    def _rows(self, slot: int, position: int, count: int) -> list[int]:
        """The next rows at `position` of the endless stream of permutations of the slot's rows."""
        found: list[int] = []
        for epoch, part in _by_epoch(position, count, self.sizes[slot]):
            known = self._orders.get(slot)
            if known is None or known[0] != epoch:
                rng = np.random.default_rng([self.seed, number_of(self.keys[slot]), epoch])
                known = self._orders[slot] = (epoch, rng.permutation(self.sizes[slot]))
            found += known[1][part].tolist()
        return found


@dataclass
class PooledSampler:
    """The next `count` rows of all tasks' rows, shuffled together, in a new order each epoch."""

    sizes: Sequence[int]
    count: int
    seed: int
    _order: tuple[int, np.ndarray] | None = None

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.sizes)
        self._starts = self._ends - self.sizes

    def picks(self, step: int) -> list[Pick]:
        total = int(self._ends[-1])
        found: list[Pick] = []
        for epoch, part in _by_epoch(step * self.count, self.count, total):
            if self._order is None or self._order[0] != epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order = (epoch, rng.permutation(total))
            rows = self._order[1][part]
            slots = np.searchsorted(self._ends, rows, side="right")
            starts = self._starts[slots]
            found += zip(slots.tolist(), (rows - starts).tolist(), strict=True)
        return found


def _by_epoch(position: int, count: int, size: int) -> Iterator[tuple[int, slice]]:
    """(epoch, its part) of the next `count` places at `position`, when an epoch has `size`.

    >>> list(_by_epoch(3, 4, 5))
    [(0, slice(3, 5, None)), (1, slice(0, 2, None))]
    """
    end = position + count
    while position < end:
        epoch, place = divmod(position, size)
        length = min(size - place, end - position)
        yield epoch, slice(place, place + length)
        position += length


def number_of(key: str) -> int:
    """A number that depends on the text alone, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")


def sampler_for(data: TaskData, run: Run, *, pooled: bool, batches_per_update: int = 1) -> Sampler:
    """The order in which the training examples are seen; the budget is the same for all methods.

    Args:
        data: The examples of each slot.
        run: Seed and the size of a batch.
        pooled: Draw from the examples of all tasks together.
        batches_per_update: Batches in a row that hold the same tasks.
    """
    sizes = [len(slot.train) for slot in data.slots]
    if pooled:
        together = min(run.tasks_per_step or len(data), len(data))
        # As many examples as the other sampler draws, which never repeats one within a batch.
        in_a_round = sum(min(run.batch_size, size) for size in sizes)
        count = max(1, round(in_a_round * together / len(sizes)))
        return PooledSampler(sizes, count, run.seed)
    return PerTaskSampler(
        sizes, run.batch_size, run.tasks_per_step, run.seed, data.keys, batches_per_update
    )
