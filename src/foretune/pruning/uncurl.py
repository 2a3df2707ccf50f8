"""UNCURL, reconstructed: cluster experts by the task's router logits, align them, merge them.

Paper: Sarkar et al., "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task
Specific Expert Pruning", ENLSP-IV 2024 (PMLR 262:165-181), arXiv:2409.01483.

No public code of UNCURL exists, and only the paper's abstract and a summary of it were at hand.
What they say is this: offline, layer by layer, spectral clustering on router logits, alignment of
the experts by permutation, merging weighted by activation. All else here is a choice, and each has
a field.

    symbol   here             shape     meaning
    H        logits           (N, E)    the router's logits on the task's N tokens, no padding
    f        frequency        (E,)      how often the router chose each expert
    S        similarity       (E, E)    S_ij = (1 + cos(h_i, h_j)) / 2 of H's columns
    K        experts                    clusters of a block
    P_i      match_units                permutation of expert i's hidden units, nearest to those of
                                        the most used expert of its cluster
    W_c      merged                     W_c = Σ_{i ∈ c} (f_i / Σ_{j ∈ c} f_j) · P_i(W_i)

Silent in the sources at hand:
    - the similarity: columns are centred here (`centred`), so that an expert that is likely
      everywhere is not near to all others
    - the router of a merged block: weighted mean of the rows, the most used expert's row, or the
      given router with each choice read as a choice of the cluster (`router`)
    - the weighting (`weights`), and whether clusters may grow without bound: spectral clusters
      are unbalanced, so `grouping="dominant"` is there beside it: the K most used experts are
      cores and each other joins the core that it is most similar to, as M-SMoE groups them
      (Li et al., ICLR 2024, arXiv:2310.01334)
Deviations:
    - none known beyond the above, which is no claim to the paper's numbers
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
    "title": "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific "
    "Expert Pruning",
    "authors": "Soumajyoti Sarkar and Leonard Lausen and Volkan Cevher and Sheng Zha and "
    "Thomas Brox and George Karypis",
    "year": 2024,
    "venue": "ENLSP-IV, PMLR 262:165-181",
    "arxiv": "2409.01483",
}


@dataclass(frozen=True, kw_only=True)
class UNCURL(ExpertPruning):
    """Cluster experts by the task's router logits, align their hidden units, merge each cluster.

    Args:
        experts: How many each block ends with: one number, a list with one for each block, None
            for half of them.
        grouping: "spectral" clustering on the similarity of router logits, or "dominant": the
            most used experts are cores, each other joins the core it is most similar to.
        centred: Centre the columns of logits before their cosine.
        align: Match the hidden units of a cluster's experts before they are averaged.
        weights: Of experts in the mean: "frequency", or "uniform".
        router: Of a cluster: "mean" or "dominant" row of its members, or "remap" to keep the router
            as it was and read a choice of any member as a choice of the cluster (only foretune
            loads such a model).
    """

    experts: int | Sequence[int] | None = None
    grouping: Literal["spectral", "dominant"] = "spectral"
    centred: bool = True
    align: bool = True
    weights: Literal["frequency", "uniform"] = "frequency"
    router: Literal["mean", "dominant", "remap"] = "mean"

    name: ClassVar[str] = "uncurl"
    label: ClassVar[str] = "UNCURL"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", check_ints("experts", self.experts))
        one_of("grouping", self.grouping, ("spectral", "dominant"))
        one_of("weights", self.weights, ("frequency", "uniform"))
        one_of("router", self.router, ("mean", "dominant", "remap"))
        flag("centred", self.centred)
        flag("align", self.align)

    @property
    def keeps_router(self) -> bool:
        return self.router == "remap"

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Clusters by S, averages by f."""
        from foretune.linalg.clustering import spectral
        from foretune.pruning.plan import merge_clusters

        def cluster(name: str, members: list[int], k: int) -> list[int]:
            found = statistics[name]
            cosine = found.correlation() if self.centred else found.cosine()
            similarity = ((1 + cosine) / 2)[members][:, members]  # S
            if self.grouping == "dominant":
                return _around_cores(similarity, found.frequency[members], k)
            return spectral(similarity, k)

        weights = {
            name: [1.0] * len(found.frequency)
            if self.weights == "uniform"
            else found.frequency.tolist()
            for name, found in statistics.items()
        }
        return merge_clusters(
            blocks, self.experts, cluster, weights, router=self.router, align=self.align
        )


def _around_cores(similarity: Any, frequency: Any, k: int) -> list[int]:
    """Each expert's cluster: itself for the k most used ones, else that of the nearest of these."""
    import numpy as np

    cores = sorted(np.argsort(-frequency, kind="stable")[:k].tolist())
    nearest = similarity[:, cores].argmax(1)
    return [cores.index(e) if e in cores else int(nearest[e]) for e in range(len(frequency))]
