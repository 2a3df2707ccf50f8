"""HC-SMoE: merge experts whose mean outputs are near each other.

Paper: Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025,
arXiv:2410.08589.

    symbol   here         shape    meaning
    o_j      output_sum   (E, H)   N times the mean output of expert j over the task's tokens,
                                   chosen for them or not
    f        frequency    (E,)     how often the router chose each expert

Clusters are found by average linkage on the Euclidean distance of the o_j, and each becomes the
mean of its members weighted by f.

Deviations:
    - the rows are the task's; the paper takes general text and is about no task
    - the router row of a cluster is its members' weighted mean, so that any program loads the
      result; `router="remap"` leaves the router as it was and costs a folder that only foretune
      loads
    - `align` matches the hidden units of members before they are averaged, which the paper leaves
      to other ways of merging; off by default
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from foretune.pruning.method import ExpertPruning
from foretune.run import check_ints, flag, one_of

if TYPE_CHECKING:
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
        experts: How many each block ends with: one number, a list with one for each block, None
            for half of them.
        router: Of a cluster: "mean" or "dominant" row of its members, or "remap" to keep the router
            as it was and read a choice of any member as a choice of the cluster (only foretune
            loads such a model).
        align: Match the hidden units of members before they are averaged.
    """

    experts: int | Sequence[int] | None = None
    router: Literal["mean", "dominant", "remap"] = "mean"
    align: bool = False

    name: ClassVar[str] = "hc-smoe"
    label: ClassVar[str] = "HC-SMoE"
    paper: ClassVar[dict[str, Any] | None] = PAPER
    needs_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", check_ints("experts", self.experts))
        one_of("router", self.router, ("mean", "dominant", "remap"))
        flag("align", self.align)

    @property
    def keeps_router(self) -> bool:
        return self.router == "remap"

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Clusters by o, averages by f."""
        from foretune.linalg.clustering import average_linkage
        from foretune.pruning.plan import merge_clusters

        def cluster(name: str, members: list[int], k: int) -> list[int]:
            found = statistics[name]
            assert found.output_sum is not None
            return average_linkage(found.output_sum[members] / max(found.num_tokens, 1), k)

        weights = {name: found.frequency.tolist() for name, found in statistics.items()}
        return merge_clusters(
            blocks, self.experts, cluster, weights, router=self.router, align=self.align
        )
