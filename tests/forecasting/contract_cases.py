"""The forms of Forecast-PEFT."""

from __future__ import annotations

from typing import Any

from contract.cases import AdaptCase
from forecasting.tiny_scenes import PARTS, forecast_mae, scene_tasks
from foretune.forecasting.forecast_peft import load_adapted


def load(base: Any, folder: Any) -> Any:
    return load_adapted(folder, base)


def case(label: str, **fields: Any) -> AdaptCase:
    return AdaptCase(
        "forecast-peft",
        {**PARTS, "learning_rate": 0.01, **fields},
        forecast_mae,
        scene_tasks,
        file="forecast_peft.safetensors",
        reload=load,
        label=label,
    )


ADAPT_CASES = [case("parts"), case("all", train="all", adapter_rank=0, freeze_bn=False)]
