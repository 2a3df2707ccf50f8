"""Reptile: move the base towards where a few steps of fine-tuning take it.

Paper: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, arXiv:1803.02999.

    θ ← θ + ε · mean_t (U_t^k(θ) − θ)                        (batched form of their Algorithm 2)

    symbol    here          meaning
    θ         model         weights before the episode
    U_t^k(θ)                weights after k inner steps on task t

θ − mean_t U_t^k(θ) is handed to AdamW as the gradient, as in the code of Block et al.
(arXiv:2410.22264), with the sign that makes it a step towards the adapted weights; their vision
code has the opposite one.

Silent in the paper:
    - The inner loop on adapters. With `inner="adapter"` the k steps train a fresh adapter on the
      frozen base, and the way it went is the product that it adds to each weight, s·B_t A_t.
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
    "title": "On First-Order Meta-Learning Algorithms",
    "authors": "Alex Nichol and Joshua Achiam and John Schulman",
    "year": 2018,
    "arxiv": "1803.02999",
}


@dataclass(frozen=True, kw_only=True)
class Reptile:
    """Move the base towards where a few steps on each task take it.

    Args:
        learning_rate: Of the base (outer AdamW).
        inner_learning_rate: Of the inner AdamW.
        inner_steps: Inner updates before the base moves, one batch each.
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

    name: ClassVar[str] = "reptile"
    label: ClassVar[str] = "Reptile"
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
            query=False,
        )
