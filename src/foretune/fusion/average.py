"""Average: the mean of the fine-tuned models' weights.

Paper: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
accuracy without increasing inference time", ICML 2022, arXiv:2203.05482.

    W = W_0 + (1 / T) Σ_i (W_i − W_0)

Deviations:
    - The paper averages models of one task; here each model has its own task, and heads are kept
      per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.method import Method

if TYPE_CHECKING:
    from foretune.fusion.finetuned import Source
    from foretune.fusion.fused import Fused

PAPER = {
    "title": "Model soups: averaging weights of multiple fine-tuned models improves accuracy "
    "without increasing inference time",
    "authors": "Mitchell Wortsman and Gabriel Ilharco and Samir Ya Gadre and Rebecca Roelofs and "
    "Raphael Gontijo-Lopes and Ari S. Morcos and Hongseok Namkoong and Ali Farhadi and "
    "Yair Carmon and Simon Kornblith and Ludwig Schmidt",
    "year": 2022,
    "venue": "ICML",
    "arxiv": "2203.05482",
}


@dataclass(frozen=True, kw_only=True)
class Average(Method):
    """Fuse models over one base by the mean of their weights, the first control of a fusion."""

    name: ClassVar[str] = "average"
    label: ClassVar[str] = "weight averaging"
    verb: ClassVar[str] = "fuse"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def fuse(
        self, base: Source, finetuned: Mapping[str, Source], *, allow_unverified: bool = False
    ) -> Fused:
        """Fuse models over one base; see `fusion.merging.merge`."""
        from foretune.fusion.merging import merge

        return merge(
            base,
            finetuned,
            self.to_dict(),
            lambda changes: sum(changes[1:], changes[0]) / len(changes),
            allow_unverified=allow_unverified,
        )
