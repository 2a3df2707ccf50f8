"""`ExpertPruning`: what the records of all methods that prune a mixture of experts share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from foretune.method import Method

if TYPE_CHECKING:
    from os import PathLike

    from torch import nn

    from foretune.pruning.experts import ExpertBlock
    from foretune.pruning.plan import Plan
    from foretune.pruning.prune import Pruned, Rows
    from foretune.pruning.statistics import ExpertStatistics


class ExpertPruning(Method, Protocol):
    """A method that plans from statistics of the router, and perhaps of the experts' outputs.

    Attributes:
        needs_outputs: Whether `plan` reads statistics of the experts' outputs, which cost more.
    """

    verb: ClassVar[str] = "prune"
    needs_outputs: ClassVar[bool] = False

    @property
    def experts(self) -> int | Sequence[int] | None:
        """How many experts each block ends with: one number, one for each block, None for half."""

    @property
    def keeps_router(self) -> bool:
        """Whether the router goes on choosing among the experts that there were."""
        return False

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """What becomes of the experts of each block."""
        ...

    def prune(self, model: nn.Module | str | PathLike[str], rows: Rows, **options: Any) -> Pruned:
        """Prunes a copy of the model by this method; `options` are those of `prune_mixture`."""
        from foretune.pruning.prune import prune_mixture

        return prune_mixture(model, rows, self, **options)
