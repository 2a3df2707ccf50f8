"""UNCURL, reconstructed: cluster experts by the task's router logits, align them, merge them.

Paper: Sarkar et al., "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task
Specific Expert Pruning", ENLSP-IV 2024 (PMLR 262:165-181), arXiv:2409.01483.

UNCURL has no public code, and only the paper's abstract and a summary of it were available. They
state: offline, layer by layer, spectral clustering on router logits, alignment of the experts by
permutation, merging weighted by activation. Everything else is our choice, and each choice is a
field.

    symbol   here             shape     meaning
    H        logits           (N, E)    router logits on the task's N tokens, without padding
    f        frequency        (E,)      how often the router chose each expert
    S        similarity       (E, E)    S_ij = (1 + cos(h_i, h_j)) / 2 of H's columns
    K        experts                    number of clusters per block
    P_i      match_units                permutation that brings expert i's hidden units nearest to
                                        those of the most used expert of its cluster
    W_c      merge_networks             W_c = Σ_{i ∈ c} (f_i / Σ_{j ∈ c} f_j) · P_i(W_i)

Silent in the available sources:
    - the similarity: columns are centred here (`centred`), so that an expert that is likely
      everywhere is not similar to all others
    - the router of a merged block: weighted mean of the rows, the most used expert's row, or the
      original router with each choice mapped to the cluster (`router`)
    - the weighting (`weights`), and whether cluster sizes are bounded: spectral clusters are
      unbalanced, so `grouping="dominant"` is an alternative: the K most used experts are cores and
      every other expert joins the most similar core, as in M-SMoE (Li et al., ICLR 2024,
      arXiv:2310.01334)
Deviations:
    - none known beyond the above; the paper's numbers are not claimed
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
        experts: Number of experts each block ends with: one number, a list with one per block, or
            None for half of them.
        budget: "equal" for `experts` in every block; "score" for as many on average, for which the
            experts of all blocks compete by how often they are chosen. Only foretune loads blocks
            of different sizes.
        grouping: "spectral" clustering on the similarity of router logits, or "dominant": the
            most used experts are cores, and every other expert joins the most similar core.
        centred: Centre the columns of logits before their cosine.
        align: Match the hidden units of a cluster's experts before they are averaged.
        weights: Weights of the experts in the mean: "frequency" or "uniform".
        router: Router row of a cluster: the "mean" of its members' rows, that of the "dominant"
            member, or "remap" to keep the router unchanged and map a choice of any member to the
            cluster (only foretune loads such a model).
    """

    experts: int | Sequence[int] | None = None
    budget: Budget = "equal"
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
        check_one_of("budget", self.budget, ("equal", "score"))
        check_one_of("grouping", self.grouping, ("spectral", "dominant"))
        check_one_of("weights", self.weights, ("frequency", "uniform"))
        check_one_of("router", self.router, ("mean", "dominant", "remap"))
        check_bool("centred", self.centred)
        check_bool("align", self.align)

    @property
    @override
    def keeps_router(self) -> bool:
        return self.router == "remap"

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Cluster by S, average by f."""
        from foretune.linalg.clustering import spectral
        from foretune.pruning.plan import merge_clusters

        def cluster(name: str, members: list[int], k: int) -> list[int]:
            block = statistics[name]
            cosine = block.correlation() if self.centred else block.cosine()
            similarity = ((1 + cosine) / 2)[members][:, members]  # S
            if self.grouping == "dominant":
                return _around_cores(similarity, block.frequency[members], k)
            return spectral(similarity, k)

        weights = {
            name: [1.0] * len(block.frequency)
            if self.weights == "uniform"
            else block.frequency.tolist()
            for name, block in statistics.items()
        }
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


def _around_cores(similarity: Any, frequency: Any, k: int) -> list[int]:
    """Cluster of each expert: the k most used experts are cores, the others join the nearest."""
    import numpy as np

    cores = sorted(np.argsort(-frequency, kind="stable")[:k].tolist())
    nearest = similarity[:, cores].argmax(1)
    return [cores.index(e) if e in cores else int(nearest[e]) for e in range(len(frequency))]
