"""`HeldOut`: the seen tasks that a retraining is validated by, after adapting to them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from foretune.errors import UserError
from foretune.method import check_verb
from foretune.run import Run, check_int
from foretune.tasks.row_store import select
from foretune.tasks.task import Objective, TaskCollection
from foretune.training.methods import AdaptMethod
from foretune.training.scoring import spread

SHARES = (4, 2, 1)  # a validation scores after a quarter, a half and all of its steps


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Tasks that are kept out of a retraining, and how its base is adapted to them to be validated.

    The score on the tasks that a base is retrained on does not say how well it adapts to others.
    A validation adapts a copy of the base to these tasks and takes the best mean score along that
    one short path, before adapting included.

    Args:
        tasks: None of them is among those that the base is retrained on. Their training examples
            are adapted on, their validation examples scored.
        method: The adapt method, such as `foretune.Head()`: the one that new tasks will be adapted
            by, or one that costs little.
        run: Batches, and number of steps; the learning rate is constant.
        shots: Training examples per task (per class for a classification); None for all.
        draws: Draws of the shots per task, for few tasks.

    Raises:
        UserError: A method of another verb, or a task without training or validation examples.
    """

    tasks: TaskCollection
    method: AdaptMethod
    run: Run = field(default_factory=lambda: Run(steps=32))
    shots: int | None = 8
    draws: int = 1

    def __post_init__(self) -> None:
        check_verb(self.method, "adapt")
        check_int("shots", self.shots, 1, optional=True)
        check_int("draws", self.draws, 1)
        for task in self.tasks:
            if not task.train or not task.validation:
                lacks = "training" if not task.train else "validation"
                raise UserError(
                    f'held-out task "{task.name}" has no {lacks} examples: it is adapted on '
                    "training examples and scored on validation examples"
                )

    def check_apart(self, seen: TaskCollection) -> None:
        """Checks that none of the tasks is retrained on.

        Raises:
            UserError: One is.
        """
        for name in self.tasks.names:
            if name in seen.names:
                raise UserError(
                    f'task "{name}" is both retrained on and held out: leave it out of one of them'
                )

    @property
    def score_at(self) -> list[int]:
        """The steps at which a validation scores: before adapting, and along the path."""
        return sorted({0, *(-(-self.run.steps // share) for share in SHARES)})

    def run_in(self, run: Run) -> Run:
        """The run of a validation of a retraining with this run."""
        return self.run.replace(
            seed=run.seed,
            device=run.device,
            precision=run.precision,
            schedule="constant",
            warmup=0.0,
            patience=None,
            out=None,
            resume=False,
            overwrite=False,
        )

    def with_rows(self, max_rows: int | None, objective: Objective) -> TaskCollection:
        """The tasks with at most so many validation examples each, evenly spread.

        Args:
            max_rows: Validation examples of a task that are scored; None for all.
            objective: The objective of the seen tasks, fitted to them.
        """
        tasks = tuple(
            dataclasses.replace(
                task, validation=select(task.validation, spread(len(task.validation), max_rows))
            )
            for task in self.tasks
        )
        return dataclasses.replace(self.tasks, tasks=tasks, objective=objective)

    def to_dict(self) -> dict[str, Any]:
        """What must be the same when a retraining is resumed, as JSON types."""
        return {
            "tasks": {task.name: task.digest for task in self.tasks},
            "method": self.method.to_dict(),
            "run": self.run.to_dict(),
            "shots": self.shots,
            "draws": self.draws,
        }
