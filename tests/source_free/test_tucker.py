"""Layers in Tucker form against the layers that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import tiny_models
from foretune.errors import UserError
from foretune.source_free.time_series_cnn import TimeSeriesCNN
from foretune.source_free.tucker import (
    TuckerLayer,
    core_parameters,
    count_macs,
    merge,
    tucker_layers,
    tuckerize,
)

LAYERS = {
    "conv1d": (nn.Conv1d(9, 12, 5, padding=2), (2, 9, 16)),
    "conv1d-strided": (nn.Conv1d(9, 12, 8, stride=3, padding=4, bias=False), (2, 9, 33)),
    "conv1d-dilated": (nn.Conv1d(4, 6, 3, dilation=2, padding="same"), (2, 4, 10)),
    "conv2d": (nn.Conv2d(4, 8, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 4, 9, 8)),
    "linear": (nn.Linear(10, 7), (2, 3, 10)),
    "linear-no-bias": (nn.Linear(6, 9, bias=False), (4, 6)),
    "transposed": (Conv1D(7, 10), (2, 3, 10)),
}


@pytest.fixture(params=LAYERS, name="case")
def _case(request):
    layer, shape = LAYERS[request.param]
    return layer, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def channels(layer):
    out, inner = layer.weight.shape[:2]
    return (inner, out) if isinstance(layer, Conv1D) else (out, inner)


@torch.no_grad()
def test_full_rank_gives_the_layer_s_output(case):
    layer, x = case
    torch.testing.assert_close(TuckerLayer(layer, channels(layer))(x), layer(x), atol=4e-6, rtol=0)


@torch.no_grad()
def test_merged_layer_is_plain_and_computes_the_same(case):
    layer, x = case
    tucker = TuckerLayer(layer, (3, 2))
    plain = tucker.merge()
    assert type(plain) is (nn.Linear if isinstance(layer, Conv1D) else type(layer))
    torch.testing.assert_close(plain(x), tucker(x), atol=2e-6, rtol=1e-5)
    for name in ("stride", "padding", "dilation"):
        assert getattr(plain, name, None) == getattr(layer, name, None)


def test_macs_equal_half_the_flops_that_torch_counts(case):
    layer, x = case
    if isinstance(layer, Conv1D):
        pytest.skip("torch counts its bias as a product")
    for module in (layer, TuckerLayer(layer, (3, 2))):
        model = nn.Sequential(module)
        with FlopCounterMode(display=False) as counter:
            model(x)
        assert sum(count_macs(model, x).values()) == counter.get_total_flops() / 2


def test_macs_follow_the_formula():
    conv = nn.Conv1d(9, 12, 5, stride=2, padding=2)
    macs = count_macs(nn.Sequential(TuckerLayer(conv, (4, 3))), torch.zeros(1, 9, 32))["0"]
    assert macs == 32 * 9 * 3 + 16 * 5 * 3 * 4 + 16 * 4 * 12


@pytest.mark.parametrize(
    ("factor", "tuned", "macs"),
    [(2, 50_592, 3_924_096), (4, 13_008, 1_410_176), (8, 3_432, 571_008)],
)
def test_sizes_of_the_har_backbone(factor, tuned, macs):
    model, x = TimeSeriesCNN(9, 6), torch.zeros(1, 9, 128)

    def convolutions(m):
        return sum(n for name, n in count_macs(m, x).items() if name != "head")

    assert convolutions(model) == 9_281_536
    ranks = tuckerize(model, rank_factor=factor)
    assert sum(p.numel() for p in core_parameters(model).values()) == tuned
    assert tuned == sum(k * o * i for (o, i), k in zip(ranks.values(), (5, 8, 8), strict=True))
    assert convolutions(model) == macs


def test_the_first_convolution_keeps_the_rank_of_the_data():
    model = TimeSeriesCNN(9, 6, mid=8, features=16)
    assert tuckerize(model, rank_factor=4)["blocks.0.0"] == (2, 9)


def test_groups_and_other_padding_are_left_alone_and_one_channel_is_not_factored():
    model = nn.Sequential(
        nn.Conv1d(1, 8, 3),
        nn.Conv1d(8, 8, 3, groups=8),
        nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Linear(6, 2),
    )
    x = torch.randn(2, 1, 10)
    before = model(x)
    assert tuckerize(model, ranks={"0": (8, 1)}) == {"0": (3, None)}
    assert list(tucker_layers(model)) == ["0"]
    torch.testing.assert_close(model(x), before, atol=2e-6, rtol=0)
    with pytest.raises(UserError, match="has no layer to factor"):
        tuckerize(model, ranks={"1": (2, 2)})


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2", "gpt2"])
def test_families_of_transformers_come_through_at_full_rank(family):
    if not hasattr(tiny_models, family):
        pytest.skip(f"no tiny {family}")
    model = getattr(tiny_models, family)()
    ids = torch.randint(4, tiny_models.VOCABULARY, (2, 6))
    before = model(ids)[0]
    factored = copy.deepcopy(model)
    ranks = tuckerize(factored, rank_factor=1)
    assert len(ranks) > 4
    torch.testing.assert_close(factored(ids)[0], before, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(merge(factored)(ids)[0], before, atol=2e-5, rtol=1e-4)
    assert {type(m) for m in merge(factored).modules()} <= {
        nn.Linear if t is Conv1D else t for t in {type(m) for m in model.modules()}
    } | {nn.Linear, Conv1D}


def test_energy_chooses_ranks():
    model = TimeSeriesCNN(9, 6, mid=8, features=16)
    few, many = (tuckerize(copy.deepcopy(model), energy=e) for e in (0.5, 0.99))
    assert all(a <= b for k in few for a, b in zip(few[k], many[k], strict=True)) and few != many
    with torch.no_grad():
        for name, layer in tucker_layers(model).items():
            assert layer.error**2 <= 2 * 0.01 + 1e-6, name


def test_merge_leaves_the_model_alone_and_keeps_training_mode():
    model = TimeSeriesCNN(3, 2, mid=4, features=8).train()
    tuckerize(model, rank_factor=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = merge(model)
    assert not tucker_layers(plain) and all(m.training for m in plain.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give exactly one of rank_factor, ranks and energy"),
        ({"rank_factor": 2, "energy": 0.9}, "give exactly one of"),
        ({"rank_factor": 0}, "rank_factor must be a whole number not below 1, got 0"),
        ({"energy": 1.5}, "energy must be above 0 and at most 1, got 1.5"),
        ({"rank_factor": 2, "layers": "conv"}, "layers must be one of all"),
        ({"rank_factor": 2, "layers": "linear"}, "has no layer to factor"),
        ({"ranks": {"blocks.0.1": (2, 2)}}, r'ranks names "blocks.0.1".*Did you mean'),
    ],
)
def test_what_cannot_be_done_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tuckerize(TimeSeriesCNN(9, 6), **fields)
