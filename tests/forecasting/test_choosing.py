"""Which scenes are held out, and whether a forecaster or constant velocity is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from command_line import call, the_json
from forecasting.tiny_scenes import STEPS, batch_of, forecast_mae, scene_tasks
from foretune import Forecast
from foretune.errors import UserError
from foretune.forecasting import folders
from foretune.forecasting.choosing import Choice, choose, with_held_out
from foretune.forecasting.forecasters import add_head
from foretune.forecasting.junctions import junctions
from foretune.forecasting.measures import constant_velocity
from foretune.forecasting.model import Forecasts
from foretune.forecasting.scenes import save_scenes
from foretune.tasks.task import Task, TaskCollection

OBJECTIVE = Forecast(**STEPS)
SIZES = "width=16 encoder_depth=1 decoder_depth=1 num_heads=2 history_steps=4 future_steps=4"
TINY = [*SIZES.split(), "lane_points=10"]


class Told(nn.Module):
    """Forecasts the truth, `wrong` metres beside it, or what constant velocity forecasts."""

    def __init__(self, wrong: float | None) -> None:
        super().__init__()
        self.wrong, self.anything = wrong, nn.Parameter(torch.zeros(1))

    def forward(self, scene: dict[str, Tensor]) -> Forecasts:
        future = scene["future"][:, 0, :, :2]
        modes = constant_velocity(scene["history"][:, 0], future.shape[1])
        if self.wrong is not None:
            modes = future[:, None] + self.wrong
        return Forecasts(modes, modes.new_zeros(len(modes), 1))


def test_the_better_one_is_chosen_and_a_tie_costs_nothing() -> None:
    scenes = junctions(12, 0)
    right = choose(Told(0.0), scenes, OBJECTIVE)
    assert right.chosen == "forecaster" and right.scenes == 12
    assert right.minFDE == pytest.approx(0, abs=1e-3)
    same = choose(Told(None), scenes, OBJECTIVE)
    assert same.chosen == "constant velocity" and same.minFDE == same.constant_velocity
    assert choose(Told(500.0), scenes, OBJECTIVE).chosen == "constant velocity"
    # Of a single scene nothing can be said.
    assert choose(Told(0.0), scenes[:1], OBJECTIVE) == Choice(1, None, None, "constant velocity")


def test_ahead_means_by_more_than_a_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gains = iter([torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([3.0, -1.0, 0.5, -0.5])])
    monkeypatch.setattr("foretune.forecasting.displacement.min_fde", lambda *_, **__: next(gains))
    # Mean 0.5, standard error 0.88.
    assert choose(Told(0.0), junctions(4, 0), OBJECTIVE).chosen == "constant velocity"


@pytest.mark.parametrize(
    ("train", "validation", "held_out"),
    [(100, 0, 20), (50, 0, 10), (4, 0, 0), (100, 17, 20), (100, 30, 30), (30, 5, 7)],
)
def test_so_many_scenes_are_held_out(train: int, validation: int, held_out: int) -> None:
    rows = [{"agents": np.full((1, 22, 2), i)} for i in range(train + validation)]
    task = Task("a", rows[:train], rows[train:], rows[:1])
    [made] = with_held_out(TaskCollection((task,)))
    assert len(made.validation) == held_out
    assert [*made.train, *made.validation] == rows
    assert made.test == task.test


def test_the_score_counts_the_likeliest_modes() -> None:
    model = forecast_mae()
    add_head(model, spread=True)
    batch = batch_of(junctions(5, 0))
    forecasts = model(batch.inputs)
    modes, scores = forecasts.trajectories, forecasts.scores
    future = batch.inputs["future"][:, 0]
    assert (future[..., 2] > 0).all()
    final = (modes[:, :, -1] - future[:, None, -1, :2]).norm(dim=-1).detach().numpy()
    order = np.argsort(-scores.detach().numpy(), axis=1)
    for k in (1, 3, None):
        chosen = np.take_along_axis(final, order[:, :k], 1).min(1)
        ours = -Forecast(**STEPS, best_of=k).scores(model, batch)
        np.testing.assert_allclose(ours.detach().numpy(), chosen, rtol=1e-5)
    with pytest.raises(UserError, match="best_of must be a whole number not below 1"):
        Forecast(best_of=0)


def test_without_steps_training_ends_by_held_out_scenes() -> None:
    settings = folders.pretrain_settings([], 0).run
    assert (settings.patience, settings.schedule) == (5, "constant")
    assert folders.pretrain_settings(["steps=60"], 0).run.patience is None
    _, run = folders.adapt_settings("forecast-peft", ["patience=3"], 0)
    assert (run.patience, run.steps, run.schedule) == (3, 2_000, "constant")
    _, run = folders.adapt_settings("forecast-peft", ["steps=60"], 0)
    assert (run.patience, run.steps, run.schedule) == (None, 60, "cosine")


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """A file of tracks in which some people go on and some turn."""
    lines = ["timestamp,track_id,x,y"]
    for agent in range(24):
        for step in range(12):
            x, y = 0.5 * (step + agent), 3.0 * agent
            lines.append(f"{2.0 * agent + 0.4 * step:.1f},p{agent},{x},{y}")
    (tmp_path / "plaza.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "plaza.csv"


def test_tracks_in_a_csv_file_until_held_out_scenes_get_no_better(
    csv: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    short = ("eval_every=2", "patience=2", "--scenes", csv)
    pretrained = the_json("forecast", "pretrain", *TINY, *short, "--out", base)
    assert pretrained["steps"] < 10_000
    assert pretrained["notes"][0].endswith("held-out scenes got no better.")
    result = call("forecast", "adapt", base, *short, "prompts=2", "adapter_rank=2", "--out", out)
    assert result.exit_code == 0, result.output
    # All go straight on, and constant velocity is exact.
    assert "Constant velocity is taken for plaza: on held-out scenes" in result.stdout
    assert "Training ended after" in result.stdout
    shown = call("forecast", "eval", out, "--scenes", csv)
    assert "Chosen on held-out scenes: constant velocity for plaza." in shown.stdout
    assert "Constant velocity is ahead by minFDE1, minFDE6 on plaza." in shown.stdout
    rows = the_json("forecast", "eval", out, "--scenes", csv)["rows"]
    assert [(row["model"], row["chosen"]) for row in rows] == [
        ("out", ""),
        ("constant velocity", "yes"),
    ]


def test_a_single_forecast_is_judged_by_the_likeliest_mode(tmp_path: Path) -> None:
    save_scenes(tmp_path / "s.npz", scene_tasks(30, ("one",)))
    sizes = [t.replace("history_steps=4", "history_steps=10") for t in TINY]
    sizes = [t.replace("future_steps=4", "future_steps=12") for t in sizes]
    scenes = ("--scenes", tmp_path / "s.npz")
    the_json("forecast", "pretrain", *sizes, "steps=1", *scenes, "--out", tmp_path / "base")
    found: dict[int | None, Any] = {}
    for k in (None, 1):
        option = () if k is None else ("--best-of", k)
        found[k] = the_json(
            *("forecast", "adapt", tmp_path / "base", "steps=2", "prompts=2", "adapter_rank=2"),
            *(*scenes, *option, "--out", tmp_path / f"out{k}"),
        )["held_out"]["one"]
    assert found[1]["minFDE"] > found[None]["minFDE"]
    assert found[1]["constant_velocity"] == found[None]["constant_velocity"]
