"""`Objective`: how examples become batches, one loss and one score for each example.

The kinds live in one file each; importing this one does not import torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from foretune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from foretune.forecasting.objective import Forecast
    from foretune.forecasting.pretraining import SceneReconstruction
    from foretune.tasks.batch import Batch
    from foretune.tasks.objectives.causal_lm import CausalLM
    from foretune.tasks.objectives.choice import Choice
    from foretune.tasks.objectives.classification import Classification
    from foretune.tasks.objectives.denoising import Denoising
    from foretune.tasks.objectives.prompts import PromptClassification
    from foretune.tasks.objectives.regression import Regression
    from foretune.tasks.task import TaskCollection

__all__ = [
    "OBJECTIVES",
    "CausalLM",
    "Choice",
    "Classification",
    "Denoising",
    "Forecast",
    "Objective",
    "PromptClassification",
    "Regression",
    "SceneReconstruction",
    "make_objective",
]

OBJECTIVES: dict[str, tuple[str, str]] = {
    "choice": ("foretune.tasks.objectives.choice", "Choice"),
    "classification": ("foretune.tasks.objectives.classification", "Classification"),
    "causal-lm": ("foretune.tasks.objectives.causal_lm", "CausalLM"),
    "denoising": ("foretune.tasks.objectives.denoising", "Denoising"),
    "regression": ("foretune.tasks.objectives.regression", "Regression"),
    "prompts": ("foretune.tasks.objectives.prompts", "PromptClassification"),
    "forecast": ("foretune.forecasting.objective", "Forecast"),
    "scene-reconstruction": (
        "foretune.forecasting.pretraining",
        "SceneReconstruction",
    ),
}
"""Kind → (module, class)."""


class Objective(Protocol):
    """What the training loop and the evaluation ask of an objective.

    An objective is a frozen record. `fit` returns a new one that has learnt from a collection
    what its batches need (label sets, chance level); only a fitted objective encodes.
    """

    kind: ClassVar[str]

    @property
    def metric(self) -> str:
        """The name of the score; higher is always better."""

    @property
    def head(self) -> str:
        """The head that `load_model` should give the model."""

    def chance(self) -> float | None:
        """The score of a blind guess; None where there is no such thing."""

    def fit(self, tasks: TaskCollection) -> Objective:
        """The objective after learning label sets and the like; checks the data on the way.

        Raises:
            UserError: A row does not fit the objective; the message names task and split.
        """

    def num_outputs(self) -> int | None:
        """The width of the head; None when there is no head to size."""

    def shared(self) -> Objective:
        """The form whose one head can serve all tasks; itself when there is no difference."""

    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        """One example as lists of ints and arrays, so that tokenising happens once."""

    def sample(self, row: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """The encoded row after the random choices that training makes for it."""

    def size(self, row: Mapping[str, Any]) -> int:
        """Tokens of an encoded row that the model reads; 1 for a row of arrays."""

    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        """Stacks encoded rows; `slots[i]` is the slot of row i's task."""

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(n,) one differentiable loss for each example."""

    def scores(self, model: Any, batch: Batch) -> Tensor:
        """(n,) one score for each example, higher is better."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields with "kind"; `make_objective(tokenizer=…, **fields)` gives it back."""


def make_objective(kind: str, tokenizer: Any = None, **fields: Any) -> Objective:
    """The objective of this kind.

    Args:
        kind: One of `OBJECTIVES`.
        tokenizer: What turns its text into ids; None for arrays.
        **fields: The fields of its class.

    Raises:
        UserError: Unknown kind or field, or a value out of range.
    """
    if kind not in OBJECTIVES:
        raise UserError(
            f'no objective "{kind}"; there are {", ".join(OBJECTIVES)}.'
            f"{did_you_mean(kind, OBJECTIVES)}"
        )
    module, name = OBJECTIVES[kind]
    cls = getattr(importlib.import_module(module), name)
    known = {f.name: f for f in dataclasses.fields(cls) if f.name != "tokenizer"}
    options = [n for n, f in known.items() if not f.metadata.get("learnt")]
    for field in fields:
        if field not in known:
            has = f"it has {', '.join(options)}" if options else "it has none"
            raise UserError(
                f'objective "{kind}" has no field "{field}"; {has}.{did_you_mean(field, options)}'
            )
    if "tokenizer" in {f.name for f in dataclasses.fields(cls)}:
        fields["tokenizer"] = tokenizer
    made: Objective = cls(**fields)
    return made


def settings_of(objective: Objective) -> dict[str, Any]:
    """The objective's `to_dict` without what it learnt from rows."""
    fields: Any = dataclasses.fields(objective)  # type: ignore[arg-type]
    learnt = {f.name for f in fields if f.metadata.get("learnt")}
    return {name: value for name, value in objective.to_dict().items() if name not in learnt}


def __getattr__(name: str) -> Any:
    for module, cls in OBJECTIVES.values():
        if cls == name:
            return getattr(importlib.import_module(module), cls)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
