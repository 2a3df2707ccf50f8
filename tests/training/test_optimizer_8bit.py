"""AdamW with a state of 8 bits: near the usual one, resumable, refused without its library."""

from __future__ import annotations

import sys

import pytest
import torch

import foretune
import tiny_models
from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.objectives.regression import Regression
from foretune.training.learners.joint import Learner
from foretune.training.optim import make_adamw
from linear_tasks import Net, family


def _learner(model, optimizer):
    learner = Learner(model, Regression(), learning_rate=1e-3)
    learner.start(Run(optimizer=optimizer, device="cpu"))
    return learner


def test_it_stays_near_the_usual_one_in_a_quarter_of_the_memory():
    pytest.importorskip("bitsandbytes")
    by_kind = {}
    for kind in ("adamw", "adamw-8bit"):
        p = torch.nn.Parameter(torch.zeros(64, 256))
        optimizer = make_adamw([p], 1e-2, 0.0, kind)
        generator = torch.Generator().manual_seed(0)
        drift = torch.randn(p.shape, generator=generator)
        for _ in range(20):
            p.grad = drift + 0.1 * torch.randn(p.shape, generator=generator)
            optimizer.step()
        size = sum(
            v.numel() * v.element_size()
            for v in optimizer.state[p].values()
            if torch.is_tensor(v) and v.numel() > 256
        )
        by_kind[kind] = (p.detach(), size)
    usual, eight = by_kind["adamw"], by_kind["adamw-8bit"]
    assert eight[1] < 0.3 * usual[1]
    assert (eight[0] - usual[0]).norm() < 0.05 * usual[0].norm()


def test_its_state_is_saved_and_taken_back():
    pytest.importorskip("bitsandbytes")

    def step(learner, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in learner.base:
            p.grad = torch.randn(p.shape, generator=generator)
        learner.base_optimizer.step()

    model = tiny_models.bert(intermediate_size=512)
    first = _learner(model, "adamw-8bit")
    step(first, 0)
    saved = {k: v.clone() for k, v in first.state(optimizers=True).items()}
    step(first, 1)
    second = _learner(tiny_models.bert(intermediate_size=512, seed=5), "adamw-8bit")
    step(second, 7)  # fills the state with something else
    second.load_state(saved)
    step(second, 1)
    for a, b in zip(first.base, second.base, strict=True):
        assert torch.equal(a, b)


def test_a_run_uses_it():
    pytest.importorskip("bitsandbytes")
    run = Run(steps=2, batch_size=2, device="cpu", optimizer="adamw-8bit")
    outcome = foretune.retrain(Net(), family(2), foretune.PEFTML(lora={"r": 2}), run)
    assert outcome.record()["run"]["optimizer"] == "adamw-8bit"


def test_without_its_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="foretune\\[quant\\]"):
        _learner(Net(), "adamw-8bit")
