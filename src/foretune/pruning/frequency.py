"""Frequency: keep the experts that the task's tokens are sent to most often, drop the others.

The plainest control of expert pruning, and the one that UNCURL's paper reports to lose accuracy.

    symbol   here         shape   meaning
    f        frequency    (E,)    how often the router chose each expert on the task's examples
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foretune.pruning.method import ExpertPruning
from foretune.run import check_bool, check_ints, check_one_of

if TYPE_CHECKING:
    from foretune.pruning.budgets import Budget
    from foretune.pruning.experts import ExpertBlock
    from foretune.pruning.plan import Plan
    from foretune.pruning.statistics import ExpertStatistics


@dataclass(frozen=True, kw_only=True)
class Frequency(ExpertPruning):
    """Keep the experts that the router chooses most often on the task.

    Args:
        experts: Number of experts each block keeps: one number, a list with one per block, or None
            for half of them.
        budget: "equal" for `experts` in every block; "score" for as many on average, for which the
            experts of all blocks compete by how often they are chosen. Only foretune loads blocks
            of different sizes.
        keep_denominator: For routers whose softmax runs over all experts (Qwen2-MoE, OLMoE,
            Switch): still count the dropped experts in it, so that the weights of the kept ones do
            not grow. Only foretune loads such a model.
    """

    experts: int | Sequence[int] | None = None
    budget: Budget = "equal"
    keep_denominator: bool = False

    name: ClassVar[str] = "frequency"
    label: ClassVar[str] = "frequency pruning"

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", check_ints("experts", self.experts))
        check_one_of("budget", self.budget, ("equal", "score"))
        check_bool("keep_denominator", self.keep_denominator)

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Keep the experts with the largest f in each block."""
        from foretune.pruning.plan import keep_highest

        scores = {name: block.frequency for name, block in statistics.items()}
        return keep_highest(
            blocks,
            self.experts,
            scores,
            budget=self.budget,
            keep_denominator=self.keep_denominator,
        )
