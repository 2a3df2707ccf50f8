"""`SparseLearner`: a model of which chosen entries are trained, as SaRA trains it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from foretune.adapters.sparse import SparseDelta
from foretune.run import Run
from foretune.tasks.task import Objective
from foretune.training.data import Step
from foretune.training.learners.joint import Learner
from foretune.training.ranks import Deal


class SparseLearner(Learner):
    """AdamW on the entries of a sparse change; gradients elsewhere are dropped as they appear.

    Args:
        delta: The entries, of the model that is trained.
        objective: Losses and scores.
        learning_rate: Of the entries.
        nuclear: λ of λ · Σ ‖P ⊙ M‖_*, which is added to the loss.
        reselect: Share of the updates after which only those entries go on that are still below
            the threshold; None for never.

    Attributes:
        reselected: Entries before and after that, None as long as it has not happened.
    """

    def __init__(
        self,
        delta: SparseDelta,
        objective: Objective,
        *,
        learning_rate: float,
        nuclear: float,
        reselect: float | None,
    ) -> None:
        super().__init__(delta.model, objective, learning_rate=learning_rate)
        self.delta, self.nuclear, self.reselect = delta, nuclear, reselect
        self.base = list(delta.parameters())
        self.updates = 0
        self.reselected: tuple[int, int] | None = None

    def place(self, device: torch.device, deal: Deal) -> None:
        super().place(device, deal)
        self.delta.move(device)

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with super().ready(), self.delta.attached():
            yield

    def update(self, steps: Sequence[Step], run: Run, rate: float) -> dict[int, float]:
        if self.reselect is not None and self.updates == round(self.reselect * run.steps):
            self.reselected = self.delta.reselect(self.base_optimizer)
        losses = super().update(steps, run, rate)
        self.delta.write()
        self.updates += 1
        return losses

    def gradients(self, steps: Sequence[Step]) -> dict[int, float]:
        losses = super().gradients(steps)
        if self.nuclear:
            self.delta.add_nuclear(self.nuclear)
        return losses

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        self.delta.read()
