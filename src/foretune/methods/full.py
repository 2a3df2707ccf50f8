"""Full fine-tuning: one model per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from foretune.run import Run, check_positive
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner


@dataclass(frozen=True, kw_only=True)
class Full(AdaptMethod):
    """Train all trainable weights of the model, one task after the other.

    Args:
        learning_rate: Learning rate of AdamW.
    """

    learning_rate: float = 5e-5

    name: ClassVar[str] = "full"
    label: ClassVar[str] = "full fine-tuning"

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learners.joint import Learner

        return Learner(model, objective, learning_rate=self.learning_rate)
