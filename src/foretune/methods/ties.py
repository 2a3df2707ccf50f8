"""TIES: trim each model's change, elect a sign, average what agrees with it.

Paper: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023,
arXiv:2306.01708.

Per parameter: of each change only the largest `density` in magnitude stays; the sign with more
total magnitude wins; the changes of that sign are averaged, times λ, and added to the base.

Deviations:
    - The trimming is done in each tensor by itself (`peft.utils.merge_utils.ties`), not over all
      of a model's parameters, so that one tensor is in memory at a time.
    - Heads are kept, one a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from foretune.errors import UserError
from foretune.run import above_zero, share

if TYPE_CHECKING:
    from torch import Tensor

    from foretune.adapters.finetuned import Source
    from foretune.models.fused import Fused

PAPER = {
    "title": "TIES-Merging: Resolving Interference When Merging Models",
    "authors": "Prateek Yadav and Derek Tam and Leshem Choshen and Colin Raffel and Mohit Bansal",
    "year": 2023,
    "venue": "NeurIPS",
    "arxiv": "2306.01708",
}


@dataclass(frozen=True, kw_only=True)
class TIES:
    """Fuse models over one base by their trimmed changes, where their signs agree.

    Args:
        density: Share of each change that is kept, the largest in magnitude.
        scale: λ, the weight of the merged change.
    """

    density: float = 0.2
    scale: float = 1.0

    name: ClassVar[str] = "ties"
    label: ClassVar[str] = "TIES"
    verb: ClassVar[str] = "fuse"
    paper: ClassVar[dict[str, Any] | None] = PAPER

    def __post_init__(self) -> None:
        share("density", self.density)
        if self.density == 0:
            raise UserError("density=0 keeps nothing; it must be above 0")
        above_zero("scale", self.scale)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def fuse(self, base: Source, finetuned: Mapping[str, Source]) -> Fused:
        """Fuses models over one base; what it is given stays as it is."""
        from foretune.adapters.merging import merge

        return merge(base, finetuned, self.to_dict(), self._combine)

    def _combine(self, changes: list[Tensor]) -> Tensor:
        import warnings

        import torch
        from peft.utils.merge_utils import ties  # not exported, but documented

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a density of 1 trims nothing
            return ties(changes, torch.full((len(changes),), float(self.scale)), self.density)
