"""Head: adapt a frozen base by one head per task (linear probing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from foretune.run import Run, check_positive, check_strength
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner


@dataclass(frozen=True, kw_only=True)
class Head(AdaptMethod):
    """Train only a head per task; the last linear layer where the model has no head.

    Args:
        learning_rate: Learning rate of the heads.
        pull: Strength p of ½ p ‖θ − θ₀‖², added to each task's loss: it pulls a head back to where
            it starts, which is the base's own head where that fits the task.
    """

    learning_rate: float = 1e-3
    pull: float = 0.0

    name: ClassVar[str] = "head"
    label: ClassVar[str] = "head only"
    slot_fields: ClassVar[tuple[str, ...]] = ("learning_rate", "pull")

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_strength("pull", self.pull)

    @property
    @override
    def shares_base(self) -> bool:
        return True

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learners.banks import make_bank
        from foretune.training.learners.pulled import PulledLearner

        bank = make_bank(model, objective, keys, run.seed, head_copies=True)
        return PulledLearner(model, objective, bank, self.learning_rate, self.pull)
