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
    """Predict what is hidden: the history or the future of each agent, and half of the lanes.

    Loss: mean absolute error of the hidden futures, plus that of the hidden histories, plus
    `lane_weight` times the mean squared error of the hidden lanes (arXiv:2308.09882, section 3.3).
    The score is the negative loss.

    Args:
        history_steps: Observed steps of a scene.
        future_steps: Steps that follow.
        radius: Agents and lanes farther than this from the focal agent, in metres, are left out;
            None keeps all.
        lane_weight: Weight of the lanes in the loss.
    """

    lane_weight: float = 0.35

    kind: ClassVar[str] = "scene-reconstruction"
    metric: ClassVar[str] = "negative reconstruction loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("lane_weight", self.lane_weight, 0)

    @override
    def sample(self, row: Mapping[str, Any], rng: np.random.Generator) -> Mapping[str, Any]:
        """The scene with freshly drawn masks."""
        agents = rng.permutation(len(row["kind"])) + rng.integers(2)
        return {**row, **masks(row, agents % 2 == 1, lane_hidden(row, rng))}

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(n,) reconstruction losses of the scenes."""
        scene = batch.inputs
        with route(batch.slots):
            predicted = model.reconstruct(scene)
        present = scene["agent_present"]
        future = scene["future"]
        hidden = present & ~scene["keep_future"]
        loss = _mean(predicted.future - future[..., :2], (future[..., 2] > 0) & hidden[..., None])
        hidden = present & ~scene["keep_history"]
        loss = loss + _mean(
            predicted.history - scene["past"], (scene["history"][..., 3] > 0) & hidden[..., None]
        )
        hidden = scene["lane_present"] & ~scene["keep_lane"]
        lanes = scene["lanes"]
        squared = (predicted.lanes - lanes[..., :2]).square()
        return loss + self.lane_weight * _mean(squared, (lanes[..., 2] > 0) & hidden[..., None])

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        """(n,) negative reconstruction losses."""
        return -self.losses(model, batch)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


def _mean(errors: Tensor, where: Tensor) -> Tensor:
    """(n,) mean absolute value of (n, N, T, 2) over the steps in `where`; 0 if there are none."""
    sizes = torch.where(where, errors.abs().mean(-1), 0)
    return sizes.flatten(1).sum(1) / where.flatten(1).sum(1).clamp(min=1)
