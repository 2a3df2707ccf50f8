"""Task arithmetic: the base plus the scaled sum of the task vectors.

Paper: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089.

    W = W_0 + λ Σ_i (W_i − W_0)

Deviations:
    - None in the rule; heads are kept per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.method import Method
from foretune.run import check_positive

if TYPE_CHECKING:
    from torch import Tensor

    from foretune.fusion.finetuned import Source
    from foretune.fusion.fused import Fused

PAPER = {
    "title": "Editing Models with Task Arithmetic",
    "authors": "Gabriel Ilharco and Marco Tulio Ribeiro and Mitchell Wortsman and "
    "Suchin Gururangan and Ludwig Schmidt and Hannaneh Hajishirzi and Ali Farhadi",
    "year": 2023,
    "venue": "ICLR",
    "arxiv": "2212.04089",
}


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    """Fuse models over one base by the scaled sum of their changes.

    Args:
        scale: λ; 1 / (number of models) gives the average.
    """

    scale: float = 0.4

    name: ClassVar[str] = "task-arithmetic"
    label: ClassVar[str] = "task arithmetic"
    verb: ClassVar[str] = "fuse"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_positive("scale", self.scale)

    def fuse(
        self, base: Source, finetuned: Mapping[str, Source], *, allow_unverified: bool = False
    ) -> Fused:
        """Fuse models over one base; see `fusion.merging.merge`."""
        from foretune.fusion.merging import merge

        return merge(
            base,
            finetuned,
            self.to_dict(),
            self._combine,
            allow_unverified=allow_unverified,
        )

    def _combine(self, changes: list[Tensor]) -> Tensor:
        import torch
        from peft.utils.merge_utils import task_arithmetic  # not exported, but documented

        return task_arithmetic(changes, torch.full((len(changes),), float(self.scale)))
