"""Measures of forecasts: pure functions, and what they must obey."""

from __future__ import annotations

import itertools

import pytest
import torch

from forecasting.tiny_scenes import STEPS
from foretune.forecasting.displacement import min_fde
from foretune.forecasting.junctions import junctions
from foretune.forecasting.measures import (
    brier_min_fde,
    constant_velocity,
    forecast_rows,
    measures,
    min_ade,
    missed,
)
from foretune.forecasting.objective import Forecast
from foretune.forecasting.report import forecast_page, scene_figure
from foretune.forecasting.scenes import in_focal_frame


def drawn(seed=0, n=20, modes=6, steps=5):
    torch.manual_seed(seed)
    valid = torch.rand(n, steps) < 0.7
    valid[:, 0] = True
    return (
        3 * torch.randn(n, modes, steps, 2),
        torch.randn(n, modes),
        torch.randn(n, steps, 2),
        valid,
    )


def test_by_hand():
    truth = torch.zeros(1, 2, 2)
    traj = torch.tensor([[[[3.0, 4.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 3.0]]]])
    scores, valid = torch.tensor([[0.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    forecasts = (traj, scores, truth, valid)
    assert min_ade(*forecasts).item() == 2  # of the second mode; the first has 3
    assert min_fde(*forecasts).item() == 1  # of the first mode
    assert missed(*forecasts).item() == 0
    assert brier_min_fde(*forecasts).item() == pytest.approx(1 + 0.25)
    only_first = torch.tensor([[False, False]])
    only_first[0, 0] = True
    assert min_fde(traj, scores, truth, only_first).item() == 1  # of the second one now
    likeliest = torch.tensor([[0.0, 5.0]])
    assert min_fde(traj, likeliest, truth, valid, k=1).item() == 3
    assert missed(traj, likeliest, truth, valid, k=1).item() == 1


@pytest.mark.parametrize("seed", range(3))
def test_more_modes_are_never_worse(seed):
    forecasts = drawn(seed)
    for measure in (min_ade, min_fde, missed):
        by_k = [measure(*forecasts, k=k) for k in range(1, 7)]
        assert all((b <= a).all() for a, b in itertools.pairwise(by_k))
        assert torch.equal(by_k[-1], measure(*forecasts))
    rate = missed(*forecasts).mean()
    assert 0 <= rate <= 1
    assert (brier_min_fde(*forecasts) >= min_fde(*forecasts)).all()
    assert (brier_min_fde(*forecasts) <= min_fde(*forecasts) + 1).all()


def test_a_step_that_was_not_observed_is_not_read():
    traj, scores, truth, valid = drawn()
    spoilt = torch.where(valid[..., None], truth, float("nan"))
    for measure in (min_ade, min_fde, brier_min_fde):
        assert torch.equal(
            measure(traj, scores, truth, valid), measure(traj, scores, spoilt, valid)
        )


def test_constant_velocity_forecasts_uniform_motion_exactly():
    row = junctions(1, 0)[0]
    row["agents"][0] = torch.arange(22)[:, None] * torch.tensor([1.5, -0.5]) + 7
    forecasts = forecast_rows(None, [row], Forecast(**STEPS))
    assert min_fde(*forecasts).item() == pytest.approx(0, abs=1e-4)
    assert list(measures(forecasts)) == ["minADE1", "minFDE1", "MR1", "b-minFDE1"]
    assert constant_velocity(torch.ones(2, 3, 4), 5).shape == (2, 1, 5, 2)


def test_a_picture_and_a_page_are_whole_and_safe():
    scene = in_focal_frame(junctions(1, 0)[0], STEPS["history_steps"])
    modes = torch.randn(3, 12, 2).numpy()
    svg = scene_figure(scene, modes, torch.tensor([0.2, 0.5, 0.3]).numpy())
    assert svg.startswith("<svg") and svg.count("<polyline") >= 3 + 2 and "50%" in svg
    page = forecast_page([{"task": "<b>", "minFDE6": 1.25}], [("x & y", svg)], "T")
    assert "&lt;b&gt;" in page and "x &amp; y" in page and "1.250" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
