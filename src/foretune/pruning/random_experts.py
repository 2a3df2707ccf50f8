"""Random experts: keep experts drawn at random, the control that every pruning method must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foretune.pruning.method import ExpertPruning
from foretune.run import check_bool, check_ints, check_one_of, check_seed

if TYPE_CHECKING:
    from foretune.pruning.budgets import Budget
    from foretune.pruning.experts import ExpertBlock
    from foretune.pruning.plan import Plan
    from foretune.pruning.statistics import ExpertStatistics


@dataclass(frozen=True, kw_only=True)
class RandomExperts(ExpertPruning):
    """Keep experts drawn at random, the control of every pruning method.

    Args:
        experts: Number of experts each block keeps: one number, a list with one per block, or None
            for half of them.
        budget: "equal" for `experts` in every block; "score" for as many on average, for which the
            experts of all blocks compete at random. Only foretune loads blocks of different sizes.
        keep_denominator: For routers whose softmax runs over all experts (Qwen2-MoE, OLMoE,
            Switch): still count the dropped experts in it, so that the weights of the kept ones do
            not grow. Only foretune loads such a model.
        seed: Random seed of the draw.
    """

    experts: int | Sequence[int] | None = None
    budget: Budget = "equal"
    keep_denominator: bool = False
    seed: int = 0

    name: ClassVar[str] = "random-experts"
    label: ClassVar[str] = "random experts"

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", check_ints("experts", self.experts))
        check_one_of("budget", self.budget, ("equal", "score"))
        check_bool("keep_denominator", self.keep_denominator)
        check_seed("seed", self.seed)

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Keep the first experts of a random order in each block."""
        import numpy as np

        from foretune.pruning.plan import keep_highest

        rng = np.random.default_rng(self.seed)
        scores = {block.name: rng.random(block.num_experts) for block in blocks}
        return keep_highest(
            blocks,
            self.experts,
            scores,
            budget=self.budget,
            keep_denominator=self.keep_denominator,
        )
