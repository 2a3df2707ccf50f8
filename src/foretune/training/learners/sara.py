"""`SaRALearner`: SaRA's training of selected entries of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from foretune.adapters.sparse import SparseDelta
from foretune.run import Run
from foretune.tasks.task import Objective
from foretune.training.data import Step
from foretune.training.learners.joint import Learner
from foretune.training.process_group import Partition


class SaRALearner(Learner):
    """AdamW on the entries of a sparse change; gradients of other entries are freed at once.

    Args:
        delta: The entries, of the model that is trained.
        objective: Losses and scores.
        learning_rate: Learning rate of the entries.
        nuclear: λ of λ · Σ ‖P ⊙ M‖_*, which is added to the loss.
        nuclear_over: "one" for the sum over one random matrix of more than 64 rows and columns in
            each step, "all" for the sum over all matrices and kernels.
        reselect: Fraction of the updates after which only the entries that are still below the
            threshold are trained further; None for no reselection.

    Attributes:
        reselected: Number of entries before and after the reselection; None before it.
    """

    def __init__(
        self,
        delta: SparseDelta,
        objective: Objective,
        *,
        learning_rate: float,
        nuclear: float,
        nuclear_over: str,
        reselect: float | None,
    ) -> None:
        super().__init__(delta.model, objective, learning_rate=learning_rate)
        self.delta, self.nuclear, self.reselect = delta, nuclear, reselect
        self.nuclear_over = nuclear_over
        self.base = list(delta.parameters())
        self.updates = 0
        self.reselected: tuple[int, int] | None = None

    @override
    def place(self, device: torch.device, partition: Partition) -> None:
        super().place(device, partition)
        self.delta.move(device)

    @override
    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        with super().ready(), self.delta.attached():
            yield

    @override
    def update(
        self, steps: Sequence[Step], run: Run, rate: float, seed: int = 0
    ) -> dict[int, float]:
        if self.reselect is not None and self.updates == round(self.reselect * run.steps):
            self.reselected = self.delta.reselect(self.base_optimizer)
        losses = super().update(steps, run, rate, seed)
        self.delta.write()
        self.updates += 1
        return losses

    @override
    def gradients(self, steps: Sequence[Step], seed: int = 0) -> dict[int, float]:
        losses = super().gradients(steps, seed)
        if self.nuclear:
            names = None if self.nuclear_over == "all" else self.one_matrix(seed)
            self.delta.add_nuclear(self.nuclear, names)
        return losses

    def one_matrix(self, seed: int) -> list[str]:
        """The matrix that this step's nuclear term is taken over; none where all are small."""
        names = self.delta.large_matrices()
        return [np.random.default_rng([seed, self.updates]).choice(names)] if names else []

    @override
    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        super().load_state(tensors)
        self.delta.read()

    @override
    def write(self, folder: Path, labels: Sequence[Any] | None) -> None:
        """Writes the difference from the base; `foretune.load_sparse` reads it."""
        self.delta.save(folder)
