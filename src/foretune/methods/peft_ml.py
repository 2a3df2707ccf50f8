"""PEFT-ML: retrain a base together with one adapter for each task, keep the base.

Paper: Block, Srinivasan, Collins, Mokhtari, Shakkottai, "Provable Meta-Learning with Low-Rank
Adaptations", NeurIPS 2025 (first version: "Meta-Learning Adaptable Foundation Models", 2024),
arXiv:2410.22264.

    W_ML = argmin_W  Σ_t  min_θt  Σ_j  L(Φ_FT(x_tj; W, θ_t), y_tj)                    (eq. 5)

    symbol   here           meaning
    W        model          weights that every task shares, all of them trained
    θ_t      bank slot t    adapter of task t: LoRA factors (A_t, B_t), or the task's own head

W and all θ_t descend together. By the envelope theorem the gradient of the inner minimum with
respect to W is the partial gradient at the present θ_t, so there is no second-order term. θ_t
persists over the whole retraining; afterwards W is kept and the adapters may be thrown away.

Deviations:
    - `Run.tasks_per_step=None` takes one step on all tasks together. The authors' language code
      takes one task after the other, their vision code sums over the tasks; the round robin is
      `tasks_per_step=1`.
    - The adapters may have a learning rate of their own; the authors' code has one for both.
    - A step on one task moves that task's adapter alone.
Silent in the paper:
    - Whether heads are shared. Here a task has its own head where the tasks' label sets differ,
      or where the LoRA configuration names it in `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foretune.adapters.config import lora_fields
from foretune.run import Run, above_zero, one_of

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.objectives import Objective
    from foretune.training.learner import Learner

PAPER = {
    "title": "Provable Meta-Learning with Low-Rank Adaptations",
    "authors": "Jacob L. Block and Sundararajan Srinivasan and Liam Collins and Aryan Mokhtari "
    "and Sanjay Shakkottai",
    "year": 2025,
    "venue": "NeurIPS",
    "arxiv": "2410.22264",
}


@dataclass(frozen=True, kw_only=True)
class PEFTML:
    """Train the base together with one adapter for each seen task, then keep the base.

    Args:
        learning_rate: Of the base.
        adapter_learning_rate: Of the adapters and of heads of their own.
        form: "lora" for LoRA adapters; "last-layer" for a head of each task as its adapter.
        lora: A `peft.LoraConfig` or a mapping of its fields. Without `target_modules` every
            linear layer that the model lets train is adapted.
    """

    learning_rate: float = 1e-4
    adapter_learning_rate: float = 1e-3
    form: Literal["lora", "last-layer"] = "lora"
    lora: Any = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})

    name: ClassVar[str] = "peft-ml"
    label: ClassVar[str] = "PEFT-ML"
    verb: ClassVar[str] = "retrain"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    keeps_adapters: ClassVar[bool] = True
    pooled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("learning_rate", self.learning_rate)
        above_zero("adapter_learning_rate", self.adapter_learning_rate)
        one_of("form", self.form, ("lora", "last-layer"))
        object.__setattr__(self, "lora", lora_fields(self.lora))

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def objective_for(self, objective: Objective) -> Objective:
        return objective

    def budget(self, run: Run, num_tasks: int) -> Run:
        return run

    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learner import Learner, make_bank

        last_layer = self.form == "last-layer"
        lora = None if last_layer else self.lora
        return Learner(
            model,
            objective,
            bank=make_bank(model, objective, keys, run.seed, lora=lora, head_copies=last_layer),
            learning_rate=self.learning_rate,
            bank_learning_rate=self.adapter_learning_rate,
        )
