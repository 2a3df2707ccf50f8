"""FOMAML: move the base by the gradient at the point that a few steps of fine-tuning reach.

Paper: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
ICML 2017, arXiv:1703.03400, in its first-order form (their §5.2; arXiv:1803.02999, §5).

    θ ← θ − ε · mean_t ∇L_t^query(U_t^k(θ))

    symbol    here          meaning
    θ         model         weights before the episode
    U_t^k(θ)                weights after k inner steps on the support batches of task t

The gradient is taken with respect to the adapted weights, on rows that the inner loop did not see
in this episode, and applied to θ by AdamW.

Deviations:
    - The inner loop is AdamW, as for Reptile, not plain gradient descent.
Silent in the paper:
    - The inner loop on adapters. With `inner="adapter"` the k steps train a fresh adapter on the
      frozen base, and the gradient is that of the base's weights at the adapted point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foretune.adapters.config import lora_fields
from foretune.run import Run, above_zero, one_of, share, whole

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

PAPER = {
    "title": "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    "authors": "Chelsea Finn and Pieter Abbeel and Sergey Levine",
    "year": 2017,
    "venue": "ICML",
    "arxiv": "1703.03400",
}


@dataclass(frozen=True, kw_only=True)
class FOMAML:
    """Move the base by the gradient at the point that a few steps on each task reach.

    Args:
        learning_rate: Of the base (outer AdamW).
        inner_learning_rate: Of the inner AdamW.
        inner_steps: Inner updates, one batch each, before the batch that moves the base.
        inner: "all" trains all weights, one task an episode; "adapter" trains a fresh LoRA
            adapter for each task, all tasks at once.
        lora: The adapter of `inner="adapter"`: a `peft.LoraConfig` or a mapping of its fields.
        average: Share of the updates, the last ones, over which the base's weights are averaged;
            the learning rate then stays at its height. 0 for off.
    """

    learning_rate: float = 1e-4
    inner_learning_rate: float = 1e-4
    inner_steps: int = 5
    inner: Literal["all", "adapter"] = "all"
    lora: Any = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    average: float = 0.0

    name: ClassVar[str] = "fomaml"
    label: ClassVar[str] = "FOMAML"
    verb: ClassVar[str] = "retrain"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    keeps_adapters: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        above_zero("learning_rate", self.learning_rate)
        above_zero("inner_learning_rate", self.inner_learning_rate)
        whole("inner_steps", self.inner_steps, 1)
        one_of("inner", self.inner, ("all", "adapter"))
        object.__setattr__(self, "lora", lora_fields(self.lora))
        share("average", self.average)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def objective_for(self, objective: Objective) -> Objective:
        return objective

    def budget(self, run: Run, num_tasks: int) -> Run:
        """The same number of examples; one task a batch where an episode is of one task."""
        return run.one_task_a_batch(num_tasks) if self.inner == "all" else run

    def learner(
        self, model: nn.Module, objective: Objective, keys: Sequence[str], run: Run
    ) -> Learner:
        from foretune.training.learners.episodic import EpisodicLearner
        from foretune.training.learners.joint import make_bank

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
            query=True,
        )
