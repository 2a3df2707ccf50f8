"""Data parallelism over tasks: which slots each process holds, and what processes exchange.

The tasks are partitioned. A process (a *rank*) holds the slices of the bank of its own tasks and
computes their part of every step; only the base's gradients and a few numbers are communicated. A
single process uses the same two classes, which then do nothing and never touch torch.distributed.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import re
import sys
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
from foretune.training.sharding import full_tensor

# A rank may wait long for the one that writes, or that adapts longest. When a process dies the
# launcher ends the others, so none waits that long in vain.
TIMEOUT = timedelta(hours=24)
BUCKET_SIZE = 2**24  # elements of gradients that are summed at once
NUM_SAMPLED = 4  # examples of a task from which its tokens per example are estimated
# Messages of torch when a peer is lost.
PEER_LOST = re.compile("gloo|NCCL|TCPStore|[Cc]onnection (closed|reset|refused)|[Tt]imed out")
STACKED = ("bank.", "bank_adamw.")  # prefixes of a learner's tensors with one slice per slot

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of this job.

    Args:
        rank: Rank of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    def on_first_process(self, work: Callable[[], T]) -> T:
        """Calls `work` on rank 0; all processes return its result or raise its `ForetuneError`."""
        if self.size == 1:
            return work()
        message: list[Any] = [None, None]  # result, error
        if self.rank == 0:
            try:
                message[0] = work()
            except ForetuneError as error:
                message[1] = error
        with peer_errors():
            dist.broadcast_object_list(message, src=0)
        if message[1] is not None:
            raise message[1]
        result: T = message[0]
        return result

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with peer_errors():
            dist.all_gather_object(values, value)
        return values

    def raise_on_all(self, error: ForetuneError | None) -> None:
        """Raises on all processes the error of the lowest rank that has one."""
        for first_error in self.gather(error):
            if first_error is not None:
                raise first_error

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        """At the end of the block all processes raise if one has raised a `ForetuneError` in it."""
        if self.size == 1:
            yield
            return
        error = None
        try:
            yield
        except ForetuneError as raised:
            error = raised
        self.raise_on_all(error)

    def merge(self, values: Mapping[T, V], order: Sequence[T]) -> dict[T, V]:
        """The union of the processes' mappings, its keys in that order."""
        merged = {key: value for part in self.gather(dict(values)) for key, value in part.items()}
        return {key: merged[key] for key in order if key in merged}

    def sum(self, values: Tensor) -> Tensor:
        """Sums a tensor over the processes, in place; the shape (n, ...) must be the same."""
        if self.size > 1:
            with peer_errors():
                dist.all_reduce(values)
        return values

    def sum_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Sums each parameter's gradient over the processes; it stays None where none has one."""
        if self.size == 1:
            return
        has_grad = torch.tensor([p.grad is not None for p in params], dtype=torch.int32)
        for bucket in _buckets([p for p, n in zip(params, self.sum(has_grad), strict=True) if n]):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
            parts = flat.split([p.numel() for p in bucket])
            for p, part in zip(bucket, parts, strict=True):
                p.grad = part.view_as(p)

    def total_cost(self, cost: Mapping[str, Any]) -> dict[str, Any]:
        """The cost of the job: maxima of time, peak memory and parameters, sums of all else."""
        costs = self.gather(dict(cost))
        total = {}
        for key in dict.fromkeys(key for part in costs for key in part):
            values = [part[key] for part in costs if part.get(key) is not None]
            is_max = key in ("seconds", "peak_memory_mb", "trainable_parameters")
            total[key] = None if not values else max(values) if is_max else round(sum(values), 3)
        return total

    def check_same(self, what: str, value: object) -> None:
        """Checks that all processes have the same value.

        Raises:
            UserError: They do not; the message calls the values `what`.
        """
        if len(set(self.gather(hashlib.blake2b(repr(value).encode()).hexdigest()))) > 1:
            raise UserError(
                f"the {self.size} processes of this job have different {what}: each must read the "
                "same files and build the same model, so seed what is random"
            )

    def owners(self, loads: Sequence[float], slots_per_step: int) -> list[int]:
        """The rank of each slot.

        Slots that share a step are assigned the heaviest first, each to the rank with the least
        load in that step (longest processing time first), so that all end a step at about one time.

        Args:
            loads: Cost of each slot in a step.
            slots_per_step: Number of neighbouring slots that share a step.

        >>> pair = ProcessGroup(size=2)
        >>> pair.owners([5, 1, 3, 1], 4), pair.owners([5, 1, 3, 1], 2)
        ([0, 1, 1, 1], [0, 1, 1, 0])
        """
        owners = [0] * len(loads)
        total = [0.0] * self.size
        for start in range(0, len(loads), slots_per_step):
            step = range(start, min(start + slots_per_step, len(loads)))
            in_step = [0.0] * self.size
            for slot in sorted(step, key=lambda slot: (-loads[slot], slot)):
                rank = min(range(self.size), key=lambda r: (in_step[r], total[r], r))
                owners[slot] = rank
                in_step[rank] += loads[slot]
                total[rank] += loads[slot]
        return owners


