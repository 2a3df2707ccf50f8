"""Several processes as one: what each of them holds, and what they tell each other.

The tasks are dealt out. A process (a *rank*) has its own tasks' slices of the bank and makes their
part of every step; only the base's gradients and a few numbers travel. A process alone uses the
same two classes, which then do nothing and never touch torch.distributed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foretune.errors import ForetuneError, LostProcessError, UserError
from foretune.models.surgery import batch_norms
from foretune.processes import local_rank, num_processes, process_rank
from foretune.training.data import Pick, Step, TaskData
from foretune.training.sharding import whole

# A rank that is ready waits for the others: for the one that writes, or that adapts longest. When
# a process dies the launcher ends the rest, so nothing waits that long for the dead.
TIMEOUT = timedelta(hours=24)
BUCKET = 2**24  # elements of gradients that are summed at once
LOOKED_AT = 4  # rows of a task from which its tokens are estimated
# How torch says that a peer is gone.
LOST = re.compile("gloo|NCCL|TCPStore|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
STACKED = ("bank.", "bank_adamw.")  # names of a learner's tensors that have one slice a slot

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of this job.

    Args:
        rank: Of this process.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def first(self, work: Callable[[], T]) -> T:
        """Does it on the first process; all return what it returned, or raise what it raised."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except ForetuneError as error:
                told[1] = error
        with connected():
            dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise told[1]
        found: T = told[0]
        return found

    def gather(self, value: T) -> list[T]:
        """Every process's value, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with connected():
            dist.all_gather_object(found, value)
        return found

    def raise_first(self, error: ForetuneError | None) -> None:
        """Raises on every process the first error that one of them has."""
        for found in self.gather(error):
            if found is not None:
                raise found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What each process does by itself; at its end all raise the first error of any."""
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except ForetuneError as failed:
            error = failed
        self.raise_first(error)

    def merged(self, values: Mapping[T, V], order: Sequence[T]) -> dict[T, V]:
        """What all processes have, in that order."""
        every = {key: value for one in self.gather(dict(values)) for key, value in one.items()}
        return {key: every[key] for key in order if key in every}

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor of one shape, in place."""
        if self.size > 1:
            with connected():
                dist.all_reduce(values)
        return values

    def sum_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Adds up each parameter's gradient over the processes; None where none has one."""
        if self.size == 1:
            return
        has = torch.tensor([p.grad is not None for p in params], dtype=torch.int32)
        for bucket in _buckets([p for p, n in zip(params, self.sum(has), strict=True) if n]):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
            parts = flat.split([p.numel() for p in bucket])
            for p, part in zip(bucket, parts, strict=True):
                p.grad = part.view_as(p)

    def total_cost(self, cost: Mapping[str, Any]) -> dict[str, Any]:
        """The cost of the job: the longest time, the highest peak, everything else added up."""
        every = self.gather(dict(cost))
        total = {}
        for key in dict.fromkeys(key for one in every for key in one):
            known = [one[key] for one in every if one.get(key) is not None]
            most = key in ("seconds", "peak_memory_mb", "trainable_parameters")
            total[key] = None if not known else max(known) if most else round(sum(known), 3)
        return total

    def check_same(self, what: str, value: object) -> None:
        """Raises UserError unless every process has the same value."""
        if len(set(self.gather(hashlib.blake2b(repr(value).encode()).hexdigest()))) > 1:
            raise UserError(
                f"the {self.size} processes of this job have different {what}: each must read the "
                "same files and build the same model, so seed what is random"
            )

    def owners(self, loads: Sequence[float], together: int) -> list[int]:
        """The rank of each slot.

        Slots that share a step are dealt out the heaviest first, each to the rank that has least
        of that step (longest processing time first), so the processes end a step at about one time.

        Args:
            loads: What a slot costs in a step.
            together: So many neighbouring slots share a step.

        >>> pair = ProcessGroup(size=2)
        >>> pair.owners([5, 1, 3, 1], 4), pair.owners([5, 1, 3, 1], 2)
        ([0, 1, 1, 1], [0, 1, 1, 0])
        """
        owners = [0] * len(loads)
        total = [0.0] * self.size
        for start in range(0, len(loads), together):
            group = range(start, min(start + together, len(loads)))
            here = [0.0] * self.size
            for slot in sorted(group, key=lambda slot: (-loads[slot], slot)):
                rank = min(range(self.size), key=lambda r: (here[r], total[r], r))
                owners[slot] = rank
                here[rank] += loads[slot]
                total[rank] += loads[slot]
        return owners


