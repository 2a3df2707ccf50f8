"""The mean of the base's weights over the last updates."""

from __future__ import annotations

import pytest
import torch

import foretune
from foretune.errors import UserError
from foretune.run import Run
from foretune.training.learners.joint import Learner
from linear_tasks import Net, family

RUN = Run(steps=12, batch_size=4, eval_every=4, device="cpu", weight_decay=0.0)
METHODS = [
    foretune.Standard(learning_rate=0.02, average=0.5),
    foretune.PEFTML(learning_rate=0.02, lora={"r": 1}, average=0.5),
    foretune.Reptile(learning_rate=0.02, inner_steps=2, average=0.5),
    foretune.FOMAML(learning_rate=0.02, inner_steps=2, average=0.5),
]


def _weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_the_base_is_the_mean_of_its_last_states(method, monkeypatch):
    states: list[torch.Tensor] = []
    original = Learner.update

    def update(self, *args):
        losses = original(self, *args)
        states.append(_weights(self.model))
        return losses

    monkeypatch.setattr(Learner, "update", update)
    outcome = foretune.retrain(Net(), family(3), method, RUN)
    last = states[len(states) // 2 :]
    torch.testing.assert_close(_weights(outcome.model), torch.stack(last).mean(0))
    assert outcome.bank is None
    assert outcome.validation_score is not None


def test_the_rate_stays_at_its_height(monkeypatch):
    rates = []
    original = Learner.update

    def update(self, steps, run, rate, seed):
        rates.append(rate)
        return original(self, steps, run, rate, seed)

    monkeypatch.setattr(Learner, "update", update)
    foretune.retrain(Net(), family(3), METHODS[0], RUN.replace(warmup=0.25))
    assert rates[3:] == [1.0] * 9


def test_the_score_is_that_of_the_mean():
    outcome = foretune.retrain(Net(), family(3), METHODS[0], RUN)
    again = foretune.retrain(
        outcome.model, family(3), foretune.Standard(learning_rate=1e-12), RUN.replace(steps=1)
    )
    assert outcome.validation_score == pytest.approx(again.validation_score, rel=1e-5)


def test_killed_and_resumed_is_the_same_mean(tmp_path):
    class KilledError(Exception):
        pass

    def kill(step, *_):
        if step == 10:  # the last checkpoint is of step 8, with two states in the mean
            raise KilledError

    run = RUN.replace(out=tmp_path / "r")
    with pytest.raises(KilledError):
        foretune.retrain(Net(), family(3), METHODS[0], run, progress=kill)
    resumed = foretune.retrain(Net(), family(3), METHODS[0], run.replace(resume=True))
    undisturbed = foretune.retrain(Net(), family(3), METHODS[0], RUN)
    assert torch.equal(_weights(resumed.model), _weights(undisturbed.model))


@pytest.mark.parametrize("bad", [-0.1, 1.5, "half"])
def test_bad_shares_are_named(bad):
    for method in METHODS:
        with pytest.raises(UserError, match="average"):
            type(method)(average=bad)
