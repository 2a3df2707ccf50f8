"""No retraining: the control in which each task adapts the untouched model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class NoRetraining:
    """The model as it is: what every retraining has to beat."""

    name: ClassVar[str] = "none"
    label: ClassVar[str] = "no retraining"
    verb: ClassVar[str] = "retrain"
    paper: ClassVar[dict[str, Any] | None] = None
    keeps_adapters: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    def objective_for(self, objective: Any) -> Any:
        return objective

    def budget(self, run: Any, num_tasks: int) -> Any:
        return run

    def learner(self, model: Any, objective: Any, keys: Any, run: Any) -> None:
        """Nothing is trained."""
        return None
