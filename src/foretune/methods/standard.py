"""Standard retraining: one model for all tasks, trained on their pooled and shuffled examples.

    W_SR = argmin_W  Σ_t Σ_j  L(Φ(x_tj; W), y_tj)

The control of Block et al. (arXiv:2410.22264). Batches mix the tasks; their code visits one task
after the other within an epoch. There is one head over the labels of all tasks: training the base
together with a head per task is PEFT-ML's form "last-layer".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from foretune.run import Run, check_fraction, check_positive
from foretune.training.methods import RetrainMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner


@dataclass(frozen=True, kw_only=True)
class Standard(RetrainMethod):
    """Fine-tune one model on the pooled and shuffled examples of all tasks.

    Args:
        learning_rate: Learning rate of AdamW, on all trainable weights of the model.
        interpolate: Share of the way from the original weights to the retrained ones
            (Wortsman et al., CVPR 2022, arXiv:2109.01903).
        average: Share of the updates, counted from the end, over which the base's weights are
            averaged; the learning rate then stays at its peak. 0 for off.
    """

    learning_rate: float = 1e-4
    interpolate: float = 1.0
    average: float = 0.0

    name: ClassVar[str] = "standard"
    label: ClassVar[str] = "standard retraining"
    pooled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_fraction("interpolate", self.interpolate)
        check_fraction("average", self.average)

    @override
    def objective_for(self, objective: Objective) -> Objective:
        return objective.shared()

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learners.joint import Learner

        return Learner(model, objective, learning_rate=self.learning_rate, pooled=True)
