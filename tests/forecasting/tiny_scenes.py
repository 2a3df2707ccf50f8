"""Made-up junctions and a microscopic Forecast-MAE for them."""

from __future__ import annotations

from typing import Any

import torch

from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.junctions import FUTURE_STEPS, HISTORY_STEPS, LANE_POINTS, junctions
from foretune.forecasting.model import ForecastMAE
from foretune.forecasting.objective import Forecast
from foretune.tasks.task import Objective, Task, TaskCollection

STEPS = {"history_steps": HISTORY_STEPS, "future_steps": FUTURE_STEPS}
PARTS = {"modes": 3, "prompts": 4, "adapter_rank": 2}


def forecast_mae(seed: int = 0, **changes: Any) -> ForecastMAE:
    """Width 16, two blocks in the encoder, one in the decoder; lanes' running statistics moved."""
    torch.manual_seed(seed)
    sizes = {"width": 16, "encoder_depth": 2, "decoder_depth": 1, "num_heads": 2, **changes}
    model = ForecastMAE(ForecastMAEConfig(**sizes, **STEPS, lane_points=LANE_POINTS))
    for name, buffer in model.named_buffers():
        buffer.add_(0.1 * torch.rand(buffer.shape) if buffer.is_floating_point() else 1)
        assert "lane_embed" in name
    return model.eval()


def scene_tasks(rows: int = 12, names: tuple[str, ...] = ("one", "two")) -> TaskCollection:
    """Tasks of junctions, a third of the rows for testing, with the objective `Forecast`."""
    tasks = []
    for seed, name in enumerate(names):
        scenes = junctions(rows, seed)
        tasks.append(Task(name, scenes[: 2 * rows // 3], (), scenes[2 * rows // 3 :]))
    return TaskCollection(tuple(tasks), Forecast(**STEPS))


def batch_of(rows: list[Any], objective: Objective | None = None) -> Any:
    """A batch of plain scenes."""
    objective = objective or Forecast(**STEPS)
    encoded = [objective.encode(row, "") for row in rows]
    return objective.collate(encoded, [0] * len(rows))
