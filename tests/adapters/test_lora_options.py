"""Every option of LoRA by kind of layer and of target, against stock PEFT."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import foretune
import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.adapters.config import lora_fields
from foretune.adapters.peft_format import peft_tensors
from foretune.adapters.targets import matching_modules
from foretune.errors import UserError
from foretune.models.routing import route


class Block(nn.Module):
    """One layer of each kind that LoRA here adapts, and one of each kind that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv1D = transformers.Conv1D(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.dilated = nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.image = nn.Conv2d(8, 8, 1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.norm(x + self.conv1D(torch.tanh(self.linear(x))))
        y = self.conv(x.mT) + self.grouped(x.mT) + self.dilated(x.mT)
        return x + self.image(y[..., None])[..., 0].mT


class Mixed(nn.Module):
    """Two blocks between an embedding and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
        self.readout = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.body["layers"]:
            x = layer(x)
        return self.readout(x.mean(1))


def mixed(seed=0):
    torch.manual_seed(seed)
    return Mixed().double().eval()


ADAPTABLE = ["linear", "conv1D", "conv"]
TARGETS = {
    "list": ["linear", "conv1D", "conv"],
    "regex": r".*layers\.\d+\.(linear|conv1D|conv)",
    "all-linear": "all-linear",
    "full names": ["body.layers.0.linear", "body.layers.1.conv"],
    "None": None,
}
OPTIONS = {
    "plain": {},
    "r and alpha": {"r": 5, "lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "exclude list": {"exclude_modules": ["conv1D", "layers.0.linear"]},
    "exclude regex": {"exclude_modules": r".*\.0\..*"},
    "a layer": {"layers_to_transform": 0},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "two patterns": {"layers_to_transform": [0], "layers_pattern": ["layers", r"la.ers"]},
    "saved": {"modules_to_save": ["norm"]},
    "saved out": {"modules_to_save": ["readout"]},
}


def in_peft(model, lora):
    """The model wrapped by stock PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Conv1D beside Linear: PEFT says that it sees both
        return peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**lora)).eval()


