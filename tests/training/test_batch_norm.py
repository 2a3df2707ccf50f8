"""Batch norms: what several tasks share in one step must not be their batch statistics."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import foretune
from foretune import Classification, Run, Task, TaskCollection
from foretune.models.surgery import batch_norms

RUN = Run(steps=4, batch_size=6, eval_every=2, device="cpu")
LORA = {"r": 2, "lora_alpha": 4}


class WindowNet(nn.Module):
    """A convolution with batch normalisation and a head."""

    head_modules = ("head",)

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(3, 8, 5, padding=2, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.norm(self.convolution(x)).relu().mean(2)).relu())


def tasks(*names):
    """Windows whose level differs greatly from task to task."""
    windows = []
    for name in names:
        rng = np.random.default_rng(list(name.encode()))
        level = 5 * rng.normal()
        rows = [
            {"x": (level + (i % 3) + rng.normal(size=(3, 24))).astype("f4"), "y": "abc"[i % 3]}
            for i in range(18)
        ]
        windows.append(Task(name, rows[:9], rows[9:12], rows[12:]))
    collection = TaskCollection(tuple(windows))
    return collection.with_objective(Classification().fit(collection))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = WindowNet()
    method = foretune.Standard(learning_rate=1e-2)
    return foretune.retrain(model, tasks("far", "near"), method, RUN).model.eval()


def statistics(model):
    return torch.cat([norm.running_mean for norm in batch_norms(model).values()])


def test_an_adapter_does_not_depend_on_who_shares_the_step(base):
    lora = foretune.LoRA(lora=LORA, learning_rate=1e-2)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    alone = foretune.adapt(base, tasks("one"), lora, RUN)
    together = foretune.adapt(base, tasks("two", "one", "three"), lora, RUN)
    assert alone.tensors["one", 0]
    for name, tensor in alone.tensors["one", 0].items():
        torch.testing.assert_close(together.tensors["one", 0][name], tensor, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert together.scores["one", 0] == pytest.approx(alone.scores["one", 0])


@pytest.mark.parametrize(
    ("method", "stay"),
    [
        (foretune.PEFTML(lora=LORA), True),
        (foretune.FOMAML(inner="adapter", lora=LORA, inner_steps=2), True),
        (foretune.Standard(), False),
    ],
    ids=["peft-ml", "episodes", "standard"],
)
def test_statistics_stay_where_each_task_has_an_adapter(base, method, stay):
    """Also after a validation in between, which calls `train()` on the whole model."""
    retrained = foretune.retrain(base, tasks("one", "two"), method, RUN).model
    assert torch.equal(statistics(retrained), statistics(base)) == stay


def test_statistics_of_instances_stay_too(base):
    model = copy.deepcopy(base)
    model.norm = nn.InstanceNorm1d(8, track_running_stats=True)
    method = foretune.PEFTML(lora=LORA)
    retrained = foretune.retrain(model, tasks("one", "two"), method, RUN).model
    assert torch.equal(retrained.norm.running_mean, model.norm.running_mean)
