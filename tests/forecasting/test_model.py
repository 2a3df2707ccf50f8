"""Forecast-MAE and what makes it forecast: the numbers and invariances that must hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from forecasting.tiny_scenes import PARTS, STEPS, batch_of, forecast_mae
from foretune.errors import UserError
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.encoders import Conv3, NeighbourAttention
from foretune.forecasting.forecasters import add_head, add_prompts, load_forecast_mae
from foretune.forecasting.junctions import junctions
from foretune.forecasting.model import ForecastMAE, save_forecast_mae
from foretune.forecasting.pretraining import SceneReconstruction
from linear_tasks import copy_of, equal_bits

ROWS = junctions(5, 11)


def count(model):
    return sum(p.numel() for p in model.parameters())


def prompted(seed=0, *, trained=True, **changes):
    model = forecast_mae(seed)
    add_prompts(model, **{**PARTS, **changes})
    if trained:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "adapter" in name or "prompt" in name:
                    p.add_(0.3 * torch.randn(p.shape))
    return model.eval()


def close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- counts -------------------------------------------------------------------------------------


def test_parameters_are_as_many_as_in_the_released_models():
    model = ForecastMAE(ForecastMAEConfig())
    add_prompts(model)
    assert count(model) == 2_784_933
    parts = dict.fromkeys(("adapter", "prompt_mode", "prompt_scene", "prompt_score"), 0)
    for name, p in model.named_parameters():
        for part in parts:
            parts[part] += p.numel() if part in name else 0
    assert parts == {
        "adapter": 16 * (2 * 128 * 64 + 64 + 128),
        "prompt_mode": 6 * 50 * 128,
        "prompt_scene": 4 * 50 * 128,
        "prompt_score": 129,
    }
    baseline = ForecastMAE(ForecastMAEConfig())
    add_head(baseline)
    assert count(baseline) == 1_923_357


# --- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "kernel"), [(9, 3), (10, 5), (2, 5)])
def test_neighbourhood_attention_is_its_own_statement(length, kernel):
    torch.manual_seed(0)
    layer = NeighbourAttention(8, 2, kernel)
    x = torch.randn(3, length, 8)
    q, k, v = layer.qkv(x).view(3, length, 3, 2, 4).unbind(2)
    out = torch.zeros(3, length, 2, 4)
    for i in range(length):
        first = min(max(i - kernel // 2, 0), max(length - kernel, 0))
        near = range(first, min(first + kernel, length))
        for head in range(2):
            logits = torch.stack(
                [
                    (q[:, i, head] * k[:, j, head]).sum(-1) / 2
                    + layer.rpb[head, j - i + kernel - 1]
                    for j in near
                ],
                -1,
            )
            weights = logits.softmax(-1)
            out[:, i, head] = sum(weights[:, n, None] * v[:, j, head] for n, j in enumerate(near))
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_torchs_own(stride):
    layer, x = Conv3(3, 5, stride), torch.randn(2, 9, 3)
    torch.testing.assert_close(
        layer(x),
        F.conv1d(x.mT, layer.weight, layer.bias, stride=stride, padding=1).mT,
        rtol=1e-5,
        atol=1e-6,
    )


# --- the oracles --------------------------------------------------------------------------------


def test_fresh_adapters_change_no_bit():
    scene = batch_of(ROWS).inputs
    torch.manual_seed(3)
    bare = prompted(adapter_rank=0, trained=False)
    with_them = prompted(trained=False)
    with_them.load_state_dict(bare.state_dict(), strict=False)
    assert any("adapter" in name for name, _ in with_them.named_parameters())
    for a, b in zip(bare(scene)[:2], with_them(scene)[:2], strict=True):
        assert torch.equal(a, b)


def test_fresh_adapters_get_a_gradient_beyond_the_last_bias():
    model = prompted(trained=False)
    model(batch_of(ROWS).inputs).trajectories.square().sum().backward()
    for block in (*model.blocks, *model.decoder_blocks):
        for adapter in (block.adapter_attn, block.adapter_mlp):
            assert adapter.up.weight.grad.abs().sum() > 0


def test_without_prompts_a_forecast_is_the_pretext_task():
    scene = dict(batch_of(ROWS).inputs)
    scene["keep_history"] = torch.ones_like(scene["keep_history"])
    scene["keep_future"] = torch.zeros_like(scene["keep_future"])
    scene["keep_lane"] = torch.ones_like(scene["keep_lane"])
    model = forecast_mae()
    expected = model.reconstruct(scene).future[:, 0]
    add_prompts(model, modes=1, prompts=0, adapter_rank=2)
    trajectories = model(scene).trajectories
    torch.testing.assert_close(trajectories[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_order_of_a_layers_prompts_does_not_matter():
    scene, model = batch_of(ROWS).inputs, prompted()
    before = model(scene)[:2]
    with torch.no_grad():
        model.forecaster.prompt_scene.copy_(model.forecaster.prompt_scene.flip(1))
    close(model(scene)[:2], before)
    with torch.no_grad():  # but it matters which layer they are in
        model.forecaster.prompt_scene.copy_(model.forecaster.prompt_scene.flip(0))
    assert (model(scene).trajectories - before[0]).abs().max() > 1e-4


def test_permuting_the_modes_permutes_the_forecasts():
    scene, model = batch_of(ROWS).inputs, prompted()
    before = model(scene)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        model.forecaster.prompt_mode.copy_(model.forecaster.prompt_mode[order])
    close(model(scene)[:2], (before.trajectories[:, order], before.scores[:, order]))
    assert (before.trajectories[:, 0] - before.trajectories[:, 1]).abs().max() > 1e-3


def test_all_modes_at_once_are_one_after_the_other():
    scene, model = batch_of(ROWS).inputs, prompted()
    together = model(scene)
    prompts = model.forecaster.prompt_mode.data
    for k in range(3):
        model.forecaster.prompt_mode.data = prompts[k : k + 1]
        alone = model(scene)
        close((alone.trajectories[:, 0], alone.scores[:, 0]), [p[:, k] for p in together[:2]])


def padded(scene, agents=2, lanes=3):
    """Rubbish beyond the end of every scene."""
    out = {}
    for name, value in scene.items():
        more = lanes if "lane" in name else agents
        shape = (len(value), more, *value.shape[2:])
        rubbish = torch.zeros(shape, dtype=value.dtype) if "present" in name else None
        if rubbish is None:
            rubbish = (9 * torch.rand(shape)).to(value.dtype)
            rubbish = rubbish % 4 if name == "kind" else rubbish
        out[name] = torch.cat([value, rubbish], 1)
    return out


@pytest.mark.parametrize("kind", ["prompts", "head", "pretext"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(kind, training):
    scene = batch_of(ROWS).inputs
    model = prompted() if kind == "prompts" else forecast_mae(drop_path=0.0)
    for module in model.modules():
        if hasattr(module, "rate"):
            module.rate = 0.0
    if kind == "head":
        add_head(model, modes=3)
    model.train(training)
    plain, wide = model(scene), model(padded(scene))
    for a, b in zip(plain, wide, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b[:, : a.shape[1]], rtol=1e-5, atol=2e-6)


def test_scenes_without_lanes_and_scenes_of_one_agent_are_forecast():
    bare = [
        {**row, "agents": row["agents"][:1], "kinds": [0], "lanes": np.zeros((0, 1, 2))}
        for row in ROWS
    ]
    assert prompted()(batch_of(bare).inputs).trajectories.isfinite().all()
    head = forecast_mae()
    add_head(head)
    forecasts = head(batch_of(bare).inputs)
    assert forecasts.trajectories.isfinite().all() and forecasts.others.shape[1] == 0
    assert SceneReconstruction(**STEPS).losses(forecast_mae(), batch_of(bare)).isfinite().all()


def test_hidden_tokens_are_not_read():
    batch, model = batch_of(ROWS), forecast_mae()
    scene = dict(batch.inputs)
    before = model.reconstruct(scene)
    hidden = ~scene["keep_history"]
    scene["history"] = torch.where(hidden[..., None, None], 7.0, scene["history"])
    hidden = ~scene["keep_future"]
    changed = scene["future"].clone()
    changed[..., :2] = torch.where(hidden[..., None, None], 7.0, changed[..., :2])
    scene["future"] = changed
    # The lanes' batch norm is in eval mode, so that a lane is its own affair.
    scene["lanes"] = torch.where(~scene["keep_lane"][..., None, None], 7.0, scene["lanes"])
    close(model.reconstruct(scene), before)


def test_a_forecast_does_not_read_the_future():
    scene, model = dict(batch_of(ROWS).inputs), prompted()
    before = model(scene)[:2]
    scene["future"] = torch.zeros_like(scene["future"])
    close(model(scene)[:2], before)


def test_drop_path_leaves_eval_alone_and_keeps_the_mean():
    from foretune.forecasting.encoders import DropPath

    layer, x = DropPath(0.25), torch.ones(20_000, 1)
    assert torch.equal(layer.eval()(x), x)
    dropped = layer.train()(x)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert dropped.mean() == pytest.approx(1, abs=0.02)


# --- on disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "prompts", "head"])
def test_a_saved_model_is_the_same_model(kind, tmp_path):
    model = forecast_mae()
    if kind == "prompts":
        model = prompted()
    elif kind == "head":
        add_head(model, modes=2)
    folder = save_forecast_mae(model, tmp_path / "m")
    assert sorted(p.name for p in folder.iterdir()) == [
        ".foretune",
        "config.json",
        "model.safetensors",
    ]
    loaded = load_forecast_mae(folder)
    assert equal_bits(loaded.state_dict(), model.state_dict())
    scene = batch_of(ROWS).inputs
    assert all(
        torch.equal(a, b) for a, b in zip(loaded(scene), model(scene), strict=True) if a is not None
    )
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_that_is_no_forecast_mae_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no Forecast-MAE: it lacks config\.json"):
        load_forecast_mae(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="its architecture is None"):
        load_forecast_mae(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_forecast_mae(tmp_path)
    save_forecast_mae(forecast_mae(), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["sizes"]["width"] = 32
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not fit the files beside it: .* has shape"):
        load_forecast_mae(tmp_path / "m")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 20}, "width must be a multiple of 8 and of num_heads 8, got 20"),
        ({"width": 0}, "width must be a whole number not below 1, got 0"),
        ({"num_heads": 3}, "num_heads 3"),
        ({"drop_path": 2}, "drop_path is a share"),
        ({"history_steps": 1}, "history_steps must be a whole number not below 2, got 1"),
        ({"lane_points": 1.5}, "lane_points must be a whole number"),
    ],
)
def test_bad_sizes_are_refused_by_name(fields, message):
    with pytest.raises(UserError, match=message):
        ForecastMAEConfig(**fields)


def test_a_second_forecaster_is_refused_and_a_pretrained_model_cannot_forecast():
    model = forecast_mae()
    with pytest.raises(UserError, match="only pretrained and cannot forecast yet"):
        model.forecast({})
    add_head(model)
    before = copy_of(model)
    for add in (add_head, add_prompts):
        with pytest.raises(UserError, match="already has a forecaster"):
            add(model)
    assert equal_bits(model.state_dict(), before)
    with pytest.raises(UserError, match=r"expected a Forecast-MAE .* got Linear"):
        add_prompts(torch.nn.Linear(1, 1))
