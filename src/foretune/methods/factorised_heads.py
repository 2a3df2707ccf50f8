"""Factorised heads: retrain a base with a few shared heads, of which each task has its mixture.

Papers: Bose, Xiong, Chi, Du, Xiao, Fazel, "LoRe: Personalizing LLMs via Low-Rank Reward Modeling",
COLM 2025, arXiv:2504.14439; Chen, Chen, Rege, Wang, Vinayak, "PAL: Sample-Efficient Personalized
Reward Modeling for Pluralistic Alignment", ICLR 2025, arXiv:2406.08469.

    W, V, w = argmin  Σ_t Σ_j  L(Φ(x_tj; W, Σ_k w_tk V_k), y_tj)

    symbol   here                    meaning
    W        model                   weights that all tasks share, all of them trained
    V_k      coefficients.directions K heads (weights and biases) that all tasks share: LoRe's basis
                                     of rewards, PAL's prototypes
    w_t      coefficients.z          weights of task t

Afterwards W is kept, with the mean of the tasks' heads as its head. A new task is adapted to by
fitting its w on the fixed V: method `basis`, whose directions are those in which the tasks' heads
differ, all within the span of V.

Deviations:
    - The base is trained with the heads. LoRe and PAL freeze a language model or a reward model and
      learn V, or a small network, on its states.
    - w_t is unconstrained; LoRe's and PAL's are on the simplex, so that heads are averages of the
      V_k. A new task's w has a Gaussian prior instead (method `basis`).
    - Any head and loss; theirs is a reward with the Bradley-Terry loss on pairs of answers, PAL's
      also a distance from a person's ideal point.
    - All start as the base's head: w_tk is 1/K, the V_k are the head with noise as large as the
      head that cancels in their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from foretune.errors import UserError
from foretune.run import Run, check_at_least, check_fraction, check_int, check_positive
from foretune.training.methods import RetrainMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

PAPER = {
    "title": "LoRe: Personalizing LLMs via Low-Rank Reward Modeling",
    "authors": "Avinandan Bose and Zhihan Xiong and Yuejie Chi and Simon Shaolei Du and Lin Xiao "
    "and Maryam Fazel",
    "year": 2025,
    "venue": "COLM",
    "arxiv": "2504.14439",
}


@dataclass(frozen=True, kw_only=True)
class FactorisedHeads(RetrainMethod):
    """Train the base together with K shared heads and each task's weights of them.

    Args:
        learning_rate: Learning rate of the base and of the shared heads.
        adapter_learning_rate: Learning rate of the tasks' weights.
        num_factors: K, the number of shared heads.
        penalty: λ of λ · ‖Σ_k w_tk V_k‖²_F over the weight matrices of a task's head, not its
            biases, added to its loss.
        interpolate: Share of the way from the original weights to the retrained ones.
        average: Share of the updates, counted from the end, over which the base's weights and the
            shared heads are averaged; the learning rate then stays at its peak. 0 for off.
    """

    learning_rate: float = 1e-4
    adapter_learning_rate: float = 1e-2
    num_factors: int = 8
    penalty: float = 0.0
    interpolate: float = 1.0
    average: float = 0.0

    name: ClassVar[str] = "factorised-heads"
    label: ClassVar[str] = "factorised heads"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_positive("adapter_learning_rate", self.adapter_learning_rate)
        check_int("num_factors", self.num_factors, 2)
        check_at_least("penalty", self.penalty, 0)
        check_fraction("interpolate", self.interpolate)
        check_fraction("average", self.average)

    @property
    @override
    def keeps_adapters(self) -> bool:
        return self.interpolate == 1 and not self.average

    @property
    @override
    def only_heads(self) -> bool:
        return True

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.adapters.factors import shared_heads
        from foretune.training.learners.banks import labels_differ, make_bank
        from foretune.training.learners.factorised import FactorisedHeadsLearner

        if labels_differ(objective):
            raise UserError(
                "factorised-heads mixes heads that all tasks share, but the tasks have different "
                "labels: use peft-ml"
            )
        bank = make_bank(model, objective, keys, run.seed, head_copies=True)
        return FactorisedHeadsLearner(
            model,
            objective,
            coefficients=shared_heads(bank, self.num_factors, run.seed),
            learning_rate=self.learning_rate,
            bank_learning_rate=self.adapter_learning_rate,
            penalty=self.penalty,
        )
