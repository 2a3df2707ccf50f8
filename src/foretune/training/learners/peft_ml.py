"""`PEFTMLLearner`: PEFT-ML with a penalty, adapter dropout and restarts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence

import torch
from torch import nn
from typing_extensions import override

from foretune.adapters.bank import AdapterBank
from foretune.tasks.task import Objective
from foretune.training.data import Step
from foretune.training.learners.joint import Learner


class PEFTMLLearner(Learner):
    """The joint learner whose adapters are penalised, dropped in some steps, or restarted.

    Penalty and dropout lead from PEFT-ML towards standard retraining, restarts towards training
    for the beginning of an adaptation.

    Args:
        model: The base.
        objective: Losses and scores.
        bank: The adapters.
        learning_rate: Learning rate of the base.
        bank_learning_rate: Learning rate of the bank. With restarts it is constant, as it is when
            an unseen task begins.
        penalty: λ of λ · Σ ‖s·B_t A_t − C‖²_F, which is added to the loss of each task.
        penalised_heads: Whether λ · Σ ‖w_t − c‖²_F over the weights of its head is added, too.
        towards_mean: Whether C and c are the means over all tasks, instead of zero. They minimise
            the sum over the tasks, so the gradient of a task's term is that at a constant C.
        adapter_dropout: Fraction of the steps that train the base (and heads) without adapters.
        restart_every: Mean number of steps between two restarts of a task's adapter; None for
            no restarts.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        bank: AdapterBank,
        learning_rate: float,
        bank_learning_rate: float,
        penalty: float,
        penalised_heads: bool,
        towards_mean: bool,
        adapter_dropout: float,
        restart_every: int | None,
    ) -> None:
        super().__init__(
            model,
            objective,
            bank=bank,
            learning_rate=learning_rate,
            bank_learning_rate=bank_learning_rate,
        )
        self.adapters, self.penalty = bank, penalty
        self.penalised_heads, self.towards_mean = penalised_heads, towards_mean
        self.adapter_dropout, self.restart_every = adapter_dropout, restart_every

    @override
    def bank_rate(self, rate: float) -> float:
        return self.bank_learning_rate if self.restart_every else super().bank_rate(rate)

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        present = sorted(set(steps[0].slots))
        bare = random.Random(seed).random() < self.adapter_dropout
        if not bare:
            self._restart(present, seed)
        with self.adapters.bare() if bare else contextlib.nullcontext():
            losses = self.backward(steps[0])
        if self.penalty:
            self._add_penalty(present, self.penalty / steps[0].num_slots)
        if bare:
            self.adapters.layers.zero_grad()  # without gradients they do not move
        return losses

    def _add_penalty(self, present: Sequence[int], weight: float) -> None:
        centre = None
        if self.towards_mean:
            assert self.partition is not None
            centre = self.partition.mean_over_slots(self.adapters.mean())
        if present:
            heads = self.penalised_heads
            self.adapters.add_penalty(present, weight, centre=centre, heads=heads)

    @override
    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Sets the base's head to the mean of the tasks' heads, where all have the same labels."""
        assert self.partition is not None
        weights = dict(model.named_parameters())
        means = self.partition.mean_over_slots(self.adapters.mean_heads())
        for name, mean in means.items():
            if weights[name].requires_grad:
                weights[name].copy_(mean)

    def _restart(self, present: Sequence[int], seed: int) -> None:
        """Restarts the adapter of each of these slots with probability 1 / restart_every.

        Tasks restart at different times, so a step has adapters of all ages, and a resumed run
        need not know when the last restart was.
        """
        if not self.restart_every:
            return
        chosen = [
            slot
            for slot in present
            if random.Random(f"{seed}/{self.adapters.keys[slot]}").random() < 1 / self.restart_every
        ]
        self.adapters.reset(chosen, seed)
        assert self.bank_optimizer is not None
        self.bank_optimizer.forget(chosen)
