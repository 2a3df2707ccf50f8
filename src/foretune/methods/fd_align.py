"""FD-Align: fine-tune an encoder and preserve its predictions over class-independent prototypes.

Paper: Song, Ma, Zou, Zhang, Huang, "FD-Align: Feature Discrimination Alignment for
Fine-tuning Pre-Trained Models in Few-Shot Learning", NeurIPS 2023, arXiv:2310.15105.

    L(x, y) = CE(softmax s(f_t(x), μ), y) + β KL(P_sp(x; f_0) ‖ P_sp(x; f_t))
    P_sp(x; f) = softmax_j s(f(x), μ^sp_j)                 s: cosine / temperature

    symbol   here                   shape     meaning
    f_0 f_t  model                  (n, d)    encoder of inputs before and during tuning
    E        objective.embedded     (M, Y, d) embedding of template j with class name y
    μ_y      class_prototypes       (Y, d)    mean over the templates
    μ^sp_j   spurious_prototypes    (M, d)    mean over the classes, then k representatives
    β        weight                           weight of the KL divergence, mean over the examples
    n, k     num_kept, num_prototypes         templates that are kept, clusters of these

Deviations:
    - The teacher's logits are computed once per training example and cached, instead of running a
      second model at every step. The inputs are not augmented, so this is exact.
    - The authors' code takes the mean of the KL over examples and prototypes, so that its β = 20
      with k = 20 is β = 1 here; `FDAlign.official` converts.
    - Class prototypes are fixed, as in the equation. The authors' code trains them, starting from a
      linear probe.
    - All prototypes are normalised to unit length; the authors' code does not renormalise the mean
      of unit vectors. The forest has a random seed, k-means starts from Ward's clusters.
    - AdamW, as everywhere here, instead of SGD with Nesterov momentum.
Beyond the paper:
    - `lora`: adapters instead of all weights; the teacher is the base without them.
    - `interpolate`: weights between the original and the tuned ones (Wortsman et al., "Robust
      fine-tuning of zero-shot models", CVPR 2022, arXiv:2109.01903).
    - Sentence encoders, with texts as inputs.
Silent in the paper:
    - The direction of the KL differs between the equation and the code: `direction`. The published
      numbers are those of the code, "forward".
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
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
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

PAPER = {
    "title": "FD-Align: Feature Discrimination Alignment for Fine-tuning Pre-Trained Models in "
    "Few-Shot Learning",
    "authors": "Kun Song and Huimin Ma and Bochao Zou and Huishuai Zhang and Weiran Huang",
    "year": 2023,
    "venue": "NeurIPS",
    "arxiv": "2310.15105",
}


@dataclass(frozen=True, kw_only=True)
class FDAlign(AdaptMethod):
    """Fine-tune on few examples and preserve the predictions over spurious prototypes.

    Requires the objective `prompts`, whose templates make the prototypes.

    Args:
        learning_rate: Learning rate of the encoder, or of its adapters.
        weight: β, the weight of the KL divergence; 0 is plain fine-tuning towards the class
            prototypes.
        direction: "forward" for KL(before ‖ now), as in the authors' code; "reverse" for
            KL(now ‖ before), as in the equation.
        num_kept: Number of templates that an isolation forest keeps (needs scikit-learn); None for
            all.
        num_prototypes: Number of clusters of the templates; with fewer templates, each is a
            cluster of its own.
        lora: A `peft.LoraConfig` or a mapping of its fields, to train adapters of all tasks at
            once; None trains all weights of the encoder of inputs, one task after the other.
        interpolate: Share of the way from the original weights to the tuned ones.
    """

    learning_rate: float = 1e-5
    weight: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"
    num_kept: int | None = None
    num_prototypes: int = 20
    lora: Any = None
    interpolate: float = 1.0

    name: ClassVar[str] = "fd-align"
    label: ClassVar[str] = "FD-Align"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        if self.weight is None:
            raise UserError("weight must be a number not below 0, got None; 0 is off")
        check_at_least("weight", self.weight, 0)
        check_one_of("direction", self.direction, ("forward", "reverse"))
        check_int("num_kept", self.num_kept, 1, optional=True)
        check_int("num_prototypes", self.num_prototypes, 1)
        check_fraction("interpolate", self.interpolate)
        if self.lora is None:
            return
        object.__setattr__(self, "lora", lora_fields(self.lora))
        if self.interpolate != 1:
            raise UserError(
                "interpolate applies to full weights: with lora leave it at 1, and scale the "
                "adapter by lora_alpha"
            )

    @classmethod
    def official(cls, *, beta: float = 20.0, **fields: Any) -> FDAlign:
        """The authors' settings, with their β converted to `weight` = β / k.

        >>> FDAlign.official().weight
        1.0
        """
        fields = {"num_kept": 60, "num_prototypes": 20, **fields}
        return cls(weight=beta / fields["num_prototypes"], **fields)

    @property
    @override
    def shares_base(self) -> bool:
        """Whether all tasks are trained at once, on one frozen base."""
        return self.lora is not None

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.linalg.prototypes import representatives, spurious_prototypes
        from foretune.tasks.objectives.prompts import PromptClassification
        from foretune.training.learners.banks import make_bank
        from foretune.training.learners.fd_align import FDAlignLearner

        if not isinstance(objective, PromptClassification):
            raise UserError(
                f"fd-align embeds the labels' names and needs the objective prompts, got "
                f"{objective.kind}"
            )
        # A slot's key is its task's name, followed by #draw from the second draw on.
        trained = {_task_of(key, objective.embedded) for key in keys}
        prototypes = {
            task: representatives(
                spurious_prototypes(embedded),
                self.num_prototypes,
                keep=self.num_kept,
                seed=run.seed,
            )
            for task, embedded in objective.embedded.items()
            if task in trained
        }
        bank = None
        if self.lora is not None:
            bank = make_bank(model, objective, keys, run.seed, lora=self.lora)
        return FDAlignLearner(
            model,
            objective,
            prototypes=[prototypes[_task_of(key, prototypes)] for key in keys],
            weight=self.weight,
            direction=self.direction,
            bank=bank,
            learning_rate=self.learning_rate if bank is None else None,
            bank_learning_rate=self.learning_rate,
        )


def _task_of(key: str, tasks: Container[str]) -> str:
    return key if key in tasks else key.rpartition("#")[0]
