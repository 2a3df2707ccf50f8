"""PEFT-ML: retrain a base together with one adapter per task, keep the base.

Paper: Block, Srinivasan, Collins, Mokhtari, Shakkottai, "Provable Meta-Learning with Low-Rank
Adaptations", NeurIPS 2025 (first version: "Meta-Learning Adaptable Foundation Models", 2024),
arXiv:2410.22264.

    W_ML = argmin_W  Σ_t  min_θt  Σ_j  L(Φ_FT(x_tj; W, θ_t), y_tj)                    (eq. 5)

    symbol   here           meaning
    W        model          weights that all tasks share, all of them trained
    θ_t      bank slot t    adapter of task t: LoRA factors (A_t, B_t), the task's own head, both,
                            or a sparse change S_t

W and all θ_t descend together. By the envelope theorem the gradient of the inner minimum with
respect to W is the partial gradient at the current θ_t, so there is no second-order term. θ_t
persists over the whole retraining; afterwards W is kept and the adapters may be discarded.

Deviations:
    - `Run.tasks_per_step=None` takes one step on all tasks together. The authors' language code
      takes one task after the other, their vision code sums over the tasks; the round robin is
      `tasks_per_step=1`.
    - The adapters have a separate learning rate; the authors' code has one for both.
    - A step's loss weights its tasks equally, not their examples (Σ_j): a task with many rows does
      not pull the base harder than one with few. With equally many rows per task it is the same.
    - A step on one task moves only that task's adapter.
Beyond the paper, all off by default:
    - `penalty` (λ ‖B_t A_t − C‖², and λ ‖w_t − c‖² for the weights of a task's own head, not its
      biases) and `adapter_dropout` (a share of the steps trains the base without adapters; 1 is
      standard retraining) lead from PEFT-ML to its control. The centres C and c are zero, or with
      `penalty_towards="mean"` the means over the seen tasks; then, and for LoRA with either, λ → ∞
      is standard retraining.
    - After retraining with a head per task and the same labels, the base's head is the mean of the
      tasks' heads, so that the base answers before it is adapted.
    - `restart_every`: an unseen task starts from a fresh adapter and takes few steps, so the seen
      tasks do too.
    - `interpolate`: W + α (W_ML − W), which keeps more of the pretrained model (Wortsman et al.,
      "Robust fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903).
    - `average`: the mean of W over the last updates instead of the last W (Izmailov et al.,
      "Averaging weights leads to wider optima and better generalization", UAI 2018,
      arXiv:1803.05407). The controls have it too.
    - `form="sparse"`: θ_t is the task's change S_t at the `fraction` of the adapted layers' entries
      that are smallest in the input model; the positions are fixed and the same for all tasks.
      The selection is SaRA's (Hu et al., arXiv:2409.06633, eq. 2), without its nuclear term and its
      reselection. S_t starts at zero.
Silent in the paper:
    - Whether heads are shared beside LoRA adapters; the authors' language code has one per task.
      Here each task has its own head where the tasks' label sets differ, and with forms
      "last-layer" (the paper's Last-Layer-ML) and "both".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from foretune.adapters.config import lora_fields
from foretune.errors import UserError
from foretune.run import (
    Run,
    check_at_least,
    check_fraction,
    check_int,
    check_one_of,
    check_positive,
)
from foretune.training.methods import RetrainMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

PAPER = {
    "title": "Provable Meta-Learning with Low-Rank Adaptations",
    "authors": "Jacob L. Block and Sundararajan Srinivasan and Liam Collins and Aryan Mokhtari "
    "and Sanjay Shakkottai",
    "year": 2025,
    "venue": "NeurIPS",
    "arxiv": "2410.22264",
}


@dataclass(frozen=True, kw_only=True)
class PEFTML(RetrainMethod):
    """Train the base together with one adapter per seen task, then keep the base.

    Args:
        learning_rate: Learning rate of the base.
        adapter_learning_rate: Learning rate of the adapters and of the tasks' own heads.
        form: What a task has of its own: "lora" adapters; "last-layer" for a head (where the model
            has none, a copy of its last linear layer); "both"; "sparse" for a change at the
            smallest entries.
        lora: A `peft.LoraConfig` or a mapping of its fields. Without `target_modules`, every
            trainable linear layer of the model is adapted. With form "sparse" it only selects the
            layers.
        fraction: With form "sparse", share of the adapted layers' entries, the smallest in
            absolute value, that a task changes.
        penalty: λ of λ · Σ ‖s·B_t A_t − C‖²_F over the adapted layers, added to each task's loss;
            with form "sparse" of λ · Σ ‖S_t − C‖²_F, with a head of λ · Σ ‖w_t − c‖²_F over its
            weight matrices, with "both" of both.
        penalty_towards: "zero" for C = 0 and c = 0; "mean" for the means over the seen tasks.
        adapter_dropout: Share of the steps that train the base without LoRA or sparse adapters.
        restart_every: Mean number of steps after which a task's adapter is re-initialised; the
            adapters then keep their full learning rate, as in adapting. None for never.
        interpolate: Share of the way from the original weights to the retrained ones.
        average: Share of the updates, counted from the end, over which the base's weights are
            averaged; the learning rate then stays at its peak. 0 for off.
    """

    learning_rate: float = 1e-4
    adapter_learning_rate: float = 1e-3
    form: Literal["lora", "last-layer", "both", "sparse"] = "lora"
    lora: Any = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    fraction: float = 0.1
    penalty: float = 0.0
    penalty_towards: Literal["zero", "mean"] = "zero"
    adapter_dropout: float = 0.0
    restart_every: int | None = None
    interpolate: float = 1.0
    average: float = 0.0

    name: ClassVar[str] = "peft-ml"
    label: ClassVar[str] = "PEFT-ML"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_positive("adapter_learning_rate", self.adapter_learning_rate)
        check_one_of("form", self.form, ("lora", "last-layer", "both", "sparse"))
        object.__setattr__(self, "lora", lora_fields(self.lora))
        check_positive("fraction", self.fraction)
        check_fraction("fraction", self.fraction)
        check_at_least("penalty", self.penalty, 0)
        check_one_of("penalty_towards", self.penalty_towards, ("zero", "mean"))
        check_fraction("adapter_dropout", self.adapter_dropout)
        check_int("restart_every", self.restart_every, 1, optional=True)
        check_fraction("interpolate", self.interpolate)
        check_fraction("average", self.average)
        if self.form == "last-layer" and self.adapter_dropout:
            raise UserError(
                "adapter_dropout applies to LoRA or sparse adapters, which form last-layer does "
                "not have: leave it at 0, or use form lora or both"
            )

    @property
    @override
    def keeps_adapters(self) -> bool:
        """Whether the adapters fit the saved base; sparse ones have no file format."""
        return self.form != "sparse" and self.interpolate == 1 and not self.average

    @property
    @override
    def only_heads(self) -> bool:
        return self.form == "last-layer"

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learners.banks import labels_differ, make_bank
        from foretune.training.learners.peft_ml import PEFTMLLearner

        own_heads = self.form in ("last-layer", "both")
        towards_mean = self.penalty_towards == "mean"
        if self.penalty and towards_mean and own_heads and labels_differ(objective):
            raise UserError(
                "penalty_towards mean pulls the tasks' heads to their mean, but the tasks have "
                "different labels: use penalty_towards zero, or form lora"
            )
        return PEFTMLLearner(
            model,
            objective,
            bank=make_bank(
                model,
                objective,
                keys,
                run.seed,
                lora=None if self.form == "last-layer" else self.lora,
                sparse=self.fraction if self.form == "sparse" else None,
                head_copies=own_heads,
            ),
            learning_rate=self.learning_rate,
            bank_learning_rate=self.adapter_learning_rate,
            penalty=self.penalty,
            penalised_heads=own_heads,
            towards_mean=towards_mean,
            adapter_dropout=self.adapter_dropout,
            restart_every=self.restart_every,
        )
