"""What the two objectives on scenes share: checking, encoding, masking and padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from typing_extensions import override

from foretune.forecasting.scenes import check_scene, in_focal_frame
from foretune.run import check_int, check_positive
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS
from foretune.tasks.task import Objective, TaskCollection

AGENT = ("history", "past", "future", "kind", "agent_pose", "keep_history", "keep_future")
LANE = ("lanes", "lane_pose", "keep_lane")


@dataclass(frozen=True, kw_only=True)
class SceneObjective(Objective):
    """An objective whose examples are scenes (`foretune.forecasting.scenes`).

    Args:
        history_steps: Observed steps of a scene.
        future_steps: Steps that follow.
        radius: Agents and lanes farther than this from the focal agent, in metres, are left out;
            None keeps all.
    """

    history_steps: int = 50
    future_steps: int = 60
    radius: float | None = 150.0

    head: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        check_int("history_steps", self.history_steps, 2)
        check_int("future_steps", self.future_steps, 1)
        if self.radius is not None:
            check_positive("radius", self.radius)

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Check every scene; nothing is learnt from them.

        Raises:
            UserError: A scene has a wrong shape or step count; the message names task and split.
        """
        for task in tasks:
            for split in SPLITS:
                for i, row in enumerate(task.split(split)):
                    where = f'task "{task.name}", {split} scene {i + 1}'
                    check_scene(row, where, self.history_steps, self.future_steps)
        return self

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        """A scene in its focal frame, with the fixed masks that validation uses."""
        row: dict[str, Any] = in_focal_frame(example, self.history_steps, self.radius)
        # Agents alternate between a visible history and a visible future.
        return row | masks(row, np.arange(len(row["kind"])) % 2 == 1, lane_hidden(row, None))

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        """Tokens of a scene: history and future of each agent, and the lanes."""
        return 2 * len(row["kind"]) + len(row["lanes"])

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        """Scenes padded to the largest number of agents and of lanes in the batch."""
        inputs = {name: _padded([row[name] for row in rows]) for name in AGENT + LANE}
        inputs["agent_present"] = _present([len(row["kind"]) for row in rows])
        inputs["lane_present"] = _present([len(row["lanes"]) for row in rows])
        return Batch(inputs, tuple(slots), sum(map(self.size, rows)), {})


def lane_hidden(row: Mapping[str, Any], rng: np.random.Generator | None) -> np.ndarray:
    """(L,) true for half of the lanes: a random half, or every second lane without `rng`."""
    order = np.arange(len(row["lanes"])) if rng is None else rng.permutation(len(row["lanes"]))
    hidden: np.ndarray = order % 2 == 1
    return hidden


def masks(
    row: Mapping[str, Any], history_hidden: np.ndarray, lane_is_hidden: np.ndarray
) -> dict[str, np.ndarray]:
    """Complementary masks: an agent with a future shows its history or its future, not both.

    Args:
        row: An encoded scene.
        history_hidden: (A,) agents that show their future, if they have one.
        lane_is_hidden: (L,) lanes to hide.

    Returns:
        keep_history (A,), keep_future (A,) and keep_lane (L,).
    """
    has_future = row["future"][..., 2].any(-1)
    return {
        "keep_history": ~(history_hidden & has_future),
        "keep_future": history_hidden & has_future,
        "keep_lane": ~lane_is_hidden,
    }


def _padded(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    """(n, longest, …), the shorter arrays followed by zeros."""
    longest = max(len(a) for a in arrays)
    nonempty = next((a for a in arrays if len(a)), arrays[0])
    out = np.zeros((len(arrays), longest, *nonempty.shape[1:]), nonempty.dtype)
    for target, a in zip(out, arrays, strict=True):
        if len(a):
            target[: len(a)] = a
    return torch.from_numpy(out)


def _present(counts: Sequence[int]) -> torch.Tensor:
    """(n, max(counts)), true where scene i has an entry."""
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]
