"""`SceneReconstruction`: the pretext task of Forecast-MAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from foretune.forecasting.batch import SceneObjective, lane_hidden, masks
from foretune.models.routing import route
from foretune.run import check_at_least
from foretune.tasks.batch import Batch


@dataclass(frozen=True, kw_only=True)
class SceneReconstruction(SceneObjective):
    """Of each agent the history or the future is hidden, and half of the lanes; predict them.

    Loss: mean absolute error of the hidden futures, plus that of the hidden histories, plus
    `lane_weight` times the mean squared error of the hidden lanes (arXiv:2308.09882, section 3.3).
    The score is its negative.

    Args:
        history_steps: Observed steps of a scene.
        future_steps: Steps that follow.
        radius: Agents and lanes farther from the focal agent, in metres, are left out; None for
            none.
        lane_weight: Of the lanes in the loss.
    """

    lane_weight: float = 0.35

    kind: ClassVar[str] = "scene-reconstruction"
    metric: ClassVar[str] = "negative reconstruction loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("lane_weight", self.lane_weight, 0)

    @override
    def sample(self, row: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        agents = rng.permutation(len(row["kind"])) + rng.integers(2)
        return {**row, **masks(row, agents % 2 == 1, lane_hidden(row, rng))}

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        scene = batch.inputs
        with route(batch.slots):
            said = model.reconstruct(scene)
        present = scene["agent_present"]
        future = scene["future"]
        hidden = present & ~scene["keep_future"]
        loss = _mean(said.future - future[..., :2], (future[..., 2] > 0) & hidden[..., None])
        hidden = present & ~scene["keep_history"]
        loss = loss + _mean(
            said.history - scene["past"], (scene["history"][..., 3] > 0) & hidden[..., None]
        )
        hidden = scene["lane_present"] & ~scene["keep_lane"]
        lanes = scene["lanes"]
        apart = (said.lanes - lanes[..., :2]).square()
        return loss + self.lane_weight * _mean(apart, (lanes[..., 2] > 0) & hidden[..., None])

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return -self.losses(model, batch)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


def _mean(apart: Tensor, where: Tensor) -> Tensor:
    """(n,) mean size of (n, N, T, 2) over the steps that are asked for; 0 where there are none."""
    sizes = torch.where(where, apart.abs().mean(-1), 0)
    return sizes.flatten(1).sum(1) / where.flatten(1).sum(1).clamp(min=1)
