"""`Learner`: what an update moves and how its gradient is made; methods build it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.adapters.bank import AdapterBank
from foretune.models.frozen_prefix import frozen_prefix
from foretune.models.surgery import head_modules
from foretune.run import Run
from foretune.tasks.batch import Batch
from foretune.tasks.objectives import Objective
from foretune.training.data import TaskData
from foretune.training.optim import SlotAdamW
from foretune.training.scoring import score_slots


class Learner:
    """The joint learner: one backward over a batch that mixes tasks.

    The loss is the mean over the tasks in the batch of each task's mean loss. The base follows
    that gradient; each slot of the bank follows the gradient of its own task's mean loss, so that
    it does not matter to a task how many others share the step. With pooled rows the loss is the
    mean over the rows instead, whichever task they come from.

    Args:
        model: The base; its parameters with `requires_grad` are trained at `learning_rate`.
        objective: Losses and scores.
        bank: Adapters and heads of the slots, or None.
        learning_rate: Of the base; None keeps the base as it is.
        bank_learning_rate: Of the bank.
        pooled: Weight rows alike, not tasks.
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
    ) -> None:
        self.pooled = pooled
        self.model, self.objective, self.bank = model, objective, bank
        self.learning_rate, self.bank_learning_rate = learning_rate, bank_learning_rate
        if learning_rate is None:
            model.requires_grad_(False)
        self.base = [p for p in model.parameters() if p.requires_grad]
        self.base_optimizer: torch.optim.Optimizer | None = None
        self.bank_optimizer: SlotAdamW | None = None

    def start(self, run: Run) -> None:
        """Makes the optimisers; called once, when everything is on its device."""
        if self.base:
            self.base_optimizer = torch.optim.AdamW(
                self.base, lr=self.learning_rate or 0.0, weight_decay=run.weight_decay, fused=True
            )
        if self.bank is not None:
            self.bank_optimizer = SlotAdamW(
                self.bank.parameters(), lr=self.bank_learning_rate, weight_decay=run.weight_decay
            )

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside the block the bank is attached and the frozen lower blocks are computed once."""
        adapted = [] if self.bank is None else self.bank.adapted_names
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen_prefix(self.model, adapted))
            if self.bank is not None:
                stack.enter_context(self.bank.attached())
            yield

    def update(self, batches: Sequence[Batch], run: Run, rate: float) -> dict[int, float]:
        """One update of everything that is trained.

        Args:
            batches: `batches_per_update` of them.
            run: Weight decay, clipping.
            rate: What the learning rates are multiplied by at this point of the schedule.

        Returns:
            The mean loss of each slot that took part. When one is not finite nothing has moved.
        """
        losses = self.gradients(batches)
        if any(not torch.isfinite(torch.tensor(loss)) for loss in losses.values()):
            return losses
        if self.base_optimizer is not None:
            if run.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.base, run.max_grad_norm)
            for group in self.base_optimizer.param_groups:
                group["lr"] = rate * (self.learning_rate or 0.0)
            self.base_optimizer.step()
            self.base_optimizer.zero_grad()
        self.step_bank(losses, run, rate)
        return losses

    def step_bank(self, losses: dict[int, float], run: Run, rate: float) -> None:
        """Moves the slots that took part in the last gradient."""
        if self.bank_optimizer is None:
            return
        for group in self.bank_optimizer.param_groups:
            group["lr"] = rate * self.bank_learning_rate
        self.bank_optimizer.step_slots(
            sorted(losses), grad_scale=len(losses), max_norm=run.max_grad_norm
        )
        self.bank_optimizer.zero_grad()

    def gradients(self, batches: Sequence[Batch]) -> dict[int, float]:
        """Puts the gradient of the update into `.grad`; returns each slot's mean loss."""
        losses, by_slot = self.loss(batches[0])
        losses.backward()
        return by_slot

    def loss(self, batch: Batch) -> tuple[Tensor, dict[int, float]]:
        """The loss of the batch, and the mean loss of each slot in it."""
        per_example = self.objective.losses(self.model, batch).float()
        slots = torch.tensor(batch.slots)
        present, index, counts = torch.unique(slots, return_inverse=True, return_counts=True)
        index, counts = index.to(per_example.device), counts.to(per_example.device)
        zeros = torch.zeros(len(present), device=per_example.device)
        means = zeros.index_add(0, index, per_example) / counts
        by_slot = dict(zip(present.tolist(), means.detach().tolist(), strict=True))
        return (per_example if self.pooled else means).mean(), by_slot

    def score(self, data: TaskData, split: str, max_rows: int | None) -> dict[int, float]:
        """The mean score of each slot that has rows in that split; call it inside `ready`."""
        return score_slots(self.model, data, split, max_rows)

    def state(self, *, optimizers: bool) -> dict[str, Tensor]:
        """Everything that training moves, by name; optimiser state on request."""
        found = {
            f"base.{k}": p.detach() for k, p in self.model.named_parameters() if p.requires_grad
        }
        found |= {f"buffer.{k}": b for k, b in self.model.named_buffers()}
        if self.bank is not None:
            found |= {f"bank.{k}": p.detach() for k, p in self.bank.named_parameters()}
        for name, optimizer in self._optimizers() if optimizers else ():
            for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                found |= {f"{name}.{i}.{k}": v for k, v in optimizer.state[p].items()}
        return found

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        for name, current in self.state(optimizers=False).items():
            current.copy_(tensors[name])
        for name, optimizer in self._optimizers():
            for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
                prefix = f"{name}.{i}."
                saved = {k: v for k, v in tensors.items() if k.startswith(prefix)}
                if saved:
                    optimizer.state[p] = {
                        k.removeprefix(prefix): v.clone() for k, v in saved.items()
                    }

    def _optimizers(self) -> list[tuple[str, torch.optim.Optimizer]]:
        named = (("base_adamw", self.base_optimizer), ("bank_adamw", self.bank_optimizer))
        return [(name, optimizer) for name, optimizer in named if optimizer is not None]


def make_bank(
    model: nn.Module,
    objective: Objective,
    keys: Sequence[str],
    seed: int,
    *,
    lora: Mapping[str, Any] | None = None,
    head_copies: bool = False,
) -> AdapterBank:
    """A bank with LoRA adapters, heads of their own, or both.

    A slot has a head of its own, freshly drawn, where the tasks' label sets differ. `head_copies`
    asks for one in any case; it then starts as the base's.
    """
    labels_differ = objective.num_outputs() is not None and objective.shared() is not objective
    heads = head_modules(model) if labels_differ or head_copies else []
    return AdapterBank(model, keys, lora=lora, heads=heads, fresh_heads=labels_differ, seed=seed)
