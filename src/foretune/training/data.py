"""`TaskData`: the encoded examples of each slot; samplers: which of them a step's batch holds.

A sampler is a pure function of the seed and the step, so a resumed run needs no sampler state.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from typing_extensions import override

from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.batch import Batch
from foretune.tasks.example import row_name
from foretune.tasks.task import Objective, Task, TaskCollection
from foretune.training.text_limits import TextLimits

Pick = tuple[int, int]  # (slot, index of an example in it)


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
    """The examples of one gradient.

    Args:
        chunks: Batches whose gradients are added up, so that memory holds one of them at a time.
        num_slots: Number of slots of the step in all processes.
        num_rows: Number of examples of the step in all processes.
        fillers: Batches of weight zero: they only match the model calls of other processes.
        rows: Index of each example of the chunks within its slot, chunk after chunk.
        drawn_by: The random seed of the step.
        keys: The key of each slot.
    """

    chunks: tuple[Batch, ...]
    num_slots: int
    num_rows: int
    fillers: tuple[Batch, ...] = ()
    rows: tuple[int, ...] = ()
    drawn_by: Sequence[int] = ()
    keys: Mapping[int, str] = field(default_factory=dict)

    @cached_property
    def seed(self) -> int:
        """Random seed of what all examples share."""
        return stable_hash(f"{list(self.drawn_by)}")

    @cached_property
    def slot_seeds(self) -> Mapping[int, int]:
        """Random seed of each slot, which depends on its key but not on its number."""
        text = f"{list(self.drawn_by)}"
        return {slot: stable_hash(f"{text} {key}") for slot, key in self.keys.items()}

    @property
    def slots(self) -> tuple[int, ...]:
        """The slot of each example, chunk after chunk."""
        return tuple(slot for chunk in self.chunks for slot in chunk.slots)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads in this process, padding not counted."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass
class TaskData:
    """The examples of all slots, each encoded at its first use.

    Args:
        slots: The examples, not yet encoded.
        objective: Encodes and collates them.
        limits: What the model can read; None if examples are not checked against it.
        max_cached_tokens: Encoded examples are cached up to this many tokens (about 36 bytes
            each); beyond it the oldest are dropped and encoded again when needed.
        scored_steps: Batches that were scored, by what makes them: most are scored repeatedly.
    """

    slots: Sequence[SlotRows]
    objective: Objective
    limits: TextLimits | None = None
    max_cached_tokens: int = 5_000_000
    scored_steps: dict[Any, list[Step]] = field(default_factory=dict)
    _encoded: OrderedDict[tuple[int, int], dict[str, Any]] = field(default_factory=OrderedDict)
    _cached_tokens: int = 0

    @classmethod
    def of(
        cls, tasks: TaskCollection, objective: Objective, limits: TextLimits | None = None
    ) -> TaskData:
        """One slot per task.

        Raises:
            UserError: A task has no training examples.
        """
        for task in tasks:
            if not task.train:
                raise UserError(
                    f'task "{task.name}" has no training examples; add rows of split "train"'
                )
        return cls([slot_of(task) for task in tasks], objective, limits)

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def keys(self) -> list[str]:
        """The key of each slot."""
        return [slot.key for slot in self.slots]

    def num_rows(self, slot: int, split: str) -> int:
        """Number of examples of a slot in "train", "validation" or "test"."""
        return len(getattr(self.slots[slot], split))

    def name_of(self, slot: int, split: str, i: int) -> str:
        """The name of an example for messages: its task, split, number, and where it was read."""
        source = self.slots[slot]
        return row_name(source.task or source.key, split, i, getattr(source, split)[i])

    def row(self, slot: int, split: str, i: int) -> dict[str, Any]:
        """An encoded example; slots with the same sequence of examples (draws) share its cache."""
        source = self.slots[slot]
        rows = getattr(source, split)
        key = (id(rows), i)
        encoded = self._encoded.get(key)
        if encoded is None:
            example, task = rows[i], source.task or source.key
            encoded = self.objective.encode(example, task)
            if self.limits is not None:
                self.limits.check(encoded, self.objective, row_name(task, split, i, example))
            self._encoded[key] = encoded
            self._cached_tokens += self.objective.size(encoded)
            while self._cached_tokens > self.max_cached_tokens:
                self._cached_tokens -= self.objective.size(self._encoded.popitem(last=False)[1])
        return encoded

    def step(
        self,
        picks: Sequence[Pick],
        split: str,
        *,
        train: bool,
        seed: Sequence[int],
        budget: int | None = None,
        select: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> Step:
        """Collates examples into chunks, in the order of their slots.

        Args:
            picks: (slot, index of an example).
            split: The split that the indices refer to.
            train: Make the objective's random choices of training.
            seed: Random seed of these; a slot's choices depend on neither the budget nor the
                other slots.
            budget: Tokens per chunk, exceeded only by an example that is longer on its own; None
                for a single chunk.
            select: Maps the tokens of each example to the indices of those that the chunks hold;
                None for all.
        """
        picks = sorted(picks, key=lambda pick: pick[0])
        keys = {slot: self.slots[slot].key for slot, _ in picks}
        rows: list[Mapping[str, Any]] = [self.row(slot, split, i) for slot, i in picks]
        if train and type(self.objective).sample is not Objective.sample:
            rngs = {
                slot: np.random.default_rng([*seed, stable_hash(key)]) for slot, key in keys.items()
            }
            rows = [
                self.objective.sample(row, rngs[slot])
                for row, (slot, _) in zip(rows, picks, strict=True)
            ]
        slots, places = [slot for slot, _ in picks], [i for _, i in picks]
        needs_sizes = budget is not None or select is not None
        sizes = [self.objective.size(row) for row in rows] if needs_sizes else [1] * len(rows)
        if select is not None:
            selected = select(sizes)
            rows, slots = [rows[i] for i in selected], [slots[i] for i in selected]
            places = [places[i] for i in selected]
            sizes = [sizes[i] for i in selected]
        chunks = []
        for start, end in _chunks(sizes, budget):
            chunks.append(self.objective.collate(rows[start:end], slots[start:end]))
        return Step(
            tuple(chunks),
            len(keys),
            len(picks),
            rows=tuple(places),
            drawn_by=tuple(seed),
            keys=keys,
        )


def _chunks(sizes: Sequence[int], budget: int | None) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of examples of about equal total size, none above the budget.

    >>> list(_chunks([5, 5, 5, 5, 5], 10)), list(_chunks([5, 5], None))
    ([(0, 2), (2, 4), (4, 5)], [(0, 2)])
    """
    start, tokens = 0, 0
    total = sum(sizes)
    target = total / math.ceil(total / budget) if budget and total else math.inf
    for i, size in enumerate(sizes):
        full = tokens + size > (budget or math.inf) or tokens >= target
        if i > start and full:
            yield start, i
            start, tokens = i, 0
        tokens += size
    if start < len(sizes):
        yield start, len(sizes)


