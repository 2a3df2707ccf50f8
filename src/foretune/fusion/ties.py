"""TIES: trim each model's change, elect a sign, average the changes of that sign.

Paper: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708.

Per parameter: each change keeps only its `density` share of largest magnitude; the sign with more
total magnitude wins; the changes of that sign are averaged, scaled by λ, and added to the base.

Deviations:
    - Each tensor is trimmed separately (`peft.utils.merge_utils.ties`), not over all parameters of
      a model, so that one tensor is in memory at a time.
    - Heads are kept per task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.errors import UserError
from foretune.method import Method
from foretune.run import check_fraction, check_positive

if TYPE_CHECKING:
    from torch import Tensor

    from foretune.fusion.finetuned import Source
    from foretune.fusion.fused import Fused

PAPER = {
    "title": "TIES-Merging: Resolving Interference When Merging Models",
    "authors": "Prateek Yadav and Derek Tam and Leshem Choshen and Colin Raffel and Mohit Bansal",
    "year": 2023,
    "venue": "NeurIPS",
    "arxiv": "2306.01708",
}


@dataclass(frozen=True, kw_only=True)
class TIES(Method):
    """Fuse models over one base by their trimmed changes, where their signs agree.

    Args:
        density: Share of each change that is kept, largest magnitudes first.
        scale: λ, the weight of the merged change.
    """

    density: float = 0.2
    scale: float = 1.0

    name: ClassVar[str] = "ties"
    label: ClassVar[str] = "TIES"
    verb: ClassVar[str] = "fuse"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        check_fraction("density", self.density)
        if self.density == 0:
            raise UserError("density=0 keeps nothing; it must be above 0")
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
        import warnings

        import torch
        from peft.utils.merge_utils import ties  # not exported, but documented

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns that density=1 trims nothing
            return ties(changes, torch.full((len(changes),), float(self.scale)), self.density)
