"""REAP: drop the experts with the smallest mean weighted output norm over the tokens they serve.

    S_j = (1 / |X_j|) Σ_{t ∈ X_j}  g_j(t) · ‖f_j(t)‖₂

Paper: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", ICLR
2026, arXiv:2510.13999.

    symbol   here         shape   meaning
    |X_j|    frequency    (E,)    number of tokens that the router sends to expert j
    g_j(t)                        weight of expert j for token t: softmax of the router's logits
    f_j(t)                        output of expert j for token t
    Σ g‖f‖   activation   (E,)    the sum above

Deviations:
    - for routers that weigh otherwise (sigmoid: DeepSeek-V3, GLM-4.5, MiniMax-M2) the authors' code
      still takes the softmax of the logits, and so do we by default; `weigh="router"` takes the
      weights that the router outputs
    - the authors' code scales a token's weights to sum to one since March 2026; the equation does
      not, and neither do we by default (`renormalise`)
    - an expert that no token is sent to scores 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foretune.pruning.method import ExpertPruning
from foretune.run import check_bool, check_ints, check_one_of

if TYPE_CHECKING:
    from foretune.pruning.budgets import Budget
    from foretune.pruning.experts import ExpertBlock
    from foretune.pruning.plan import Plan
    from foretune.pruning.statistics import ExpertStatistics

PAPER = {
    "title": "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
    "authors": "Mike Lasby and Ivan Lazarevich and Nish Sinnadurai and Sean Lie and "
    "Yani Ioannou and Vithursan Thangarasa",
    "year": 2026,
    "venue": "ICLR",
    "arxiv": "2510.13999",
}


@dataclass(frozen=True, kw_only=True)
class REAP(ExpertPruning):
    """Keep the experts with the largest router-weighted activation norm on the task.

    Args:
        experts: Number of experts each block keeps: one number, a list with one per block, or None
            for half of them.
        budget: "equal" for `experts` in every block; "score" for as many on average, for which the
            experts of all blocks compete by their share of their block's S. Only foretune loads
            blocks of different sizes.
        keep_denominator: For routers whose softmax runs over all experts (Qwen2-MoE, OLMoE,
            Switch): still count the dropped experts in it, so that the weights of the kept ones do
            not grow. Only foretune loads such a model.
        weigh: g: "softmax" of the router's logits, as in the authors' code; "router" for what the
            router outputs.
        renormalise: Scale the weights of a token's chosen experts to sum to one before averaging,
            as the authors' code does since March 2026.
    """

    experts: int | Sequence[int] | None = None
    budget: Budget = "equal"
    keep_denominator: bool = False
    weigh: Literal["softmax", "router"] = "softmax"
    renormalise: bool = False

    name: ClassVar[str] = "reap"
    label: ClassVar[str] = "REAP"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    needs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", check_ints("experts", self.experts))
        check_one_of("budget", self.budget, ("equal", "score"))
        check_bool("keep_denominator", self.keep_denominator)
        check_one_of("weigh", self.weigh, ("softmax", "router"))
        check_bool("renormalise", self.renormalise)

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Keep the experts with the largest S in each block."""
        from foretune.pruning.plan import keep_highest

        scores = {name: self.score(block) for name, block in statistics.items()}
        return keep_highest(
            blocks,
            self.experts,
            scores,
            budget=self.budget,
            keep_denominator=self.keep_denominator,
        )

    def score(self, block: ExpertStatistics) -> Any:
        """S of a block's experts, (E,)."""
        assert block.activation is not None
        kind = f"renormalised {self.weigh}" if self.renormalise else self.weigh
        return block.activation[kind] / block.frequency.clip(1)
