"""`RetrainMethod` and `AdaptMethod`: what the verbs that train ask of a method's record.

Importing this file does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from foretune.method import Method

if TYPE_CHECKING:
    from torch import nn

    from foretune.run import Run
    from foretune.tasks.task import Objective, TaskCollection
    from foretune.training.learners.joint import Learner
    from foretune.training.loop import Progress


class RetrainMethod(Method, Protocol):
    """A frozen dataclass that subclasses this; whatever has a default need not be written again.

    Attributes:
        pooled: Whether a batch is drawn from the examples of all tasks together, so that examples
            and not tasks weigh alike.
        chooses: Whether the method retrains by another one, which `choose` finds.
    """

    verb: ClassVar[str] = "retrain"
    pooled: ClassVar[bool] = False
    chooses: ClassVar[bool] = False

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the base; None for a method that does not train it."""
        return None

    @property
    def keeps_adapters(self) -> bool:
        """Whether the seen tasks' adapters are saved; they must fit the base that is kept."""
        return False

    @property
    def interpolate(self) -> float:
        """Share of the way from the given weights to the retrained ones that is kept."""
        return 1.0

    @property
    def average(self) -> float:
        """Share of the updates, the last ones, over which the base's weights are averaged."""
        return 0.0

    @property
    def batches_per_update(self) -> int:
        """Batches of all tasks that one update of the base takes; 1 where `run_for` splits them."""
        return 1

    def choose(
        self, model: nn.Module, tasks: TaskCollection, run: Run, progress: Progress | None = None
    ) -> tuple[RetrainMethod, dict[str, Any]]:
        """(the method to retrain by, what was tried); called where `chooses` is set."""
        return self, {}

    def objective_for(self, objective: Objective) -> Objective:
        """The form of the objective that this method trains on."""
        return objective

    def run_for(self, run: Run, num_tasks: int) -> Run:
        """The run with as many examples, cut into batches as this method needs them."""
        return run

    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner | None:
        """What the loop trains; None to train nothing.

        Args:
            model: The copy to be trained, in place.
            objective: Fitted to the tasks.
            keys: The key of each slot, one slot per task.
            run: Seed and budget.
        """
        ...


class AdaptMethod(Method, Protocol):
    """A frozen dataclass that subclasses this; whatever has a default need not be written again.

    Attributes:
        pooled: As `RetrainMethod`; a method that adapts draws from each task separately.
    """

    verb: ClassVar[str] = "adapt"
    pooled: ClassVar[bool] = False

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of what is adapted; None where the method derives it."""
        return None

    @property
    def shares_base(self) -> bool:
        """Whether all tasks are adapted at once on one frozen base, each by a slot of a bank."""
        return False

    @property
    def interpolate(self) -> float:
        """Share of the way from the base's weights to the adapted ones that is kept."""
        return 1.0

    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        """What the loop trains.

        Args:
            model: The frozen base, shared by all slots, or the copy that becomes the one task's
                model.
            objective: Fitted to the tasks.
            keys: The key of each slot, one slot per task and draw.
            run: Seed and budget.
        """
        ...