def slot_of(task: Task) -> SlotRows:
    """The whole task as one slot."""
    return SlotRows(task.name, task.train, task.validation, task.test, task=task.name)


class Sampler(Protocol):
    """Says which training examples the batch of a step holds."""

    def picks(self, step: int) -> list[Pick]:
        """(slot, index of an example) of each example in the batch of this step."""
        ...


@dataclass
class PerTaskSampler(Sampler):
    """The next `batch_size` examples of each of `tasks_per_step` tasks, round robin over tasks.

    Each task goes through its own examples, in a new order each time. A task with fewer examples
    than `batch_size` gives all of them. `repeat` consecutive batches are of the same tasks: an
    episode.
    """

    sizes: Sequence[int]
    batch_size: int
    tasks_per_step: int | None
    seed: int
    keys: Sequence[str]
    repeat: int = 1
    _orders: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)  # by key

    @override
    def picks(self, step: int) -> list[Pick]:
        num_tasks = len(self.sizes)
        tasks_per_step = min(self.tasks_per_step or num_tasks, num_tasks)
        picks: list[Pick] = []
        episode, part = divmod(step, self.repeat)
        for turn in range(episode * tasks_per_step, (episode + 1) * tasks_per_step):
            slot, visit = turn % num_tasks, (turn // num_tasks) * self.repeat + part
            count = min(self.batch_size, self.sizes[slot])
            picks += [(slot, row) for row in self._rows(slot, visit * count, count)]
        return picks

    def _rows(self, slot: int, position: int, count: int) -> list[int]:
        """The next indices at `position` of the endless stream of the slot's permutations."""
        rows: list[int] = []
        key = self.keys[slot]  # several slots may hold the same examples
        for epoch, part in _by_epoch(position, count, self.sizes[slot]):
            order = self._orders.get(key)
            if order is None or order[0] != epoch:
                rng = np.random.default_rng([self.seed, stable_hash(key), epoch])
                order = self._orders[key] = (epoch, rng.permutation(self.sizes[slot]))
            rows += order[1][part].tolist()
        return rows


@dataclass
class PooledSampler(Sampler):
    """The next `count` examples of all tasks, shuffled together, in a new order each epoch.

    Of a fraction the batches hold the whole numbers around it, so that it is their mean.
    """

    sizes: Sequence[int]
    count: int | Fraction
    seed: int
    _order: tuple[int, np.ndarray] | None = None

    def __post_init__(self) -> None:
        self._ends = np.cumsum(self.sizes)
        self._starts = self._ends - self.sizes

    @override
    def picks(self, step: int) -> list[Pick]:
        total = int(self._ends[-1])
        start, end = (math.floor(i * self.count) for i in (step, step + 1))
        picks: list[Pick] = []
        for epoch, part in _by_epoch(start, end - start, total):
            if self._order is None or self._order[0] != epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order = (epoch, rng.permutation(total))
            rows = self._order[1][part]
            slots = np.searchsorted(self._ends, rows, side="right")
            starts = self._starts[slots]
            picks += zip(slots.tolist(), (rows - starts).tolist(), strict=True)
        return picks


def _by_epoch(position: int, count: int, size: int) -> Iterator[tuple[int, slice]]:
    """(epoch, slice of it) of the next `count` places at `position`, with `size` per epoch.

    >>> list(_by_epoch(3, 4, 5))
    [(0, slice(3, 5, None)), (1, slice(0, 2, None))]
    """
    end = position + count
    while position < end:
        epoch, place = divmod(position, size)
        length = min(size - place, end - position)
        yield epoch, slice(place, place + length)
        position += length


@lru_cache(maxsize=2**14)
def stable_hash(key: str) -> int:
    """A hash that is the same in every process, unlike Python's own."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")


def episodes(run: Run, num_tasks: int, batches_per_update: int) -> list[range]:
    """The batches of each update, by their numbers for `PerTaskSampler`; `run.steps` in all.

    Batches of the same tasks form episodes of `batches_per_update`. A task is in as many batches as
    it is for a method that needs one per update, so its last episode may be shorter.
    """
    tasks_per_step = min(run.tasks_per_step or num_tasks, num_tasks)
    num_groups = num_tasks // math.gcd(num_tasks, tasks_per_step)  # of tasks that share a batch
    visits = [len(range(group, run.steps, num_groups)) for group in range(num_groups)]
    num_rounds = -(-visits[0] // batches_per_update)
    lengths = [
        min(batches_per_update, left - done)
        for done in range(0, num_rounds * batches_per_update, batches_per_update)
        for left in visits
    ]
    starts = range(0, len(lengths) * batches_per_update, batches_per_update)
    return [range(s, s + n) for s, n in zip(starts, lengths, strict=True) if n > 0]


def sampler_for(data: TaskData, run: Run, *, pooled: bool, batches_per_update: int = 1) -> Sampler:
    """The sampler of the training examples; the budget is the same for all methods.

    Args:
        data: The examples of each slot.
        run: Random seed and batch size.
        pooled: Draw from the examples of all tasks together.
        batches_per_update: Consecutive batches that hold the same tasks.
    """
    sizes = [len(slot.train) for slot in data.slots]
    if pooled:
        # As many examples as the other sampler draws, which never repeats one within a batch.
        per_task = [min(run.batch_size, size) for size in sizes]
        turns = run.steps * min(run.tasks_per_step or len(sizes), len(sizes))
        rounds, rest = divmod(turns, len(sizes))
        num_examples = rounds * sum(per_task) + sum(per_task[:rest])
        return PooledSampler(sizes, Fraction(num_examples, run.steps), run.seed)
    return PerTaskSampler(
        sizes, run.batch_size, run.tasks_per_step, run.seed, data.keys, batches_per_update
    )
