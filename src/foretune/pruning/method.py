"""`ExpertPruning`: the shared base of methods that prune a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from foretune.method import Method

if TYPE_CHECKING:
    from os import PathLike

    from torch import nn

    from foretune.pruning.budgets import Budget
    from foretune.pruning.experts import ExpertBlock
    from foretune.pruning.plan import Plan
    from foretune.pruning.pruned import Pruned
    from foretune.pruning.statistics import ExpertStatistics


class ExpertPruning(Method, Protocol):
    """A method that plans from statistics of the router and, if needed, of the experts' outputs.

    Attributes:
        needs_outputs: Whether `plan` uses statistics of the experts' outputs, which cost more.
    """

    verb: ClassVar[str] = "prune"
    needs_outputs: ClassVar[bool] = False

    @property
    def experts(self) -> int | Sequence[int] | None:
        """Experts each block ends with: one number, one per block, or None for half of them."""

    @property
    def budget(self) -> Budget:
        """Whether every block ends with `experts`, or as many on average by their scores."""
        ...

    @property
    def keeps_router(self) -> bool:
        """Whether the router still chooses among the original experts."""
        return False

    def plan(
        self, blocks: Sequence[ExpertBlock], statistics: Mapping[str, ExpertStatistics]
    ) -> Plan:
        """Decide which experts of each block are kept, merged or dropped."""
        ...

    def prune(
        self,
        model: nn.Module | str | PathLike[str],
        rows: Sequence[str | Mapping[str, Any]],
        **options: Any,
    ) -> Pruned:
        """Prune a copy of the model by this method; see `prune_mixture` for `options`."""
        from foretune.pruning.prune import prune_mixture

        return prune_mixture(model, rows, self, **options)