def process_group() -> ProcessGroup:
    """The processes of this job, connected; alone without a launcher."""
    if num_processes() == 1:
        return ProcessGroup()
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    return ProcessGroup(process_rank(), num_processes())


@dataclass(frozen=True, eq=False)
class Partition:
    """What this process has of a training: everything when it is alone.

    Args:
        data: The rows of all slots.
        group: The processes.
        owners: The rank of each slot.
        by_rows: The rows of a step are dealt out, whichever slot they are of: no slot has
            anything of its own. Scores are still dealt out by slot.
        sharded: The base is sharded, so that every process must call the model equally often.
    """

    data: TaskData
    group: ProcessGroup = ProcessGroup()
    owners: Sequence[int] = ()
    by_rows: bool = False
    sharded: bool = False

    @cached_property
    def local_data(self) -> TaskData:
        """The rows of the slots that it holds."""
        if self.group.size == 1:
            return self.data
        return TaskData([self.data.slots[slot] for slot in self.held], self.data.objective)

    @cached_property
    def slots(self) -> list[int]:
        """The slots of this process."""
        if self.group.size == 1:
            return list(range(len(self.data)))
        return self._slots_of(self.group.rank)

    @property
    def held(self) -> list[int]:
        """The slots of its bank; never none, so one without tasks has a copy that is not used."""
        return self.slots or [0]

    def _slots_of(self, rank: int) -> list[int]:
        return [slot for slot, owner in enumerate(self.owners) if owner == rank]

    def step(self, picks: Sequence[Pick], seed: Sequence[int], budget: int | None) -> Step:
        """This process's part of a training step; with the bank's own numbers for the slots."""
        if self.group.size == 1:
            return self.data.step(picks, "train", train=True, seed=seed, budget=budget)
        if self.by_rows:
            step = self.data.step(
                picks, "train", train=True, seed=seed, budget=budget, some=self._some
            )
        else:
            place = {slot: i for i, slot in enumerate(self.slots)}
            mine = [(place[slot], row) for slot, row in picks if slot in place]
            step = self.local_data.step(mine, "train", train=True, seed=seed, budget=budget)
            num_slots = len({slot for slot, _ in picks})
            step = dataclasses.replace(step, num_slots=num_slots, num_rows=len(picks))
        return self._evened(step) if self.sharded else step

    def _some(self, sizes: Sequence[int]) -> list[int]:
        """Which rows of these sizes are for this process."""
        owners = self.group.owners(sizes, max(1, len(sizes)))
        return [i for i, owner in enumerate(owners) if owner == self.group.rank]

    def _evened(self, step: Step) -> Step:
        """The step with chunks of weight zero, until every process has equally many."""
        most = max(self.group.gather(len(step.chunks)))
        missing = most - len(step.chunks)
        if not missing:
            return step
        data = self.data if self.by_rows else self.local_data
        spare = step.chunks or data.step([(0, 0)], "train", train=True, seed=[0]).chunks
        return dataclasses.replace(step, fillers=(spare[-1],) * missing)

    def losses(self, losses: Mapping[int, float], step: Step) -> dict[int, float]:
        """Each slot's mean loss over all processes, by its number among all slots."""
        if self.group.size == 1:
            return dict(losses)
        counts = Counter(step.slots)
        number = range(len(self.data)) if self.by_rows else self.held
        sums = torch.zeros(2, len(self.data), dtype=torch.float64)
        for slot, loss in losses.items():
            sums[:, number[slot]] = torch.tensor([loss * counts[slot], counts[slot]])
        totals, rows = self.group.sum(sums).tolist()
        return {slot: totals[slot] / n for slot, n in enumerate(rows) if n}

    def scores(self, scores: Mapping[int, float]) -> dict[int, float]:
        """The scores of all slots, of which each process has its own."""
        if self.group.size == 1:
            return dict(scores)
        mine = {self.slots[slot]: score for slot, score in scores.items()}
        return self.group.merged(mine, range(len(self.data)))

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What one process alone would hold, on the first process; nothing on the others."""
        if self.group.size == 1:
            return dict(tensors)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not name.startswith(STACKED):
                gathered = whole(tensor)
                if self.group.rank == 0:
                    found[name] = gathered.cpu()
        mine = {k: v for k, v in tensors.items() if k.startswith(STACKED)}
        every = self.group.gather({k: (tuple(v.shape[1:]), v.dtype) for k, v in mine.items()})
        kinds = {name: kind for one in every for name, kind in one.items()}
        device = next(iter(tensors.values())).device
        for name, (shape, dtype) in sorted(kinds.items()):
            # An optimiser has no state yet where none of its slots has moved; that is zero.
            held = mine.get(name, torch.zeros((len(self.held), *shape), dtype=dtype))
            slices = self._gathered(held.to(device))
            if slices is not None:
                found[name] = slices
        return found

    def _gathered(self, held: Tensor) -> Tensor | None:
        """(all slots, …) on the first process, from the (own slots, …) of each; None elsewhere."""
        with connected():
            if self.group.rank > 0:
                if self.slots:
                    dist.send(held[: len(self.slots)].contiguous(), dst=0)
                return None
            found = torch.zeros((len(self.data), *held.shape[1:]), dtype=held.dtype)
            for rank in range(self.group.size):
                slots = self._slots_of(rank)
                part = held[: len(slots)]
                if rank > 0 and slots:
                    part = held.new_empty((len(slots), *held.shape[1:]))
                    dist.recv(part, src=rank)
                found[slots] = part.cpu()
            return found

    def part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process has of all that `whole` gave."""
        if self.group.size == 1:
            return dict(tensors)
        return {k: v[self.held] if k.startswith(STACKED) else v for k, v in tensors.items()}


