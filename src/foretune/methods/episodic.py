"""`EpisodicMethod`: the fields and learner of Reptile and FOMAML; only the gradient differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from foretune.adapters.config import lora_fields
from foretune.run import Run, check_fraction, check_int, check_one_of, check_positive
from foretune.training.methods import RetrainMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner


@dataclass(frozen=True, kw_only=True)
class EpisodicMethod(RetrainMethod):
    """Adapt to the tasks for a few steps, then update the base from the adapted weights.

    Attributes:
        query: Whether the base follows the gradient of one more batch at the adapted weights
            (FOMAML); otherwise it moves towards the adapted weights (Reptile).
    """

    learning_rate: float = 1e-4
    inner_learning_rate: float = 1e-4
    inner_steps: int = 5
    inner: Literal["all", "adapter"] = "all"
    lora: Any = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    average: float = 0.0

    query: ClassVar[bool]

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        check_positive("inner_learning_rate", self.inner_learning_rate)
        check_int("inner_steps", self.inner_steps, 1)
        check_one_of("inner", self.inner, ("all", "adapter"))
        object.__setattr__(self, "lora", lora_fields(self.lora))
        check_fraction("average", self.average)

    @property
    @override
    def batches_per_update(self) -> int:
        return self.inner_steps + self.query if self.inner == "adapter" else 1

    @override
    def run_for(self, run: Run, num_tasks: int) -> Run:
        """The run with as many examples; one task per batch where an episode has one task."""
        return run.one_task_per_batch(num_tasks) if self.inner == "all" else run

    @override
    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learners.banks import make_bank
        from foretune.training.learners.episodic import EpisodicLearner

        lora = self.lora if self.inner == "adapter" else None
        bank = make_bank(model, objective, keys, run.seed, lora=lora)
        return EpisodicLearner(
            model,
            objective,
            bank=bank if bank.adapted_names else None,
            learning_rate=self.learning_rate,
            inner_learning_rate=self.inner_learning_rate,
            inner_steps=self.inner_steps,
            inner_all=self.inner == "all",
            query=self.query,
        )
