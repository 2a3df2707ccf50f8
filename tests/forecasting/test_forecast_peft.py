"""Forecast-PEFT: what it trains, what it leaves alone, what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import foretune
from forecasting.tiny_scenes import PARTS, STEPS, batch_of, forecast_mae, scene_tasks
from foretune.errors import UserError
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.forecast_peft import load_adapted
from foretune.forecasting.forecasters import add_head
from foretune.forecasting.junctions import junctions
from foretune.forecasting.model import ForecastMAE
from foretune.forecasting.objective import Forecast
from foretune.methods import make
from foretune.run import Run
from linear_tasks import copy_of, equal_bits

NEW_PARTS = ("adapter", "prompt_mode", "prompt_scene", "prompt_score")
RUN = Run(steps=3, batch_size=4, device="cpu", eval_every=0)
PEFT = make("forecast-peft", **PARTS)
FT = make("forecast-peft", **{**PARTS, "adapter_rank": 0, "train": "all"})


def adapted(method=PEFT, model=None, tasks=None, **changes):
    run = RUN.replace(**changes)
    return foretune.adapt(model or forecast_mae(), tasks or scene_tasks(), method, run)


def test_trained_parameters_are_as_many_as_in_the_released_configuration():
    model = ForecastMAE(ForecastMAEConfig())
    record = foretune.ForecastPEFT()
    record.install(model)
    by_name = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in by_name.values()) == 383_577
    assert set(by_name) == set(record.trained_names(model))
    counted: dict[str, int] = {}
    for name, p in by_name.items():
        kind = next(
            k for k in (*NEW_PARTS, "future_pred", "decoder_embed", "norm", "bias") if k in name
        )
        counted[kind] = counted.get(kind, 0) + p.numel()
    assert counted == {
        "adapter": 265_216,
        "prompt_mode": 38_400,
        "prompt_scene": 25_600,
        "prompt_score": 129,
        "bias": 15_008,
        "norm": 7_232,
        "decoder_embed": 16_512,
        "future_pred": 15_480,
    }


def test_forecast_ft_has_no_adapters_and_trains_everything():
    model = ForecastMAE(ForecastMAEConfig())
    foretune.ForecastPEFT(adapter_rank=0, train="all").install(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2_519_717


def test_trained_names_are_the_five_patterns_and_the_adapters():
    model = forecast_mae()
    PEFT.install(model)
    patterns = ("prompt", "adapter", "bias", "norm", "future_pred", "decoder_embed")
    for name, p in model.named_parameters():
        assert p.requires_grad == any(pattern in name for pattern in patterns), name
    assert not any("norm" in n and "lane_embed" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_what_is_frozen_stays_bit_for_bit(freeze_bn):
    base = forecast_mae()
    model = adapted(make("forecast-peft", **PARTS, freeze_bn=freeze_bn), base).models["one", 0]
    before, after = base.state_dict(), model.state_dict()
    trained = set(PEFT.trained_names(model))
    buffers = {name for name, _ in base.named_buffers()}
    for name in before.keys() & after.keys():
        same = torch.equal(before[name], after[name])
        assert same == ((name in buffers and freeze_bn) or name not in trained | buffers), name


def test_the_input_is_left_alone_and_every_task_is_scored():
    base = forecast_mae()
    base.lane_type_embed.requires_grad_(False)
    before, names = copy_of(base), [n for n, p in base.named_parameters() if p.requires_grad]
    result = adapted(model=base)
    assert equal_bits(base.state_dict(), before)
    assert names == [n for n, p in base.named_parameters() if p.requires_grad]
    assert base.forecaster is None and all(p.grad is None for p in base.parameters())
    assert set(result.scores) == {("one", 0), ("two", 0)} == set(result.models)
    assert result.cost["trainable_parameters"] == sum(
        p.numel()
        for n, p in result.models["one", 0].named_parameters()
        if n in PEFT.trained_names(result.models["one", 0])
    )


@pytest.mark.parametrize("method", [PEFT, FT])
def test_same_seed_same_bits(method):
    base, tasks = forecast_mae(), scene_tasks().subset(["two"])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = adapted(method, base, tasks, seed=3).models["two", 0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = adapted(method, base, tasks, seed=3).models["two", 0]
    third = adapted(method, base, tasks, seed=4).models["two", 0]
    assert equal_bits(first.state_dict(), second.state_dict())
    assert not equal_bits(first.state_dict(), third.state_dict())


def test_a_task_does_not_notice_the_others():
    together = adapted(steps=2).models["two", 0]
    alone = adapted(tasks=scene_tasks().subset(["two"]), steps=2).models["two", 0]
    assert equal_bits(together.state_dict(), alone.state_dict())


def test_prompts_biases_and_norms_do_not_decay():
    from foretune.training.learners.joint import Learner

    model = forecast_mae()
    learner = PEFT.learner(model, Forecast(**STEPS), ["one"], RUN)
    assert isinstance(learner, Learner)
    learner.start(RUN.replace(weight_decay=0.5))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in learner.base_optimizer.param_groups:
        for p in group["params"]:
            free = any(part in names[id(p)] for part in ("prompt", "bias", "norm"))
            assert group["weight_decay"] == (0.0 if free else 0.5), names[id(p)]
    optimized = [p for group in learner.base_optimizer.param_groups for p in group["params"]]
    assert {names[id(p)] for p in optimized} == set(PEFT.trained_names(model))


def test_training_comes_closer_to_the_scenes_it_learns_from():
    scenes = junctions(8, 5)
    tasks = foretune.TaskCollection((foretune.Task("one", scenes, (), scenes),), Forecast(**STEPS))
    base, method = forecast_mae(metres=10.0), make("forecast-peft", **PARTS, learning_rate=1e-2)
    few, many = (adapted(method, base, tasks, steps=steps, batch_size=8) for steps in (1, 25))
    assert many.scores["one", 0] > 0.7 * few.scores["one", 0]


# --- the objective ------------------------------------------------------------------------------


class Fixed(nn.Module):
    """Makes the same forecasts for every scene."""

    def __init__(self, trajectories, scores, others=None):
        super().__init__()
        self.trajectories, self.scores_ = nn.Parameter(trajectories), nn.Parameter(scores)
        self.others = others

    def forward(self, scene):
        from foretune.forecasting.model import Forecasts

        n = len(scene["kind"])
        return Forecasts(
            self.trajectories.expand(n, -1, -1, -1), self.scores_.expand(n, -1), self.others
        )


def test_only_the_winner_gets_a_gradient_and_the_target_is_the_winner():
    batch = batch_of(junctions(1, 3))
    truth = batch.inputs["future"][:, 0, :, :2]
    torch.manual_seed(0)
    model = Fixed(truth[0] + torch.tensor([30.0, 1.0, -20.0])[:, None, None], torch.zeros(3))
    Forecast(**STEPS).losses(model, batch).sum().backward()
    assert [bool(g.abs().sum() > 0) for g in model.trajectories.grad] == [False, True, False]
    assert model.scores_.grad.tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3])


def test_the_loss_is_ten_times_smooth_l1_and_a_cross_entropy():
    batch = batch_of(junctions(1, 3))
    truth = batch.inputs["future"][:, 0, :, :2]
    offset = torch.tensor([0.5, -3.0])  # smooth L1: 0.5 * 0.25 and 3 - 0.5
    model = Fixed((truth[0] + offset)[None], torch.zeros(1))
    expected = 10 * (0.125 + 2.5) / 2
    assert Forecast(**STEPS).losses(model, batch).item() == pytest.approx(expected, rel=1e-4)
    far = Fixed((truth[0] + torch.tensor([3.0, 4.0]))[None], torch.zeros(1))
    assert Forecast(**STEPS).scores(far, batch).item() == pytest.approx(-5, rel=1e-4)


def test_steps_that_were_not_observed_do_not_count():
    row = junctions(1, 3)[0]
    row["agents"][0, -4:] = float("nan")
    batch = batch_of([row])
    truth = batch.inputs["future"][:, 0, :, :2].clone()
    truth[:, -4:] = 1000.0
    model = Fixed(truth, torch.zeros(1))
    assert Forecast(**STEPS).losses(model, batch).item() == pytest.approx(0, abs=1e-6)
    assert Forecast(**STEPS).scores(model, batch).item() == 0


def test_other_agents_have_a_loss_only_where_the_model_forecasts_them():
    head = forecast_mae()
    add_head(head, modes=3)
    batch = batch_of(junctions(3, 3))
    loss = Forecast(**STEPS).losses(head, batch)
    loss.sum().backward()
    assert head.forecaster.dense_predictor[-1].weight.grad.abs().sum() > 0
    assert loss.shape == (3,)


# --- on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PEFT, FT, make("forecast-peft", **PARTS, freeze_bn=False)])
def test_a_task_is_saved_whole_and_loads_bit_for_bit(method, tmp_path):
    base = forecast_mae()
    result = adapted(method, base)
    result.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["one", "two"]
    for task in ("one", "two"):
        loaded = load_adapted(tmp_path / "out" / task, base)
        assert equal_bits(loaded.state_dict(), result.models[task, 0].state_dict())
        scene = batch_of(junctions(3, 9)).inputs
        with torch.no_grad():
            expected = result.models[task, 0].eval()(scene).trajectories
            assert torch.equal(loaded(scene).trajectories, expected)
    assert base.forecaster is None


def test_only_what_was_trained_is_written(tmp_path):
    import safetensors.torch

    result = adapted()
    result.save(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "one" / "forecast_peft.safetensors")
    assert set(tensors) == set(PEFT.trained_names(result.models["one", 0]))
    assert not list(tmp_path.rglob("model.safetensors"))


def test_another_base_and_a_spoilt_folder_are_refused(tmp_path):
    adapted().save(tmp_path)
    with pytest.raises(UserError, match="adapted from another base: its fingerprint is"):
        load_adapted(tmp_path / "one", forecast_mae(seed=1))
    with pytest.raises(UserError, match=r"forecast_peft\.json is missing"):
        load_adapted(tmp_path, forecast_mae())
    (tmp_path / "one" / "forecast_peft.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        load_adapted(tmp_path / "one", forecast_mae())
    file = tmp_path / "two" / "forecast_peft.json"
    record = json.loads(file.read_text())
    record["method"]["adapter_rank"] = 0
    file.write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=r"does not fit forecast_peft\.json: .*adapter.* is in only"
    ):
        load_adapted(tmp_path / "two", forecast_mae())


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modes": 0}, "modes must be a whole number not below 1, got 0"),
        ({"prompts": 0}, "prompts must be a whole number not below 1, got 0"),
        ({"adapter_rank": -1}, "adapter_rank must be a whole number not below 0, got -1"),
        ({"train": "some"}, "train must be one of parts, all; got 'some'"),
        ({"freeze_bn": 1}, "freeze_bn must be true or false, got 1"),
    ],
)
def test_bad_fields_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        make("forecast-peft", **fields)


def test_another_model_objective_or_a_second_adaptation_is_refused():
    with pytest.raises(UserError, match=r"expected a Forecast-MAE .* got Linear"):
        PEFT.learner(nn.Linear(1, 1), Forecast(**STEPS), ["one"], RUN)
    with pytest.raises(UserError, match="objective Forecast, got regression"):
        PEFT.learner(forecast_mae(), foretune.Regression(), ["one"], RUN)
    model = forecast_mae()
    add_head(model)
    with pytest.raises(UserError, match="already has a forecaster"):
        adapted(model=model)


def test_the_winner_is_the_mode_nearest_on_average_not_at_the_end():
    batch = batch_of(junctions(1, 3))
    truth = batch.inputs["future"][0, 0, :, :2]
    steady, late = truth + 1.0, truth + 5.0
    late[-1] = truth[-1]
    model = Fixed(torch.stack([late, steady]), torch.zeros(2))
    Forecast(**STEPS).losses(model, batch).sum().backward()
    assert [bool(g.abs().sum() > 0) for g in model.trajectories.grad] == [False, True]
