"""The shallow network: gradients, trials that do not touch one another, and who is better."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from foretune.theory import shallow
from foretune.theory.shallow import Network, Trials

RESULT = Path(__file__).resolve().parents[2] / "benchmarks/results/theory-shallow.json"


@cache
def trials() -> Trials:
    return shallow.draw_trials(range(3), d=5, num_examples=300, num_held_out=1000)


def held_out(base: Network, rank: int = 1, epochs: int = 1500) -> torch.Tensor:
    predict = shallow.adapt(base, trials().shots, range(3), rank, epochs)
    return ((predict(trials().held_out.x) - trials().held_out.y) ** 2).mean((1, 2))


@pytest.mark.parametrize("adapted", [True, False])
def test_gradients_are_those_of_the_forward(adapted: bool) -> None:
    torch.manual_seed(0)
    data = shallow.draw_trials(range(2), d=4, num_examples=20, num_held_out=5).seen
    network = Network(torch.randn(2, 4, 4), torch.randn(2, 4))
    adapters = (torch.randn(2, 3, 4, 2), torch.randn(2, 3, 2, 4)) if adapted else None
    leaves = [network.weight, network.head, *(adapters or ())]
    for leaf in leaves:
        leaf.requires_grad_()
    output = shallow.forward(network, data.x, *(adapters or ()))
    loss = ((output - data.y) ** 2).mean(-1).sum()
    automatic = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        by_hand = shallow.gradients(network, adapters, data)
    for expected, gradient in zip(automatic, by_hand, strict=False):
        assert torch.allclose(expected, gradient, rtol=1e-4, atol=1e-6)


def test_forward_is_the_network_of_the_paper() -> None:
    data = trials().seen
    network = shallow.fresh_network(range(3), 5)
    up, down = torch.randn(3, 3, 5, 1), torch.randn(3, 3, 1, 5)
    x = data.x[1, 2, :, 7]
    expected = network.head[1] @ torch.sigmoid((network.weight[1] + up[1, 2] @ down[1, 2]) @ x)
    assert torch.allclose(shallow.forward(network, data.x, up, down)[1, 2, 7], expected, atol=1e-6)


def test_trials_do_not_touch_one_another() -> None:
    alone = shallow.draw_trials([2], d=5, num_examples=300, num_held_out=1000)
    assert torch.equal(alone.seen.y[0], trials().seen.y[2])
    single, batch = (shallow.peft_ml(t, 1, 30) for t in (alone, trials()))
    assert torch.allclose(single.weight[0], batch.weight[2], atol=1e-5)


def test_adapting_leaves_the_base_alone() -> None:
    base = shallow.fresh_network(range(3), 5)
    before = base.weight.clone(), base.head.clone()
    held_out(base, epochs=5)
    assert torch.equal(base.weight, before[0])
    assert torch.equal(base.head, before[1])


def test_retraining_is_better_than_nothing() -> None:
    none = held_out(shallow.fresh_network(range(3), 5))
    assert (held_out(shallow.standard(trials(), 1500)) < none / 2).all()
    assert (held_out(shallow.peft_ml(trials(), 1, 1500)) < none / 2).all()


def test_committed_result_has_peft_ml_below_standard() -> None:
    rows = json.loads(RESULT.read_text("utf-8"))["panels"]["error"]["rows"]
    [row] = [row for row in rows if (row["d"], row["T"]) == (10, 3)]
    means = {name: np.median(row["held_out"][name]) for name in ("peft-ml", "standard", "none")}
    assert means["peft-ml"] < means["standard"] < means["none"]


def test_adapters_that_learn_nothing_give_standard_retraining(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the comparison would say if the adapters were dropped from the forward."""
    zeros = torch.zeros(3, 3, 5, 1), torch.zeros(3, 3, 1, 5)
    monkeypatch.setattr(shallow, "fresh_adapters", lambda *_: zeros)
    broken, standard = shallow.peft_ml(trials(), 1, 200), shallow.standard(trials(), 200)
    assert torch.allclose(broken.weight, standard.weight, atol=1e-4)
