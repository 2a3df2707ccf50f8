"""`Learner`: what an update moves and how its gradient is computed; methods build it."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.models.calls import eval_no_grad
from foretune.models.digests import moving_buffers
from foretune.models.frozen_prefix import frozen_prefix
from foretune.models.loading import save_base
from foretune.models.packing import packed
from foretune.models.recompute import recomputed, recomputed_on_route
from foretune.models.row_dropout import RowDropout, only_known_recomputation
from foretune.models.sentence_cache import embedding_with
from foretune.models.surgery import batch_norms, name_outputs
from foretune.run import Run
from foretune.tasks.batch import Batch
from foretune.tasks.task import Objective
from foretune.training.data import Step, TaskData
from foretune.training.optim import SlotAdamW, is_8bit, make_adamw
from foretune.training.process_group import Partition, ProcessGroup
from foretune.training.record import count
from foretune.training.scoring import score_slots, scores_and_losses
from foretune.training.sharding import place_like, shard
from foretune.training.token_budget import default_token_budget


class Learner:
    """The joint learner: one backward pass over a batch that mixes tasks.

    The loss is the mean over the tasks in the batch of each task's mean loss. The base follows its
    gradient; each slot of the bank follows the gradient of its own task's mean loss, which does
    not depend on how many other tasks share the step. With `pooled` the loss is the mean over all
    examples instead.

    Args:
        model: The base; its parameters with `requires_grad` are trained at `learning_rate`.
        objective: Losses and scores.
        bank: Adapters and heads of the slots, or None.
        learning_rate: Learning rate of the base; None freezes it.
        bank_learning_rate: Learning rate of the bank.
        pooled: Weight examples equally instead of tasks.
        not_decayed: Parameters of the base with one of these in their names have no weight decay.
        frozen_statistics: Batch norms use their running statistics and do not update them. Always
            so with a bank: tasks share a step, and an adapter belongs to the base as it is.

    Attributes:
        slot_rates: The learning rate of each slot of the bank, where they differ.
        average: Fraction of the updates, at the end, over which the base's weights are averaged.
    """

    batches_per_update = 1

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        bank: AdapterBank | None = None,
        learning_rate: float | None = None,
        bank_learning_rate: float = 0.0,
        pooled: bool = False,
        not_decayed: Sequence[str] = (),
        frozen_statistics: bool = False,
    ) -> None:
        self.pooled, self.not_decayed = pooled, tuple(not_decayed)
        self.model, self.objective, self.bank = model, objective, bank
        self.learning_rate, self.bank_learning_rate = learning_rate, bank_learning_rate
        if learning_rate is None:
            model.requires_grad_(False)
        self.base = [p for p in model.parameters() if p.requires_grad]
        frozen_statistics = frozen_statistics or bank is not None
        self.frozen_norms = list(batch_norms(model).values()) if frozen_statistics else []
        self.slot_rates: list[float] | None = None
        self.average = 0.0
        self.mean: list[Tensor] = []
        self.base_optimizer: torch.optim.Optimizer | None = None
        self.bank_optimizer: SlotAdamW | None = None
        self.autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
        self.token_budget: int | None = None
        self.recompute = False
        self.dropout = RowDropout(model)
        self.partition: Partition | None = None

    @property
    def sharded(self) -> bool:
        """Whether the base is sharded over the processes."""
        return self.partition is not None and self.partition.sharded

    @property
    def sharded_over(self) -> ProcessGroup:
        """The processes over which the base is sharded; this one alone where it is whole."""
        if self.partition is None or not self.partition.sharded:
            return ProcessGroup()
        return self.partition.group

    @property
    def parameters_per_task(self) -> int:
        """Number of parameters that are trained for each task, or for the only one."""
        if self.bank is not None:
            return self.bank.parameters_per_slot
        return sum(p.numel() for p in self.base)

    def place(self, device: torch.device, partition: Partition) -> None:
        """Moves everything to the device; shards the base if the partition says so.

        Raises:
            UserError: The base is sharded, and must be called for each task of a batch on its own.
        """
        self.partition = partition
        if partition.sharded:
            if self.bank is not None and len(partition.local_data) > 1:
                self._check_mixing(self.bank, partition.local_data)
            shard(self.model, device, partition.group.size)
            self.dropout = RowDropout(self.model, tries=False)  # all processes call equally often
            self.base = [p for p in self.model.parameters() if p.requires_grad]
        self.model.to(device)
        if self.bank is not None:
            self.bank.to(device)

    def _check_mixing(self, bank: AdapterBank, data: TaskData) -> None:
        """Lets the bank learn from two rows of two tasks, while the base is not sharded yet.

        Once it is, the processes must call it equally often.

        Raises:
            UserError: The base must be called for each task of a batch on its own.
        """
        device = next(self.model.parameters()).device
        step = data.step([(0, 0), (1, 0)], "train", train=True, seed=[0])
        bank.to(device)
        with torch.random.fork_rng(devices=[]), self.ready(), eval_no_grad(self.model):
            self.objective.losses(self.model, step.chunks[0].to(device))
            self.objective.scores(self.model, step.chunks[0].to(device))
        reason = bank.settle()
        if reason is not None:
            raise UserError(
                f"{type(self.model).__name__} cannot be sharded (FSDP) with adapters, as it must "
                f"be called for each task of a batch on its own: {reason}"
            )

    def start(self, run: Run) -> None:
        """Makes the optimisers; called once, when everything is on its device.

        Raises:
            UserError: The base is sharded and the run's optimiser cannot be.
        """
        if self.sharded and run.optimizer != "adamw":
            raise UserError(f"optimizer {run.optimizer} cannot be sharded (FSDP); choose adamw")
        self.token_budget = run.token_budget or default_token_budget(self.model)
        self.recompute = run.gradient_checkpointing
        if self.average:
            self.mean = [torch.zeros_like(p) for p in self.base]
        if self.base:
            self.base_optimizer = make_adamw(
                self._groups(), self.learning_rate or 0.0, run.weight_decay, run.optimizer
            )
        if self.bank is not None:
            parts = (self.bank.layers, self.bank.heads)  # a step may move only one of them
            groups = [{"params": list(part.parameters())} for part in parts]
            self.bank_optimizer = SlotAdamW(
                [group for group in groups if group["params"]],
                lr=self.bank_learning_rate,
                weight_decay=run.weight_decay,
            )

    def vary(self, methods: Sequence[Any]) -> None:
        """Lets slots of the bank differ in the `slot_fields` of their method; before `start`.

        Args:
            methods: The record of each slot.
        """
        self.slot_rates = [method.learning_rate for method in methods]

    def settle(self, model: nn.Module) -> None:
        """Puts into the base what the tasks' own parameters leave there; by default nothing.

        All processes call it.

        Args:
            model: The base, or a copy of it.
        """

    def stop(self) -> None:
        """Frees what only training needs: optimisers, mean weights, and the tasks' examples."""
        self.base_optimizer = self.bank_optimizer = None
        self.mean = []
        self.partition = None

    def write(self, folder: Path, labels: Sequence[Any] | None) -> None:
        """Writes the model that was adapted to one task, as a plain model folder.

        A learner that changes only a small part of the base overrides this.

        Args:
            folder: An empty folder.
            labels: Labels of the outputs, in order; None where outputs are not labels.
        """
        name_outputs(self.model, labels or ())
        save_base(self.model, None, folder)

    def _groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base: with and without weight decay."""
        if not self.not_decayed:
            return [{"params": self.base}]
        names = {p: name for name, p in self.model.named_parameters()}
        exempt = {p for p in self.base if any(part in names[p] for part in self.not_decayed)}
        return [
            {"params": [p for p in self.base if p not in exempt]},
            {"params": [p for p in self.base if p in exempt], "weight_decay": 0.0},
        ]

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside the block the bank is attached and no work is wasted.

        Padding is left out, and the output of the frozen lower blocks is computed once per text.
        """
        adapted = [] if self.bank is None else self.bank.adapted_names
        with contextlib.ExitStack() as stack:
            stack.enter_context(embedding_with(self.model))
            if not self.sharded:  # it calls the model more often in some processes
                stack.enter_context(frozen_prefix(self.model, adapted))
            if self.recompute:
                stack.enter_context(recomputed(self.model))
            copied = [] if self.bank is None else self.bank.head_names
            stack.enter_context(packed(self.model, copied, else_grouped=not self.sharded))
            if self.bank is not None:
                stack.enter_context(self.bank.attached())
            yield

    def update(
        self, steps: Sequence[Step], run: Run, rate: float, seed: int = 0
    ) -> dict[int, float]:
        """Updates everything that is trained.

        Args:
            steps: The `batches_per_update` batches of this update.
            run: Gradient clipping.
            rate: Factor of the learning rates at this point of the schedule.
            seed: Random seed of this update, the same in all processes.

        Returns:
            The mean loss of each slot in the step, whichever process holds it. If one is not
            finite, nothing has moved.
        """
        local_losses = self.gradients(steps, seed)
        losses = local_losses
        if self.partition is not None:
            losses = self.partition.mean_losses(local_losses, steps[-1])
        if not all(map(math.isfinite, losses.values())):
            return losses
        if self.partition is not None and not self.sharded:
            self.partition.group.sum_gradients(self.base)
        if self.base_optimizer is not None:
            if run.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.base, run.max_grad_norm)
            for group in self.base_optimizer.param_groups:
                group["lr"] = rate * (self.learning_rate or 0.0)
            self.base_optimizer.step()
            self.base_optimizer.zero_grad()
        if self.bank_optimizer is not None and local_losses:
            for group in self.bank_optimizer.param_groups:
                group["lr"] = self.bank_rate(rate)
            rates = self.slot_rates
            self.bank_optimizer.step_slots(
                sorted(local_losses),
                grad_scale=steps[-1].num_slots,
                max_norm=run.max_grad_norm,
                rates=None if rates is None else [rate * of_slot for of_slot in rates],
            )
        return losses

    @torch.no_grad()
    def add_to_mean(self, update: int, num_updates: int) -> None:
        """Adds the base's weights after this update to their mean, if averaging has begun."""
        count = update + 1 - math.floor((1 - self.average) * num_updates)
        for mean, p in zip(self.mean, self.base, strict=True) if count > 0 else ():
            mean.lerp_(p, 1 / count)

    @torch.no_grad()
    def take_mean(self) -> None:
        """Sets the base's weights to their mean."""
        for mean, p in zip(self.mean, self.base, strict=True):
            p.copy_(mean)

    def bank_rate(self, rate: float) -> float:
        """The bank's learning rate at this point of the schedule."""
        return rate * self.bank_learning_rate

    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        """Puts the gradient of the update into `.grad`; returns each slot's mean loss.

        Args:
            steps: The `batches_per_update` batches of this update.
            seed: Random seed of this update.
        """
        return self.backward(steps[0])

    def backward(self, step: Step) -> dict[int, float]:
        """Adds the gradient of the step's loss to `.grad`; returns each slot's mean loss."""
        count(step.num_tokens, len(step.slots))
        counts = Counter(step.slots)
        place = {slot: i for i, slot in enumerate(sorted(counts))}
        device = next(self.model.parameters()).device
        sums = torch.zeros(len(place), device=device)
        for module in self.frozen_norms:
            module.eval()
        for chunk in step.chunks:
            with self.autocast(), self._draws_of(step):
                losses = self.row_losses(chunk, device)
            losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
            weights = losses.new_tensor([self._weight(slot, counts, step) for slot in chunk.slots])
            with self._backward_of_draws():
                (losses @ weights).backward()
            index = torch.tensor([place[slot] for slot in chunk.slots], device=device)
            sums.index_add_(0, index, losses.detach().float())
        for chunk in step.fillers:
            with self.autocast():
                losses = self.objective.losses(self.model, chunk.to(device))
            (0 * losses.sum()).backward()
        return {
            slot: total / counts[slot] for slot, total in zip(place, sums.tolist(), strict=True)
        }

    def _draws_of(self, step: Step) -> AbstractContextManager[Any]:
        """A context in which dropout is seeded by task and step, where the model has any."""
        lora_dropout = 0 if self.bank is None else (self.bank.lora or {}).get("lora_dropout", 0)
        if self.dropout.drew is False and not lora_dropout:  # adapters are left out of some steps
            return contextlib.nullcontext()
        with contextlib.ExitStack() as stack:
            stack.enter_context(recomputed_on_route(self.model))
            stack.enter_context(self.dropout.seeded(step.slot_seeds, step.seed))
            return stack.pop_all()

    def _backward_of_draws(self) -> AbstractContextManager[Any]:
        """A context for the backward pass of what was drawn in `_draws_of`."""
        return only_known_recomputation() if self.dropout.drew else contextlib.nullcontext()

    def row_losses(self, chunk: Batch, device: torch.device) -> Tensor:
        """(n,) the loss of each example; a method may add terms to it."""
        return self.objective.losses(self.model, chunk.to(device))

    def _weight(self, slot: int, counts: Mapping[int, int], step: Step) -> float:
        """Weight of an example of this slot in the loss of the step."""
        return 1 / (step.num_rows if self.pooled else step.num_slots * counts[slot])

    def score(self, data: TaskData, split: str, max_rows: int | None) -> dict[int, float]:
        """The mean score of each slot that has examples in that split; call it inside `ready`."""
        return score_slots(
            self.model,
            data,
            split,
            max_rows,
            budget=self.token_budget,
            in_step_with=self.sharded_over,
        )

    def scores_and_losses(
        self, data: TaskData, split: str
    ) -> tuple[dict[int, float], dict[int, float]]:
        """The mean score and the mean loss of each slot, as `score`."""
        return scores_and_losses(
            self.model, data, split, budget=self.token_budget, in_step_with=self.sharded_over
        )

    def state(self, *, optimizers: bool) -> dict[str, Tensor]:
        """The tensors that training changes, by name; with those of the optimisers on request."""
        tensors = {
            f"base.{k}": p.detach() for k, p in self.model.named_parameters() if p.requires_grad
        }
        tensors |= {f"buffer.{k}": b for k, b in moving_buffers(self.model)}
        tensors |= {f"mean.{i}": mean for i, mean in enumerate(self.mean)}
        if self.bank is not None:
            tensors |= {f"bank.{k}": p.detach() for k, p in self.bank.named_parameters()}
        for name, optimizer in self._optimizers() if optimizers else ():
            for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                state = optimizer.state[p]
                tensors |= {f"{name}.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        for name, current in self.state(optimizers=False).items():
            current.copy_(place_like(current, tensors[name]))
        for name, optimizer in self._optimizers():
            for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                prefix = f"{name}.{i}."
                saved = {k: v for k, v in tensors.items() if k.startswith(prefix)}
                if saved:
                    optimizer.state[p] = {
                        k.removeprefix(prefix): _moment(p, v, name) for k, v in saved.items()
                    }
                    if is_8bit(optimizer):  # its step count is a plain number
                        optimizer.state[p]["step"] = int(optimizer.state[p]["step"])

    def slot_state(self, slot: int) -> dict[str, Tensor]:
        """A copy of the state of one slot: its part of the bank, or of all that is trained."""
        if self.bank is not None:
            return self.bank.slot_state(slot)
        return {k: v.clone() for k, v in self.state(optimizers=False).items()}

    def load_slot(self, slot: int, state: dict[str, Tensor]) -> None:
        """Restores what `slot_state` returned."""
        if self.bank is not None:
            self.bank.load_slot(slot, state)
        else:
            self.load_state(state)

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        named = (("base_adamw", self.base_optimizer), ("bank_adamw", self.bank_optimizer))
        return [(name, optimizer) for name, optimizer in named if optimizer is not None]


def _moment(p: Tensor, value: Tensor, optimizer: str) -> Tensor:
    """A copy of an optimiser's value on the parameter's device; step counts of slots stay put."""
    if value.shape == p.shape:
        return place_like(p, value).clone()
    return value.clone() if optimizer == "bank_adamw" else value.to(p.device).clone()
