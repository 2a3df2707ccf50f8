"""`AdaptPlan`: how the tasks of a base are adapted, by their number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from foretune.entry_points import entry_point
from foretune.files import BASE_FILE
from foretune.formats import damage_named
from foretune.run import Run
from foretune.training.methods import AdaptMethod

RUN_FIELDS = ("batch_size", "weight_decay", "max_grad_norm", "precision")  # that a plan records


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to adapt: a method with its fields, and the number of steps; 0 is not adapting.

    Args:
        method: The adapt method's record.
        steps: Number of batches, at a constant learning rate.
    """

    method: AdaptMethod
    steps: int

    def run(self, run: Run) -> Run:
        """The run that takes these steps, so that it stops where the search has scored."""
        return run.replace(steps=self.steps, schedule="constant", warmup=0.0, patience=None)

    def to_dict(self) -> dict[str, Any]:
        """The setting as JSON types: the method's "name" and fields, and the steps."""
        return {"method": self.method.to_dict(), "steps": self.steps}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Setting:
        """The setting that `to_dict` wrote.

        Raises:
            UserError: There is no such method, or it has no such field.
        """
        make: Any = entry_point("foretune.methods:make")
        return cls(method=make(**record["method"]), steps=record["steps"])


@dataclass(frozen=True, kw_only=True)
class PlannedSetting:
    """The setting that was chosen for a number of shots, and what it is worth.

    Args:
        shots: Training examples per task (per class for a classification); None for all.
        rows: Median number of training examples of the held-out tasks at these shots.
        setting: How to adapt.
        score: Mean score of the held-out tasks after adapting. Where the loss selects, it may be
            below `score_before`.
        score_before: The same before adapting.
        standard_error: Standard error, over the held-out tasks, of the difference of the two.
        num_tasks: Number of held-out tasks.
    """

    shots: int | None
    rows: int
    setting: Setting
    score: float
    score_before: float
    standard_error: float
    num_tasks: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; the method's name and learning rate beside the setting."""
        method = self.setting.method
        return {
            "shots": self.shots,
            "rows": self.rows,
            "method": method.name,
            "learning_rate": method.learning_rate,
            "steps": self.setting.steps,
            "setting": self.setting.to_dict(),
            "score": self.score,
            "score_before": self.score_before,
            "standard_error": self.standard_error,
            "num_tasks": self.num_tasks,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PlannedSetting:
        """What `to_dict` wrote.

        Raises:
            UserError: As `Setting.from_dict`.
        """
        names = ("shots", "rows", "score", "score_before", "standard_error", "num_tasks")
        fields = {name: record[name] for name in names}
        return cls(setting=Setting.from_dict(record["setting"]), **fields)


@dataclass(frozen=True, kw_only=True)
class AdaptPlan:
    """How to adapt a base's new tasks, as was best on held-out tasks.

    Args:
        settings: One per number of shots that was tried.
        run: The run of the search, of which the `RUN_FIELDS` travel with the plan.
    """

    settings: Sequence[PlannedSetting]
    run: Run = field(default_factory=Run)

    def setting_for(self, rows: int) -> Setting:
        """The setting for a task with this many training examples.

        It is that of the number of examples which differs from `rows` by the smallest factor.
        """

        def distance(planned: PlannedSetting) -> float:
            return abs(math.log(max(1, planned.rows) / max(1, rows)))

        return min(self.settings, key=distance).setting

    def at_shots(self, shots: int | None) -> Setting | None:
        """The setting that was chosen for exactly this number of shots, if it was tried."""
        return next((p.setting for p in self.settings if p.shots == shots), None)

    def run_for(self, setting: Setting, run: Run | None = None) -> Run:
        """The run of an adaptation by this setting: batches as in the search.

        Args:
            setting: One of the plan's settings.
            run: Random seed, device and folder of the adaptation; None for the defaults of `Run`.
        """
        searched = {name: getattr(self.run, name) for name in RUN_FIELDS}
        return setting.run((run or Run()).replace(**searched))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {
            "run": {name: getattr(self.run, name) for name in RUN_FIELDS},
            "settings": [planned.to_dict() for planned in self.settings],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> AdaptPlan:
        """The plan that `to_dict` wrote.

        Raises:
            UserError: As `Setting.from_dict`, or a field of the run is out of range.
        """
        settings = tuple(PlannedSetting.from_dict(planned) for planned in record["settings"])
        return cls(settings=settings, run=Run(**record["run"]))


def plan_of(model: nn.Module) -> AdaptPlan | None:
    """How held-out tasks chose to adapt a base that was loaded from a folder; None if they did not.

    Raises:
        UserError: What the folder records is damaged.
    """
    record = getattr(model, "foretune_adapting", None)
    if record is None:
        return None
    with damage_named(Path(BASE_FILE)):
        return AdaptPlan.from_dict(record)
