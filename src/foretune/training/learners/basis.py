"""`BasisLearner`: MAP estimates of the coefficients of adapters in a basis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foretune.adapters.coefficients import Coefficients
from foretune.models.calls import eval_no_grad
from foretune.run import Run
from foretune.tasks.task import Objective
from foretune.training.data import Step
from foretune.training.learners.joint import Learner
from foretune.training.optim import SlotAdamW
from foretune.training.process_group import Partition, pad_with_fillers


class BasisLearner(Learner):
    """Adam on the coefficients (z_t, ε_t) of every task, whose adapter is μ + z_t P + σ ε_t.

    The gradients of the adapters are those of the joint learner. Each task minimises

        1/n_t · (Σ_j L(x_tj) + s/2 · (‖z_t‖² + ‖ε_t‖²)),    n_t its number of training examples,

    whether a step holds all of its examples or a few. There is no weight decay beside this prior,
    and no clipping, which would change the ratio of loss and prior; Adam's steps are bounded.

    Args:
        model: The base, frozen.
        objective: Losses and scores.
        coefficients: The coefficients, with their bank.
        learning_rate: Learning rate, in units of the prior's standard deviation.
        strength: s; 1 for the posterior mode.
        candidates: (m, k) values of z from which each task starts at the one with the lowest loss
            on its training examples; None for z = 0.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        coefficients: Coefficients,
        learning_rate: float,
        strength: float,
        candidates: Tensor | None = None,
    ) -> None:
        super().__init__(model, objective, bank=coefficients.bank, bank_learning_rate=learning_rate)
        self.coefficients = coefficients
        self.strength: float | Tensor = strength  # of all slots, or (slots,)
        self.candidates = candidates
        self.num_rows = torch.zeros(0)
        coefficients.write(range(len(coefficients.z)))

    @override
    def vary(self, methods: Sequence[Any]) -> None:
        super().vary(methods)
        self.strength = torch.tensor([float(method.strength) for method in methods])

    @property
    @override
    def parameters_per_task(self) -> int:
        return self.coefficients.parameters_per_slot

    @override
    def place(self, device: torch.device, partition: Partition) -> None:
        super().place(device, partition)
        self.coefficients.to(device)
        data = partition.local_data
        rows = [data.num_rows(slot, "train") for slot in range(len(data))]
        self.num_rows = torch.tensor(rows, dtype=torch.float32, device=device)

    @override
    def start(self, run: Run) -> None:
        super().start(run)
        self.bank_optimizer = SlotAdamW(
            self.coefficients.per_slot, lr=self.bank_learning_rate, weight_decay=0.0
        )
        if self.candidates is not None:
            self._start_from(self.candidates)

    @override
    def update(
        self, steps: Sequence[Step], run: Run, rate: float, seed: int = 0
    ) -> dict[int, float]:
        losses = super().update(steps, run.replace(max_grad_norm=None), rate, seed)
        self.coefficients.write(sorted(set(steps[0].slots)))
        return losses

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        losses = super().gradients(steps, seed)
        slots = sorted(losses)
        self.coefficients.pull_back(slots)
        self._add_prior(slots, steps[0].num_slots)
        return losses

    @torch.no_grad()
    def _add_prior(self, slots: Sequence[int], num_slots: int) -> None:
        """Adds the prior's part to the gradients, which are those of a mean over `num_slots`."""
        if not slots:
            return
        index = torch.tensor(slots, device=self.num_rows.device)
        strength = self.strength
        if isinstance(strength, Tensor):
            strength = strength.to(index.device)[index]
        weight = strength / (self.num_rows[index] * num_slots)
        for p in self.coefficients.per_slot:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad[index] += weight.view(-1, *[1] * (p.dim() - 1)) * p[index]

    @torch.no_grad()
    def _start_from(self, candidates: Tensor) -> None:
        """Sets each task's z to that of the candidates with the lowest mean loss on its rows."""
        assert self.partition is not None
        data, z = self.partition.local_data, self.coefficients.z
        slots = range(len(data))
        lowest, best = dict.fromkeys(slots, math.inf), z.clone()
        with self.ready(), eval_no_grad(self.model):
            for candidate in candidates.to(z):
                z[:] = candidate
                self.coefficients.write(slots)
                for slot, loss in self._mean_losses().items():
                    if loss < lowest[slot]:
                        lowest[slot], best[slot] = loss, candidate
        z.copy_(best)
        self.coefficients.write(slots)

    def _mean_losses(self) -> Mapping[int, float]:
        """The mean loss of each task's training examples."""
        assert self.partition is not None
        data = self.partition.local_data
        device = self.coefficients.z.device
        picks = [
            (slot, i) for slot in range(len(data)) for i in range(data.num_rows(slot, "train"))
        ]
        step = data.step(picks, "train", train=True, seed=[0], budget=self.token_budget)
        step = pad_with_fillers(step, data, self.sharded_over)
        sums = torch.zeros(len(data), device=device)
        for chunk in step.chunks:
            losses = self.row_losses(chunk, device).float()
            sums.index_add_(0, torch.tensor(chunk.slots, device=device), losses)
        for chunk in step.fillers:
            self.row_losses(chunk, device)
        return dict(enumerate((sums / self.num_rows).tolist()))

    @override
    def state(self, *, optimizers: bool) -> dict[str, Tensor]:
        stacked = {f"bank.coefficients.{i}": p for i, p in enumerate(self.coefficients.per_slot)}
        return {**super().state(optimizers=optimizers), **stacked}
