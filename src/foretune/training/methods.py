"""`RetrainMethod` and `AdaptMethod`: what the verbs that train require of a method's record.

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
    """A method is a frozen dataclass that subclasses this and overrides what differs.

    Attributes:
        pooled: Whether a batch is drawn from the examples of all tasks together, so that examples
            are weighted equally instead of tasks.
        chooses: Whether the method retrains with another method, which `choose` returns.
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
        """Whether the seen tasks' adapters are saved; they must fit the base that is saved."""
        return False

    @property
    def only_heads(self) -> bool:
        """Whether the seen tasks differ in their heads alone."""
        return False

    @property
    def interpolate(self) -> float:
        """Weight of the retrained weights in the interpolation with the pretrained ones."""
        return 1.0

    @property
    def average(self) -> float:
        """Fraction of the updates, at the end, over which the base's weights are averaged."""
        return 0.0

    @property
    def batches_per_update(self) -> int:
        """Joint batches per update of the base; 1 where `run_for` splits them by task."""
        return 1

    def choose(
        self,
        model: nn.Module,
        tasks: TaskCollection,
        run: Run,
        progress: Progress | None = None,
        held_out: Any = None,
    ) -> tuple[RetrainMethod, dict[str, Any]]:
        """(method to retrain with, record of the choice); called where `chooses` is set."""
        return self, {}

    def objective_for(self, objective: Objective) -> Objective:
        """The form of the objective that this method trains with."""
        return objective

    def run_for(self, run: Run, num_tasks: int) -> Run:
        """The run with the same number of examples, in the batches that this method needs."""
        return run

    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner | None:
        """Builds what the loop trains; None to train nothing.

        Args:
            model: The copy to be trained, in place.
            objective: Fitted to the tasks.
            keys: The key of each slot, one slot per task.
            run: Random seed and budget.
        """
        ...


class AdaptMethod(Method, Protocol):
    """A method is a frozen dataclass that subclasses this and overrides what differs.

    Attributes:
        pooled: As `RetrainMethod`; a method that adapts draws from each task separately.
        starts_at_base: Whether a task that has taken 0 steps gets the base's own predictions.
        slot_fields: Fields in which slots of one bank may differ, so that records that differ in no
            other fields can adapt side by side (`Learner.vary`).
    """

    verb: ClassVar[str] = "adapt"
    pooled: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = True
    slot_fields: ClassVar[tuple[str, ...]] = ()

    def fits(self, model: nn.Module) -> bool:
        """Whether the base has what the method adapts with, beside its weights."""
        return True

    @property
    def learning_rate(self) -> float | None:
        """Learning rate of the adapted parameters; None where the method derives it."""
        return None

    @property
    def shares_base(self) -> bool:
        """Whether all tasks are adapted at once on one frozen base, one slot of a bank each."""
        return False

    @property
    def interpolate(self) -> float:
        """Weight of the adapted weights in the interpolation with the base's."""
        return 1.0

    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        """Builds what the loop trains.

        Args:
            model: The frozen base, shared by all slots, or the copy that becomes the model of the
                only task.
            objective: Fitted to the tasks.
            keys: The key of each slot, one slot per task and draw.
            run: Random seed and budget.
        """
        ...
