"""Which retrainings are worth a trial, by the measured conflict of the seen tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foretune.errors import UserError
from foretune.evaluation.conflict import measure_conflict
from foretune.evaluation.conflict_reading import Inputs
from foretune.tasks.rows import CLASSES
from foretune.tasks.task import TaskCollection

HAIR = 0.005  # half a point of accuracy: a gain that no comparison would show
FOR_CONFLICT = ("peft-ml", "factorised-heads")  # retrainings that pay where tasks disagree


def promising(
    candidates: Sequence[dict[str, Any]],
    tasks: TaskCollection,
    shots: Sequence[int | None],
    seed: int,
) -> list[dict[str, Any]]:
    """The candidates without those that cannot gain, and first those that are expected to.

    Only where tasks share their inputs: on frozen features the measurement says too little of what
    a trained base may find. At least two candidates remain.

    Args:
        candidates: Retrain methods as mappings with a `name`.
        tasks: The seen tasks, with their objective.
        shots: Numbers of examples to adapt with.
        seed: Random seed.
    """
    if tasks.objective is None or tasks.objective.kind not in (*CLASSES, "regression"):
        return list(candidates)
    try:
        conflict = measure_conflict(tasks, Inputs(shared_only=True), shots=shots, seed=seed)
    except UserError:  # too few tasks, or other inputs
        return list(candidates)
    if conflict.advice == "PEFT-ML":
        return sorted(candidates, key=lambda candidate: not _for_conflict(candidate))
    others = [candidate for candidate in candidates if not _for_conflict(candidate)]
    hopeless = conflict.expected_gain is not None and conflict.expected_gain[2] < HAIR
    return others if hopeless and len(others) > 1 else list(candidates)


def _for_conflict(candidate: Mapping[str, Any]) -> bool:
    return candidate["name"] in FOR_CONFLICT