@atexit.register
def _disconnect() -> None:
    """Ends gloo's threads before Python ends, or one process in five aborts after its work.

    Not after an error: the other processes may be waiting, and the launcher ends them only when
    this one has exited.
    """
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()


def process_group() -> ProcessGroup:
    """The connected processes of this job; a group of one without a launcher."""
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
    """This process's part of a training: all of it in a single process.

    Args:
        data: The examples of all slots.
        group: The processes.
        owners: The rank of each slot.
        by_rows: The examples of a step are distributed regardless of their slots, which have no
            parameters of their own. Scoring is still distributed by slot.
        sharded: The base is sharded, so all processes must call the model equally often.
    """

    data: TaskData
    group: ProcessGroup = ProcessGroup()
    owners: Sequence[int] = ()
    by_rows: bool = False
    sharded: bool = False

    @cached_property
    def local_data(self) -> TaskData:
        """The examples of the slots in this process's bank."""
        if self.group.size == 1:
            return self.data
        slots = [self.data.slots[slot] for slot in self.bank_slots]
        return TaskData(slots, self.data.objective, self.data.limits)

    @cached_property
    def slots(self) -> list[int]:
        """The slots of this process."""
        if self.group.size == 1:
            return list(range(len(self.data)))
        return self._slots_of(self.group.rank)

    @property
    def bank_slots(self) -> list[int]:
        """The slots of this process's bank; never empty: without tasks it has an unused copy."""
        return self.slots or [0]

    def _slots_of(self, rank: int) -> list[int]:
        return [slot for slot, owner in enumerate(self.owners) if owner == rank]

    def step(self, picks: Sequence[Pick], seed: Sequence[int], budget: int | None) -> Step:
        """This process's part of a training step, its slots numbered as in the local bank."""
        if self.group.size == 1:
            return self.data.step(picks, "train", train=True, seed=seed, budget=budget)
        if self.by_rows:
            step = self.data.step(
                picks, "train", train=True, seed=seed, budget=budget, select=self._local_rows
            )
        else:
            place = {slot: i for i, slot in enumerate(self.slots)}
            local_picks = [(place[slot], row) for slot, row in picks if slot in place]
            step = self.local_data.step(local_picks, "train", train=True, seed=seed, budget=budget)
            num_slots = len({slot for slot, _ in picks})
            step = dataclasses.replace(step, num_slots=num_slots, num_rows=len(picks))
        data = self.data if self.by_rows else self.local_data
        return pad_with_fillers(step, data, self.group) if self.sharded else step

    def _local_rows(self, sizes: Sequence[int]) -> list[int]:
        """Indices of this process's part of the examples with these numbers of tokens."""
        owners = self.group.owners(sizes, max(1, len(sizes)))
        return [i for i, owner in enumerate(owners) if owner == self.group.rank]

    def mean_over_slots(self, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the slots of all processes, from that over the slots of each."""
        if self.group.size == 1:
            return dict(means)
        share = len(self.slots) / len(self.data)
        return {name: self.group.sum(mean * share) for name, mean in means.items()}

    def mean_losses(self, losses: Mapping[int, float], step: Step) -> dict[int, float]:
        """The mean loss of each slot over all processes, by its number among all slots."""
        if self.group.size == 1:
            return dict(losses)
        counts = Counter(step.slots)
        number = range(len(self.data)) if self.by_rows else self.bank_slots
        sums = torch.zeros(2, len(self.data), dtype=torch.float64)
        for slot, loss in losses.items():
            sums[:, number[slot]] = torch.tensor([loss * counts[slot], counts[slot]])
        totals, rows = self.group.sum(sums).tolist()
        return {slot: totals[slot] / n for slot, n in enumerate(rows) if n}

    def gather_scores(self, scores: Mapping[int, float]) -> dict[int, float]:
        """The scores of all slots, from those of the slots of each process."""
        if self.group.size == 1:
            return dict(scores)
        local_scores = {self.slots[slot]: score for slot, score in scores.items()}
        return self.group.merge(local_scores, range(len(self.data)))

    def gather_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state that a single process would have, on rank 0; empty on the others."""
        if self.group.size == 1:
            return dict(tensors)
        state: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if not name.startswith(STACKED):
                gathered = full_tensor(tensor)
                if self.group.rank == 0:
                    state[name] = gathered.cpu()
        stacked = {k: v for k, v in tensors.items() if k.startswith(STACKED)}
        by_rank = self.group.gather({k: (tuple(v.shape[1:]), v.dtype) for k, v in stacked.items()})
        kinds = {name: kind for part in by_rank for name, kind in part.items()}
        device = next(iter(tensors.values())).device
        for name, (shape, dtype) in sorted(kinds.items()):
            # An optimiser has no state yet where none of its slots has moved; that is zero.
            zeros = torch.zeros((len(self.bank_slots), *shape), dtype=dtype)
            slices = self._gather_slots(stacked.get(name, zeros).to(device))
            if slices is not None:
                state[name] = slices
        return state

    def _gather_slots(self, local: Tensor) -> Tensor | None:
        """(all slots, …) on rank 0, from the (bank slots, …) of each process; None elsewhere."""
        with peer_errors():
            if self.group.rank > 0:
                if self.slots:
                    dist.send(local[: len(self.slots)].contiguous(), dst=0)
                return None
            gathered = torch.zeros((len(self.data), *local.shape[1:]), dtype=local.dtype)
            for rank in range(self.group.size):
                slots = self._slots_of(rank)
                part = local[: len(slots)]
                if rank > 0 and slots:
                    part = local.new_empty((len(slots), *local.shape[1:]))
                    dist.recv(part, src=rank)
                gathered[slots] = part.cpu()
            return gathered

    def local_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of a state that `gather_state` has returned."""
        if self.group.size == 1:
            return dict(tensors)
        return {k: v[self.bank_slots] if k.startswith(STACKED) else v for k, v in tensors.items()}


def partition_slots(
    group: ProcessGroup,
    data: TaskData,
    batch_size: int,
    slots_per_step: int | None,
    *,
    pooled: bool,
) -> Partition:
    """Assigns the slots to the processes, balanced by the tokens that each adds to a step.

    Args:
        group: The processes.
        data: All slots.
        batch_size: Examples of a slot per step.
        slots_per_step: Slots that share a step; None for all.
        pooled: A step's examples are drawn from all slots together.

    Raises:
        UserError: The processes have different tasks.
    """
    if group.size == 1:
        return Partition(data)
    group.check_same("tasks", [(s.key, len(s.train), len(s.validation)) for s in data.slots])
    loads = [_load(data, slot, batch_size, pooled) for slot in range(len(data))]
    num_slots = max(1, len(data))
    slots_per_step = num_slots if pooled else slots_per_step or num_slots
    return Partition(data, group, group.owners(loads, slots_per_step))


def pad_with_fillers(step: Step, data: TaskData, group: ProcessGroup) -> Step:
    """The step with chunks of weight zero, so that all processes have equally many.

    Args:
        step: This process's step.
        data: Where a chunk is taken from if the step has none.
        group: The processes.
    """
    missing = max(group.gather(len(step.chunks))) - len(step.chunks)
    if not missing:
        return step
    chunks = step.chunks or data.step([(0, 0)], "train", train=True, seed=[0]).chunks
    return dataclasses.replace(step, fillers=(chunks[-1],) * missing)


def _load(data: TaskData, slot: int, batch_size: int, pooled: bool) -> float:
    """Tokens that a step has of this slot, estimated from its first examples."""
    num_rows = data.num_rows(slot, "train")
    sampled = range(min(NUM_SAMPLED, num_rows))
    tokens = sum(data.objective.size(data.row(slot, "train", i)) for i in sampled)
    drawn = num_rows if pooled else min(batch_size, num_rows)
    return drawn * tokens / max(1, len(sampled))


def check_model(group: ProcessGroup, model: nn.Module) -> None:
    """Checks that all processes have the same model, by about 16 values of each parameter."""
    if group.size == 1:
        return
    values = [p.detach().flatten()[:: max(1, p.numel() // 16)].tolist() for p in model.parameters()]
    group.check_same("models", values)


def check_layers(group: ProcessGroup, model: nn.Module) -> None:
    """Checks that no layer keeps batch statistics, which processes do not synchronise.

    Raises:
        UserError: One does, and there are several processes.
    """
    if group.size == 1:
        return
    for name, module in batch_norms(model).items():
        if module.track_running_stats:
            raise UserError(
                f"{name} ({type(module).__name__}) keeps batch statistics, which several processes "
                "do not synchronise: train it in one process, or with a norm per example"
            )


def _buckets(params: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type and device, about `BUCKET_SIZE` elements at a time."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in params:
        bucket = kinds.setdefault((p.dtype, p.device), [])
        bucket.append(p)
        if sum(q.numel() for q in bucket) >= BUCKET_SIZE:
            yield kinds.pop((p.dtype, p.device))
    yield from kinds.values()


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Turns torch's errors about a lost process into one line that says what to do.

    Raises:
        LostProcessError: Another process has ended or does not answer.
        RuntimeError: Any other failure, as it was.
    """
    try:
        yield
    except RuntimeError as error:
        if not PEER_LOST.search(str(error)):
            raise
        raise LostProcessError(
            "another process of this job has ended or does not answer: see its output; "
            "--resume continues from the last checkpoint, with any number of processes "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
