"""`FDAlignLearner`: adapts while preserving predictions over spurious prototypes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.linalg.prototypes import Direction, divergence
from foretune.models.calls import eval_no_grad
from foretune.tasks.batch import Batch
from foretune.tasks.objectives.prompts import PromptClassification
from foretune.training.data import TaskData
from foretune.training.learners.joint import Learner
from foretune.training.process_group import Partition

TEACHER_BATCH_SIZE = 64


class FDAlignLearner(Learner):
    """The joint learner with weight · KL between student and teacher logits over prototypes.

    The teacher is the model before its first step. It never moves, so its logits of each training
    example are computed once, in eval mode and without adapters; there is no second model.

    Args:
        model: The base.
        objective: Losses and scores.
        prototypes: (k, d) of each slot, with rows of unit length.
        weight: Weight of the divergence in each example's loss; 0 leaves it out.
        direction: As in `divergence`.
        bank: Adapters, or None.
        learning_rate: Learning rate of the base; None freezes it.
        bank_learning_rate: Learning rate of the bank.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: PromptClassification,
        *,
        prototypes: Sequence[Tensor],
        weight: float,
        direction: Direction,
        bank: AdapterBank | None = None,
        learning_rate: float | None = None,
        bank_learning_rate: float = 0.0,
    ) -> None:
        super().__init__(
            model,
            objective,
            bank=bank,
            learning_rate=learning_rate,
            bank_learning_rate=bank_learning_rate,
        )
        self.prompts, self.prototypes = objective, prototypes
        self.weight, self.direction = weight, direction
        self.teacher: dict[tuple[int, bytes], Tensor] = {}

    @override
    def stop(self) -> None:
        super().stop()
        self.teacher = {}

    @override
    def place(self, device: torch.device, partition: Partition) -> None:
        if partition.sharded:
            raise UserError("FD-Align needs the whole base in every process: adapt without FSDP")
        super().place(device, partition)
        if self.weight:
            self._cache_teacher(partition.local_data, device)

    def _cache_teacher(self, data: TaskData, device: torch.device) -> None:
        """Caches the logits of all training examples; the model has not moved yet."""
        picks = [(s, i) for s in range(len(data)) for i in range(data.num_rows(s, "train"))]
        with eval_no_grad(self.model):
            for start in range(0, len(picks), TEACHER_BATCH_SIZE):
                part = picks[start : start + TEACHER_BATCH_SIZE]
                for chunk in data.step(part, "train", train=False, seed=[0]).chunks:
                    with self.autocast():  # no bank is attached yet
                        features = self.prompts.features(self.model, chunk.to(device))
                    logits = self.read(features, chunk)
                    self.teacher |= zip(keys_of(chunk), logits.cpu(), strict=True)

    def read(self, features: Tensor, chunk: Batch) -> Tensor:
        """(n, k) logits of features (n, d) over the spurious prototypes of each example's slot."""
        vectors = torch.stack([self.prototypes[slot] for slot in chunk.slots]).to(features)
        assert self.prompts.temperature is not None
        return torch.einsum("nd,nkd->nk", features, vectors) / self.prompts.temperature

    @override
    def row_losses(self, chunk: Batch, device: torch.device) -> Tensor:
        moved = chunk.to(device)
        features = self.prompts.features(self.model, moved)
        losses = self.prompts.losses_of(features, moved)
        if not self.weight:
            return losses
        teacher = torch.stack([self.teacher[key] for key in keys_of(chunk)]).to(features)
        return losses + self.weight * divergence(
            self.read(features, chunk), teacher, self.direction
        )


def keys_of(batch: Batch) -> list[tuple[int, bytes]]:
    """(slot, content) of each example of a batch, which does not depend on the padding."""
    if "x" in batch.inputs:
        rows = [x.numpy().tobytes() for x in batch.inputs["x"]]
    else:
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        ids = batch.inputs["input_ids"]
        rows = [row[:n].numpy().tobytes() for row, n in zip(ids, lengths, strict=True)]
    return list(zip(batch.slots, rows, strict=True))
