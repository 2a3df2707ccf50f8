"""`PulledLearner`: the joint learner of a bank on a frozen base, with a pull to where it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from foretune.adapters.bank import AdapterBank
from foretune.adapters.lora import index_of
from foretune.run import Run
from foretune.tasks.task import Objective
from foretune.training.data import Step
from foretune.training.learners.joint import Learner


class PulledLearner(Learner):
    """Adds ½ p ‖θ_t − θ₀_t‖² to the loss of each task, θ_t its slot of the bank, θ₀_t its start.

    Args:
        model: The base, which is frozen.
        objective: Losses and scores.
        bank: The adapters.
        learning_rate: Learning rate of the bank.
        pull: p.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        bank: AdapterBank,
        learning_rate: float,
        pull: float,
    ) -> None:
        super().__init__(model, objective, bank=bank, bank_learning_rate=learning_rate)
        self.pull: float | Tensor = pull  # of all slots, or (slots,)
        self._starts: list[tuple[nn.Parameter, Tensor]] = []

    @override
    def vary(self, methods: Sequence[Any]) -> None:
        super().vary(methods)
        self.pull = torch.tensor([method.pull for method in methods])

    @override
    def start(self, run: Run) -> None:
        super().start(run)
        assert self.bank is not None
        if torch.as_tensor(self.pull).any():
            self._starts = [(p, p.detach().clone()) for p in self.bank.parameters()]

    @override
    def stop(self) -> None:
        super().stop()
        self._starts = []

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        losses = self.backward(steps[0])
        present = index_of(sorted(losses))
        for p, start in self._starts:
            if p.grad is not None:  # else it has not moved
                moved = p.detach()[present] - start[present]
                pull = self.pull
                if isinstance(pull, Tensor):
                    pull = pull.to(moved)[present].view(-1, *[1] * (moved.dim() - 1))
                # The gradient is that of the mean over the slots.
                p.grad[present] += pull / steps[0].num_slots * moved
        return losses
