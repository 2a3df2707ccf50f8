"""`Forecast`: several futures of a scene's focal agent, of which the best one counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from foretune.forecasting.batch import SceneObjective
from foretune.forecasting.displacement import displacements
from foretune.models.routing import route
from foretune.run import check_positive
from foretune.tasks.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Forecast(SceneObjective):
    """Winner takes all: the mode nearest to what happened learns where, and that it was the one.

    The loss is `regression` times the smooth L1 distance of the winner, plus the cross-entropy of
    the modes' scores against it (arXiv:2407.19564, section 3.4); a model that forecasts the other
    agents too has their smooth L1 distance added. The score is minus the smallest final
    displacement over all modes, in metres.

    Args:
        history_steps: Observed steps of a scene.
        future_steps: Steps to forecast.
        radius: Agents and lanes farther from the focal agent, in metres, are left out; None for
            none.
        regression: Weight of the distance against the cross-entropy.
    """

    regression: float = 10.0

    kind: ClassVar[str] = "forecast"
    metric: ClassVar[str] = "negative minFDE"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("regression", self.regression)

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        with route(batch.slots):
            said = model(batch.inputs)
        truth, valid = focal_future(batch)
        average, _ = displacements(said.trajectories.detach().float(), truth, valid)
        winner = average.argmin(1)
        best = said.trajectories[torch.arange(len(batch)), winner]
        loss = self.regression * _smooth_l1(best, truth, valid)
        loss = loss + F.cross_entropy(said.scores, winner, reduction="none")
        if said.others is None:
            return loss
        future = batch.inputs["future"][:, 1:]
        seen = (future[..., 2] > 0) & batch.inputs["agent_present"][:, 1:, None]
        others = _smooth_l1(
            said.others.flatten(1, 2), future[..., :2].flatten(1, 2), seen.flatten(1)
        )
        return loss + others

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        with route(batch.slots):
            said = model(batch.inputs)
        _, final = displacements(said.trajectories.float(), *focal_future(batch))
        return -final.amin(1)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


def focal_future(batch: Batch) -> tuple[Tensor, Tensor]:
    """(n, F, 2) in the focal frame and (n, F) which steps were observed."""
    future = batch.inputs["future"][:, 0]
    return future[..., :2], future[..., 2] > 0


def _smooth_l1(said: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """(n,) mean over the observed steps; 0 where there are none."""
    apart = F.smooth_l1_loss(said, truth, reduction="none").mean(-1)
    return torch.where(valid, apart, 0).sum(-1) / valid.sum(-1).clamp(min=1)
