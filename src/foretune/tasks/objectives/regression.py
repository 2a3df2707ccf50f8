"""`Regression`: predict an array from an array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from foretune.errors import UserError
from foretune.models.routing import route
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS, row_name
from foretune.tasks.objectives.text import logits_of
from foretune.tasks.task import Objective, TaskCollection


@dataclass(frozen=True, kw_only=True)
class Regression(Objective):
    """Predict an array `y` from an array `x`.

    The loss of an example is the squared error summed over the outputs (half of it is the negative
    log-likelihood under noise of unit variance, up to a constant), so it grows with the number of
    outputs; the score is its negative.
    """

    kind: ClassVar[str] = "regression"
    metric: ClassVar[str] = "negative squared error"
    head: ClassVar[str] = "none"

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Checks that all examples have an `x` and a `y`, each of one shape; learns nothing."""
        check_arrays(tasks, ("x", "y"))
        return self

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        return {name: np.asarray(example[name], dtype=np.float32) for name in ("x", "y")}

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        inputs = {name: stack([row[name] for row in rows]) for name in ("x", "y")}
        return Batch(inputs, tuple(slots), len(rows), {})

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        predicted = self.outputs(model, batch)
        y = batch.inputs["y"].reshape(len(batch), -1)
        if predicted.shape != y.shape:
            raise UserError(
                f"the model returns {predicted.shape[1]} numbers per example, y has {y.shape[1]}"
            )
        return (predicted - y).square().sum(1)

    @override
    def outputs(self, model: Any, batch: Batch) -> Tensor:
        with route(batch.slots):
            return logits_of(model(batch.inputs["x"])).float().flatten(1)

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return -self.losses(model, batch)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind}


def stack(arrays: Sequence[np.ndarray]) -> Tensor:
    """(n, …) float32 tensor from n arrays of one shape."""
    return torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False))


def check_arrays(tasks: TaskCollection, names: Sequence[str]) -> None:
    """Checks that all examples have these arrays, each of one shape over all examples.

    Raises:
        UserError: An array is missing, or differs in shape.
    """
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for task in tasks:
        for split in SPLITS:
            for i, row in enumerate(task.split(split)):
                where = row_name(task.name, split, i, row)
                for name in names:
                    if row.get(name) is None:
                        raise UserError(
                            f'{where}: an array "{name}" is missing; the row has {", ".join(row)}'
                        )
                    shape = np.shape(row[name])
                    first, first_where = shapes.setdefault(name, (shape, where))
                    if shape != first:
                        raise UserError(
                            f"{where}: {name} has shape {shape}, but {first} in {first_where}; "
                            "all rows need the same shape"
                        )