def partition_slots(
    group: ProcessGroup, data: TaskData, batch_size: int, together: int | None, *, pooled: bool
) -> Partition:
    """Deals the slots out by the tokens that each brings to a step.

    Args:
        group: The processes.
        data: All slots.
        batch_size: Rows of a slot in a step.
        together: Slots that share a step; None for all.
        pooled: A step's rows are drawn from all rows alike.

    Raises:
        UserError: The processes have different tasks.
    """
    if group.size == 1:
        return Partition(data)
    group.check_same("tasks", [(s.key, len(s.train), len(s.validation)) for s in data.slots])
    most = len(data) if pooled else batch_size
    loads = [_load(data, slot, most, pooled) for slot in range(len(data))]
    every = max(1, len(data))
    return Partition(data, group, group.owners(loads, every if pooled else together or every))


def _load(data: TaskData, slot: int, batch_size: int, pooled: bool) -> float:
    """Tokens that a step has of this slot, estimated from its first rows."""
    num_rows = data.num_rows(slot, "train")
    looked_at = range(min(LOOKED_AT, num_rows))
    tokens = sum(data.objective.size(data.row(slot, "train", i)) for i in looked_at)
    drawn = num_rows if pooled else min(batch_size, num_rows)
    return drawn * tokens / max(1, len(looked_at))


def check_model(group: ProcessGroup, model: nn.Module) -> None:
    """Raises UserError unless all processes have the same model, as far as a few values tell."""
    if group.size == 1:
        return
    some = [p.detach().flatten()[:: max(1, p.numel() // 16)].tolist() for p in model.parameters()]
    group.check_same("models", some)


def check_layers(group: ProcessGroup, model: nn.Module) -> None:
    """Raises UserError if the model keeps statistics of batches of which a process sees a part."""
    if group.size == 1:
        return
    for name, module in batch_norms(model).items():
        if module.track_running_stats:
            raise UserError(
                f"{name} ({type(module).__name__}) mixes the rows of a batch, which several "
                "processes do not share: train it in one process, or with a norm of each row"
            )


def _buckets(params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and device, about `BUCKET` elements at a time."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in params:
        bucket = kinds.setdefault((p.dtype, p.device), [])
        bucket.append(p)
        if sum(q.numel() for q in bucket) >= BUCKET:
            yield kinds.pop((p.dtype, p.device))
    yield from kinds.values()


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Says what it means when another process does not answer.

    Raises:
        LostProcessError: It does not.
    """
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise LostProcessError(
            "another process of this job has ended or does not answer: see what it said; "
            "--resume continues from the last checkpoint, with as many processes as you like "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
