"""Head: adapt a frozen base by a head of its own for each task (linear probing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.run import Run, above_zero

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner


@dataclass(frozen=True, kw_only=True)
class Head:
    """Only a head for each task; its last linear layer where the model has no head.

    Args:
        learning_rate: Of the heads.
    """

    learning_rate: float = 1e-3

    name: ClassVar[str] = "head"
    label: ClassVar[str] = "head only"
    verb: ClassVar[str] = "adapt"
    paper: ClassVar[dict[str, Any] | None] = None
    shares_base: ClassVar[bool] = True
    pooled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("learning_rate", self.learning_rate)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learners.joint import Learner, make_bank

        bank = make_bank(model, objective, keys, run.seed, head_copies=True)
        return Learner(model, objective, bank=bank, bank_learning_rate=self.learning_rate)
