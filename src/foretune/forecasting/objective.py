"""`Forecast`: the objective of forecasting several futures, of which the best one counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from foretune.forecasting.batch import SceneObjective
from foretune.forecasting.displacement import displacements, min_fde
from foretune.models.routing import route
from foretune.run import check_int, check_positive
from foretune.tasks.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Forecast(SceneObjective):
    """Winner-takes-all: only the mode nearest to the truth learns, and the scores learn to pick it.

    The loss is `regression` times the smooth L1 distance of the winner, plus the cross-entropy of
    the modes' scores against it (arXiv:2407.19564, section 3.4), plus the smooth L1 distance of
    the other agents if the model forecasts them. The score is the negative of the smallest final
    displacement over the modes that count, in metres.

    Args:
        history_steps: Observed steps of a scene.
        future_steps: Steps to forecast.
        radius: Agents and lanes farther than this from the focal agent, in metres, are left out;
            None keeps all.
        regression: Weight of the distance relative to the cross-entropy.
        best_of: The score is the best of so many of the likeliest modes; None for all. 1 for a
            single forecast.
    """

    regression: float = 10.0
    best_of: int | None = None

    kind: ClassVar[str] = "forecast"
    metric: ClassVar[str] = "negative minFDE"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("regression", self.regression)
        check_int("best_of", self.best_of, 1, optional=True)

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        """(n,) winner-takes-all losses of the scenes."""
        with route(batch.slots):
            forecasts = model(batch.inputs)
        truth, valid = focal_future(batch)
        average, _ = displacements(forecasts.trajectories.detach().float(), truth, valid)
        winner = average.argmin(1)
        best = forecasts.trajectories[torch.arange(len(batch)), winner]
        loss = self.regression * _smooth_l1(best, truth, valid)
        loss = loss + F.cross_entropy(forecasts.scores, winner, reduction="none")
        if forecasts.others is None:
            return loss
        future = batch.inputs["future"][:, 1:]
        observed = (future[..., 2] > 0) & batch.inputs["agent_present"][:, 1:, None]
        others = _smooth_l1(
            forecasts.others.flatten(1, 2), future[..., :2].flatten(1, 2), observed.flatten(1)
        )
        return loss + others

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        """(n,) negative minFDE over the modes that count, in m."""
        with route(batch.slots):
            forecasts = model(batch.inputs)
        modes, truth = forecasts.trajectories.float(), focal_future(batch)
        return -min_fde(modes, forecasts.scores, *truth, k=self.best_of)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


def focal_future(batch: Batch) -> tuple[Tensor, Tensor]:
    """The focal agents' true positions (n, F, 2) in m, and (n, F) which steps were observed."""
    future = batch.inputs["future"][:, 0]
    return future[..., :2], future[..., 2] > 0


def _smooth_l1(trajectories: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """(n,) mean over the observed steps; 0 where there are none."""
    distance = F.smooth_l1_loss(trajectories, truth, reduction="none").mean(-1)
    return torch.where(valid, distance, 0).sum(-1) / valid.sum(-1).clamp(min=1)
