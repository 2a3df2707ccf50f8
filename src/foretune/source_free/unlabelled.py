"""`Unlabelled`: rows of a target domain, for a classifier that knows its labels from the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from foretune.errors import UserError
from foretune.tasks.batch import Batch
from foretune.tasks.objectives.classification import Classification, Label, shown
from foretune.tasks.objectives.regression import check_arrays
from foretune.tasks.objectives.text import IGNORED
from foretune.tasks.task import Objective, Task, TaskCollection


@dataclass(frozen=True, kw_only=True)
class Unlabelled(Objective):
    """Arrays or texts without labels; what a label may be, the source's objective knows.

    Training rows need no label, and what they have is not read. Rows that are scored need one.

    Args:
        source: The classification as fitted to the source, with one label set for all its tasks.
    """

    source: Classification

    kind: ClassVar[str] = "unlabelled"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.source.space is None:
            raise UserError(
                "Unlabelled needs the source's labels: give it a Classification fitted to source "
                "tasks that share one label set, as Classification().fit(source) returns it"
            )

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels in the order of the model's outputs."""
        return self.source.space or ()

    @property
    @override
    def head(self) -> str:
        return self.source.head

    @override
    def num_outputs(self) -> int | None:
        return len(self.labels)

    @override
    def chance(self) -> float | None:
        return 1 / len(self.labels)

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Checks the rows; there is nothing to learn.

        Raises:
            UserError: A row without its array, or one to be scored without a label of the source.
        """
        if self.source.tokenizer is None:
            check_arrays(tasks, ("x",))
        for task in tasks:
            for split in ("validation", "test"):
                self._check(task, split)
        return self

    def _check(self, task: Task, split: str) -> None:
        for i, row in enumerate(task.split(split)):
            label = _label(row)
            if label not in self.labels:
                raise UserError(
                    f'task "{task.name}", {split} row {i + 1}: a row to be scored needs a label of '
                    f"the source, which are {shown(self.labels)}; got {label!r}"
                )

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        label = _label(example)
        known = label in self.labels
        stand_in = {**example, "y": self.labels[0], "label": self.labels[0]}
        encoded = self._known(task).encode(stand_in, task)
        # Only scoring reads it, and `fit` has seen that the rows that are scored have one.
        encoded["label"] = self.labels.index(label) if known else IGNORED
        return encoded

    def _known(self, task: str) -> Classification:
        if task in self.source.labels:
            return self.source
        return Classification(
            self.source.tokenizer,
            max_tokens=self.source.max_tokens,
            labels={task: self.labels},
            space=self.labels,
        )

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        return self.source.size(row)

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        return self.source.collate(rows, slots)

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """(n, labels) logits."""
        return self.source.logits(model, batch)

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(n,) the entropy of each prediction: all that a row without a label can say alone."""
        return torch.special.entr(self.logits(model, batch).softmax(1)).sum(1)

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return (self.logits(model, batch).argmax(1) == batch.inputs["label"]).float()

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "source": self.source.to_dict()}


def _label(row: Mapping[str, Any]) -> Label | None:
    value = row.get("label", row.get("y"))
    return value.item() if isinstance(value, (np.generic, np.ndarray)) else value
