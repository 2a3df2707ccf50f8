"""HC-SMoE: merge experts whose mean outputs are near each other.

Paper: Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025,
arXiv:2410.08589.

    symbol   here         shape    meaning
    o_j      output_sum   (E, H)   N times the mean output of expert j over all N tokens of the
                                   task, chosen for them or not
    f        frequency    (E,)     how often the router chose each expert

Experts are clustered by average linkage on the Euclidean distance of their mean outputs, and each
cluster becomes the mean of its members weighted by f.

Deviations:
    - examples are the task's; the paper takes general text and prunes for no particular task
    - the router row of a cluster is its members' weighted mean, so that any program loads the
      result; `router="remap"` keeps the router unchanged, but then only foretune loads the folder
    - `align` matches the hidden units of members before they are averaged, which the paper leaves
      to other merging methods; off by default
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from typing_extensions import override

from foretune.pruning.method import ExpertPruning
from foretune.run import check_bool, check_ints, check_one_of

if TYPE_CHECKING:
    from foretune.pruning.budgets import Budget
    from foretune.pruning.experts import ExpertBlock
    from foretune.pruning.plan import Plan
    from foretune.pruning.statistics import ExpertStatistics

PAPER = {
    "title": "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering",
    "authors": "I-Chun Chen and Hsu-Shen Liu and Wei-Fang Sun and Chen-Hao Chao and "
    "Yen-Chang Hsu and Chun-Yi Lee",
    "year": 2025,
    "venue": "ICML",
    "arxiv": "2410.08589",
}


@dataclass(frozen=True, kw_only=True)
class HCSMoE(ExpertPruning):
    """Merge experts whose mean outputs are near each other.

    Args:
        experts: Number of experts each block ends with: one number, a list with one per block, or
            None for half of them.
        budget: "equal" for `experts` in every block; "score" for as many on average, for which the
            experts of all blocks compete by how often they are chosen. Only foretune loads blocks
            of different sizes.
        router: Router row of a cluster: the "mean" of its members' rows, that of the "dominant"
            member, or "remap" to keep the router unchanged and map a choice of any member to the
            cluster (only foretune loads such a model).
        align: Match the hidden units of members before they are averaged.
    """

    experts: int | Sequence[int] | None = None
    budget: Budget = "equal"
    router: Literal["mean", "dominant", "remap"] = "mean"
    align: bool = False

    name: ClassVar[str] = "hc-smoe"
    label: ClassVar[str] = "HC-SMoE"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    needs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", check_ints("experts", self.experts))
        check_one_of("budget", self.budget, ("equal", "score"))
        check_one_of("router", self.router, ("mean", "dominant", "remap"))
        check_bool("align", self.align)

    @property
    @override
    def keeps_router(self) -> bool:
        return self.router == "remap"

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Cluster by o, average by f."""
        from foretune.linalg.clustering import average_linkage
        from foretune.pruning.plan import merge_clusters

        def cluster(name: str, members: list[int], k: int) -> list[int]:
            block = statistics[name]
            assert block.output_sum is not None
            return average_linkage(block.output_sum[members] / max(block.num_tokens, 1), k)

        weights = {name: block.frequency.tolist() for name, block in statistics.items()}
        return merge_clusters(
            blocks,
            self.experts,
            cluster,
            weights,
            budget=self.budget,
            frequency={name: block.frequency for name, block in statistics.items()},
            router=self.router,
            align=self.align,
        )
