"""`Unlabelled`: examples of a target domain, for a classifier whose labels are the source's."""

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
from foretune.tasks.example import row_name
from foretune.tasks.labels import Label, label_places, label_text, shown
from foretune.tasks.objectives.accuracy import accuracies
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.objectives.regression import check_arrays
from foretune.tasks.objectives.text import IGNORED
from foretune.tasks.task import Objective, Task, TaskCollection


@dataclass(frozen=True, kw_only=True)
class Unlabelled(Objective):
    """Arrays or texts without labels; the label set is that of the source's objective.

    Training examples need no labels, and labels they have are not read. Scored examples need one.

    Args:
        source: A `Classification` fitted to source tasks that share one label set.

    Raises:
        UserError: The source's objective has no shared label set.
    """

    source: Classification

    kind: ClassVar[str] = "unlabelled"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.source.space is None:
            raise UserError(
                "Unlabelled needs the source's labels: pass a Classification fitted to source "
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
        """Checks the examples; there is nothing to learn from them.

        Raises:
            UserError: An example has no array, or a scored one has no label of the source.
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
            if label is None or label_text(label) not in label_places(self.labels):
                raise UserError(
                    f"{row_name(task.name, split, i, row)}: scoring needs a label of the source "
                    f"({shown(self.labels)}); got {label!r}"
                )

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        label = _label(example)
        placeholder = {**example, "y": self.labels[0], "label": self.labels[0]}
        encoded = self._classification(task).encode(placeholder, task)
        # Only scoring reads the label; `fit` has checked that scored examples have one.
        places = label_places(self.labels)
        encoded["label"] = IGNORED if label is None else places.get(label_text(label), IGNORED)
        return encoded

    def _classification(self, task: str) -> Classification:
        """The source's objective, with the source's labels for a task that it was not fitted to."""
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
        """The logits (n, number of labels) of n examples."""
        return self.source.logits(model, batch)

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(n,) entropies of the predictions: a loss of single examples that needs no labels."""
        return torch.special.entr(self.logits(model, batch).softmax(1)).sum(1)

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return accuracies(self.logits(model, batch), batch.inputs["label"])

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "source": self.source.to_dict()}


def _label(row: Mapping[str, Any]) -> Label | None:
    value = row.get("label", row.get("y"))
    return value.item() if isinstance(value, (np.generic, np.ndarray)) else value
