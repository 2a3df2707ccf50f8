"""`PEFTMLLearner`: PEFT-ML with a penalty, adapter dropout and restarts."""

from __future__ import annotations

import random
from collections.abc import Sequence

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
        penalty: λ of λ · Σ ‖s·B_t A_t‖²_F, which is added to the loss of each task.
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
        self.adapter_dropout, self.restart_every = adapter_dropout, restart_every

    @override
    def bank_rate(self, rate: float) -> float:
        return self.bank_learning_rate if self.restart_every else super().bank_rate(rate)

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        if random.Random(seed).random() < self.adapter_dropout:
            with self.adapters.bare():
                losses = self.backward(steps[0])
            self.adapters.layers.zero_grad()  # without gradients they do not move
            return losses
        present = sorted(set(steps[0].slots))
        self._restart(present, seed)
        losses = self.backward(steps[0])
        if self.penalty and present:
            self.adapters.add_penalty(present, self.penalty / steps[0].num_slots)
        return losses

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
