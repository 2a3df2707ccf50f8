"""The table of objectives. Each kind has a file; importing this one does not import torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from foretune.entry_points import entry_point
from foretune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from foretune.tasks.task import Objective

OBJECTIVES: dict[str, str] = {
    "choice": "foretune.tasks.objectives.choice:Choice",
    "classification": "foretune.tasks.objectives.classification:Classification",
    "causal-lm": "foretune.tasks.objectives.causal_lm:CausalLM",
    "denoising": "foretune.tasks.objectives.denoising:Denoising",
    "preference": "foretune.tasks.objectives.preference:Preference",
    "regression": "foretune.tasks.objectives.regression:Regression",
    "prompts": "foretune.tasks.objectives.prompts:PromptClassification",
    "forecast": "foretune.forecasting.objective:Forecast",
    "scene-reconstruction": "foretune.forecasting.pretraining:SceneReconstruction",
}
"""Kind → module:class."""


def make_objective(kind: str, tokenizer: Any = None, **fields: Any) -> Objective:
    """The objective of a kind.

    Args:
        kind: One of `OBJECTIVES`.
        tokenizer: The model's tokenizer; None where examples are arrays.
        **fields: Fields of the objective's class.

    Raises:
        UserError: Unknown kind or field, or a value out of range.
    """
    if kind not in OBJECTIVES:
        raise UserError(
            f'no objective "{kind}"; there are {", ".join(OBJECTIVES)}.'
            f"{did_you_mean(kind, OBJECTIVES)}"
        )
    objective_class = entry_point(OBJECTIVES[kind])
    class_fields = {f.name: f for f in dataclasses.fields(objective_class)}
    takes_tokenizer = class_fields.pop("tokenizer", None) is not None
    options = [n for n, f in class_fields.items() if not f.metadata.get("learnt")]
    for field in fields:
        if field not in class_fields:
            has = f"it has {', '.join(options)}" if options else "it has none"
            raise UserError(
                f'objective "{kind}" has no field "{field}"; {has}.{did_you_mean(field, options)}'
            )
    if takes_tokenizer:
        fields["tokenizer"] = tokenizer
    objective: Objective = objective_class(**fields)
    return objective


def settings_of(objective: Objective) -> dict[str, Any]:
    """The objective's `to_dict` without the fields that `fit` and `bind` learn."""
    fields: Any = dataclasses.fields(objective)  # type: ignore[arg-type]
    learnt = {f.name for f in fields if f.metadata.get("learnt")}
    return {name: value for name, value in objective.to_dict().items() if name not in learnt}