def adapted_in(wrapped):
    names = [n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("targets", TARGETS)
def test_every_option_does_what_peft_does(targets, options):
    lora = {"r": 2, **OPTIONS[options]}
    if TARGETS[targets] is not None:
        lora["target_modules"] = TARGETS[targets]
    if isinstance(TARGETS[targets], str) and "layers_to_transform" in lora:
        with pytest.raises(ValueError, match="layers_to_transform"):
            peft.LoraConfig(**lora)
        with pytest.raises(UserError, match="layers_to_transform does not go with target_modules"):
            lora_fields(lora)
        return
    model = mixed()
    bank = AdapterBank(model, ["a", "b"], lora=lora_fields(lora)).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.3)
    in_stock = {**lora, "target_modules": TARGETS[targets] or [*ADAPTABLE, "readout"]}
    if targets == "None" and "layers_to_transform" in lora:  # it is in no layer
        in_stock["target_modules"] = ADAPTABLE
    wrapped = in_peft(model, in_stock)
    assert set(bank.layer_names) == adapted_in(wrapped)
    loaded = peft.set_peft_model_state_dict(wrapped, peft_tensors(bank, 1))
    assert not loaded.unexpected_keys
    assert not [k for k in loaded.missing_keys if "lora_" in k or "modules_to_save" in k]
    ids = torch.randint(0, 11, (4, 6))
    with torch.no_grad(), bank.attached(), route([1, 0, 1, 1]):
        output = model(ids)
    mine = torch.tensor([True, False, True, True])
    torch.testing.assert_close(output[mine], wrapped(ids)[mine], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", ["linear", "conv1D", "conv"])
def test_dropout_acts_on_every_kind_of_layer(layer):
    model = mixed().train()
    lora = {"r": 2, "lora_dropout": 0.9, "target_modules": [layer]}
    bank = AdapterBank(model, ["a"], lora=lora_fields(lora)).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_()
    ids = torch.randint(0, 11, (3, 6))
    with torch.no_grad(), bank.attached(), route([0, 0, 0]):
        first, second = model(ids), model(ids)
        model.eval()
        third, fourth = model(ids), model(ids)
    assert not first.equal(second)
    assert third.equal(fourth)


@pytest.mark.parametrize(
    "build",
    [tiny_models.gpt2, tiny_models.t5, tiny_models.vit, lambda: tiny_models.bert(num_labels=2)],
)
def test_all_linear_is_pefts_own(build):
    model = build()
    expected = adapted_in(in_peft(model, {"target_modules": "all-linear"}))
    assert set(matching_modules(model, {"target_modules": "all-linear"})) == expected


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["linear", "liner"]}, "no module matches target_modules='liner'"),
        (
            {"target_modules": ".*liner"},
            r"no module matches target_modules='\.\*liner'.*has: linear",
        ),
        ({"exclude_modules": ["liner"]}, "no module matches exclude_modules='liner'"),
        ({"exclude_modules": "liner"}, "no module matches exclude_modules='liner'"),
        ({"layers_to_transform": [0, 7]}, "names layer 7, .*; their layers are 0, 1"),
        ({"layers_to_transform": 0, "layers_pattern": "blocks"}, "it may be: layers"),
        ({"target_modules": ["norm"]}, "includes body.layers.0.norm, a LayerNorm"),
        ({"target_modules": ["embed"]}, "includes embed, a Embedding"),
        ({"target_modules": ["image"]}, "includes body.layers.0.image, a Conv2d"),
        ({"target_modules": ["grouped"]}, "includes body.layers.0.grouped, a grouped convolution"),
        ({"target_modules": ["dilated"]}, "a convolution with dilation"),
        ({"target_modules": "body.layers.*"}, "includes body.layers, a ModuleList"),
        ({"target_modules": ["linear"], "exclude_modules": ["linear"]}, "outside exclude_modules"),
        ({"modules_to_save": ["nrm"]}, "no module 'nrm' to copy .*the model has: embed"),
        ({"modules_to_save": ["body"]}, "body, a ModuleDict, which is never called"),
        ({"modules_to_save": ["layers.0", "norm"]}, "a module that contains it"),
    ],
)
def test_what_matches_nothing_or_cannot_be_adapted_is_refused(lora, message):
    with pytest.raises(UserError, match=message):
        AdapterBank(mixed(), ["a"], lora=lora_fields(lora))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": "("}, r"target_modules '\(' is not a regular expression: missing \)"),
        ({"exclude_modules": "("}, "is not a regular expression"),
        ({"layers_pattern": "(", "layers_to_transform": 0}, "is not a regular expression"),
        ({"layers_pattern": "layers"}, "give layers_to_transform too"),
        ({"target_modules": 5}, "must be a list of names or a regular expression, got 5"),
        ({"target_modules": [5]}, r"must be a list of names .*, got \[5\]"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"exclude_modules": {"a": 1}}, "must be a list of names"),
        ({"modules_to_save": "out"}, "modules_to_save must be a list of names, got 'out'"),
        ({"layers_to_transform": "0"}, "must be a layer's number from 0"),
        ({"layers_to_transform": [-1]}, "must be a layer's number from 0"),
        ({"layers_to_transform": [True]}, "must be a layer's number from 0"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number above 0, got inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0, got nan"),
        ({"lora_dropout": float("nan")}, "lora_dropout must be at least 0"),
        ({"rank_pattern": {"linear": 4}}, '"rank_pattern" is not supported'),
    ],
)
def test_wrong_values_are_refused_before_a_model_is_there(lora, message):
    with pytest.raises(UserError, match=message):
        foretune.LoRA(lora=lora)


def test_saved_modules_start_from_the_base_where_heads_are_fresh():
    model = mixed()
    lora = {"r": 2, "modules_to_save": ["norm", "readout"]}
    bank = AdapterBank(model, ["a"], lora=lora, heads=["readout"], fresh_heads=True)
    assert bank.head_names == ("readout", "body.layers.0.norm", "body.layers.1.norm")
    assert bank.head_state("body.layers.0.norm", 0)["weight"].equal(
        model.body["layers"][0].norm.weight
    )
    assert not bank.head_state("readout", 0)["weight"].equal(model.readout.weight)


def test_defaults_leave_out_what_cannot_be_adapted():
    names = AdapterBank(mixed(), ["a"], lora={"r": 2}).layer_names
    assert {name.rsplit(".", 1)[-1] for name in names} == {"linear", "conv1D", "conv", "readout"}


class Router(nn.Linear):
    """Returns a pair, as Llama 4's router does."""

    def forward(self, x):
        return super().forward(x), x


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_defaults_leave_out_routers_but_not_every_subclass():
    model = nn.ModuleDict(
        {"router": Router(4, 2), "scaled": Scaled(4, 4), "plain": nn.Linear(4, 4)}
    )
    for targets in (None, "all-linear"):
        bank = AdapterBank(model, ["a"], lora={"r": 2, "target_modules": targets})
        assert bank.layer_names == ["scaled", "plain"]


def test_an_adapted_convolution_in_bfloat16_keeps_the_dtype():
    model = nn.Sequential(nn.Conv1d(2, 4, 3)).bfloat16()
    bank = AdapterBank(model, ["a"], lora={"r": 2})
    with bank.attached(), route([0, 0, 0]):
        assert model(torch.randn(3, 2, 10).bfloat16()).dtype == torch.bfloat16
