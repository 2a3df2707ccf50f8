"""No retraining: the control that adapts the original model to each task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from foretune.training.methods import RetrainMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.run import Run
    from foretune.tasks.task import Objective


@dataclass(frozen=True, kw_only=True)
class NoRetraining(RetrainMethod):
    """Leave the model as it is: the baseline that every retraining has to beat."""

    name: ClassVar[str] = "none"
    label: ClassVar[str] = "no retraining"

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> None:
        """Nothing is trained."""
