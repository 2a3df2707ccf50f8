"""The sizes of a Forecast-MAE. Importing this module does not import torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from foretune.errors import UserError
from foretune.run import check_fraction, check_int, check_positive


@dataclass(frozen=True, kw_only=True)
class ForecastMAEConfig:
    """Sizes of a Forecast-MAE; the defaults are those of the released model for Argoverse 2.

    Args:
        width: Token width d; a multiple of 8 and of `num_heads`.
        encoder_depth: Encoder blocks.
        decoder_depth: Decoder blocks.
        num_heads: Attention heads per block.
        drop_path: Stochastic-depth rate of the last block; rises linearly from 0 at the first.
        history_steps: Observed steps of an agent.
        future_steps: Steps to predict.
        lane_points: Points per lane.
        radius: Agents and lanes farther than this from the focal agent, in metres, are left out;
            None keeps all.
        metres: Length unit of the model's inputs and outputs, in metres. A larger unit keeps far
            positions small, which trains in fewer steps; the released model has 1.

    Raises:
        UserError: A value is out of range.
    """

    width: int = 128
    encoder_depth: int = 4
    decoder_depth: int = 4
    num_heads: int = 8
    drop_path: float = 0.2
    history_steps: int = 50
    future_steps: int = 60
    lane_points: int = 20
    radius: float | None = 150.0
    metres: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in ("drop_path", "radius", "metres"):
                check_int(field.name, getattr(self, field.name), 1)
        check_fraction("drop_path", self.drop_path)
        check_positive("metres", self.metres)
        if self.radius is not None:
            check_positive("radius", self.radius)
        if self.width % 8 or self.width % self.num_heads:
            raise UserError(
                f"width must be a multiple of 8 and of num_heads {self.num_heads}, got {self.width}"
            )
        check_int("history_steps", self.history_steps, 2)
