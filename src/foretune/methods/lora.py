"""LoRA: adapt a frozen base by one low-rank adapter per task, all tasks at once.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685.

The tasks are independent: each slot of the bank follows the gradient of its task's mean loss and
is clipped separately, so a task's result does not depend on the tasks that are adapted with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from foretune.adapters.config import lora_fields
from foretune.run import Run, check_positive, check_strength
from foretune.training.methods import AdaptMethod

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Objective
    from foretune.training.learners.joint import Learner

PAPER = {
    "title": "LoRA: Low-Rank Adaptation of Large Language Models",
    "authors": "Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and "
    "Yuanzhi Li and Shean Wang and Lu Wang and Weizhu Chen",
    "year": 2022,
    "venue": "ICLR",
    "arxiv": "2106.09685",
}


@dataclass(frozen=True, kw_only=True)
class LoRA(AdaptMethod):
    """Train one LoRA adapter per task on the frozen base, all tasks in one batch.

    Args:
        learning_rate: Learning rate of the adapters and of the tasks' own heads.
        lora: A `peft.LoraConfig` or a mapping of its fields. Without `target_modules`, every
            trainable linear layer of the model is adapted.
        pull: Strength p of ½ p ‖θ − θ₀‖², added to each task's loss: it pulls the adapter (and a
            per-task head) back to where it starts, at which it changes nothing.
    """

    learning_rate: float = 1e-3
    lora: Any = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    pull: float = 0.0

    name: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA"
    slot_fields: ClassVar[tuple[str, ...]] = ("learning_rate", "pull")
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        object.__setattr__(self, "lora", lora_fields(self.lora))
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

        bank = make_bank(model, objective, keys, run.seed, lora=self.lora)
        return PulledLearner(model, objective, bank, self.learning_rate, self.pull)
