"""`FactorisedHeadsLearner`: the head of each task is a combination of heads that all share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from foretune.adapters.coefficients import Coefficients
from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.task import Objective
from foretune.training.data import Step
from foretune.training.learners.peft_ml import PEFTMLLearner
from foretune.training.optim import SlotAdamW
from foretune.training.process_group import Partition


class FactorisedHeadsLearner(PEFTMLLearner):
    """PEFT-ML with the heads Σ_k w_tk V_k: V is trained with the base, w_t with its task.

    The gradients of the heads are those of PEFT-ML, penalty included; those of w and V follow by
    the chain rule. After an update the bank holds the heads of all tasks.

    Args:
        model: The base.
        objective: Losses and scores.
        coefficients: w, as `z`, and V, as `directions`, which are learnt, with their bank of heads.
        learning_rate: Learning rate of the base and of V.
        bank_learning_rate: Learning rate of w.
        penalty: λ of λ · ‖Σ_k w_tk V_k‖²_F over the weights of a head.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        coefficients: Coefficients,
        learning_rate: float,
        bank_learning_rate: float,
        penalty: float,
    ) -> None:
        super().__init__(
            model,
            objective,
            bank=coefficients.bank,
            learning_rate=learning_rate,
            bank_learning_rate=bank_learning_rate,
            penalty=penalty,
            penalised_heads=True,
            towards_mean=False,
            adapter_dropout=0.0,
            restart_every=None,
        )
        self.coefficients = coefficients
        self.base += coefficients.shared
        self._write()

    @property
    @override
    def parameters_per_task(self) -> int:
        return self.coefficients.parameters_per_slot

    @override
    def place(self, device: torch.device, partition: Partition) -> None:
        if partition.sharded:
            raise UserError(
                "the shared heads of factorised-heads cannot be sharded: retrain without FSDP"
            )
        super().place(device, partition)
        self.coefficients.to(device)

    @override
    def start(self, run: Run) -> None:
        super().start(run)
        self.bank_optimizer = SlotAdamW(
            self.coefficients.per_slot, lr=self.bank_learning_rate, weight_decay=run.weight_decay
        )

    @override
    def update(
        self, steps: Sequence[Step], run: Run, rate: float, seed: int = 0
    ) -> dict[int, float]:
        losses = super().update(steps, run, rate, seed)
        self._write()
        return losses

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        losses = super().gradients(steps, seed)
        self.coefficients.pull_back(sorted(losses))
        return losses

    @override
    def take_mean(self) -> None:
        super().take_mean()
        self._write()

    @override
    def state(self, *, optimizers: bool) -> dict[str, Tensor]:
        shared = {f"factors.{i}": v.detach() for i, v in enumerate(self.coefficients.shared)}
        weights = {"bank.weights": self.coefficients.z.detach()}
        return {**super().state(optimizers=optimizers), **shared, **weights}

    def _write(self) -> None:
        """Puts the heads of all tasks into the bank: V has moved, so all of them have."""
        self.coefficients.write(range(len(self.coefficients.z)))
