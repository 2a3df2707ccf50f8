"""What lies between PEFT-ML and its controls: penalty, dropout, restarts, interpolation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foretune
from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.models.routing import route
from foretune.run import Run
from linear_tasks import Net, family

LORA = {"r": 2, "lora_alpha": 3}
RATES = {"learning_rate": 0.02, "adapter_learning_rate": 0.05, "lora": LORA}
RUN = Run(batch_size=4, steps=8, eval_every=0, device="cpu", weight_decay=0.1)


def _base(steps=8, **fields):
    run = RUN.replace(steps=steps)
    outcome = foretune.retrain(Net(), family(3), foretune.PEFTML(**RATES, **fields), run)
    return [p.detach() for p in outcome.model.parameters()], outcome.bank


def _distance(a, b) -> float:
    return sum(float((x - y).norm() ** 2) for x, y in zip(a, b, strict=True)) ** 0.5


def _products(bank) -> float:
    """The mean size of what the adapters add."""
    norms = [
        (b @ a).norm().item()
        for name in bank.layer_names
        for a, b in (bank.factors(name, slot) for slot in range(3))
    ]
    return sum(norms) / len(norms)


@pytest.mark.parametrize("present", [[0, 1, 2], [1], [0, 2]])
@pytest.mark.parametrize("module", [nn.Linear(5, 4), nn.Conv1d(5, 4, 3)])
def test_gradient_of_the_penalty(module, present):
    model = nn.Sequential(module)
    bank = AdapterBank(model, ["a", "b", "c"], lora={**LORA, "target_modules": ["0"]})
    for p in bank.parameters():
        nn.init.normal_(p)
        p.grad = torch.ones_like(p)
    factors = [[f.detach().requires_grad_() for f in bank.factors("0", slot)] for slot in present]
    scale = LORA["lora_alpha"] / LORA["r"]
    loss = 0.7 * sum(((scale * b.flatten(1) @ a.flatten(1)) ** 2).sum() for a, b in factors)
    loss.backward()
    bank.add_penalty(present, 0.7)
    by_slot = dict(zip(present, factors, strict=True))
    for slot in range(3):
        grads = _grads(bank, slot)
        for grad, factor in zip(grads, by_slot.get(slot, (None, None)), strict=True):
            extra = 0 if factor is None else factor.grad
            torch.testing.assert_close(grad, torch.ones_like(grad) + extra, rtol=1e-4, atol=1e-4)


def _grads(bank, slot):
    """The gradients in the shapes of `bank.factors`."""
    layer = bank._layer("0")
    if layer.is_conv:
        return layer.a.grad[slot], layer.b.grad[slot][..., None]
    return layer.a.grad[slot], layer.b.grad[slot].T


def test_a_great_penalty_is_a_bare_base():
    plain, bank = _base(steps=80)
    held, small = _base(steps=80, penalty=1e4)
    bare, unused = _base(steps=80, adapter_dropout=1.0)
    assert _products(small) < 0.02 * _products(bank)
    assert _products(unused) == 0
    assert _distance(held, bare) < 0.2 * _distance(plain, bare)


def test_without_its_adapters_peft_ml_is_a_plain_loop():
    tasks, net = family(3), Net()
    weights, _ = _base(adapter_dropout=1.0)
    from foretune.training.data import TaskData, sampler_for
    from foretune.training.loop import schedule

    data = TaskData.of(tasks, tasks.objective)
    sampler = sampler_for(data, RUN, pooled=foretune.PEFTML().pooled)
    adamw = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    for step in range(RUN.steps):
        rows = [(s, data.slots[s].train[i]) for s, i in sampler.picks(step)]
        x, y = (torch.stack([torch.tensor(r[k]) for _, r in rows]) for k in ("x", "y"))
        adamw.zero_grad()
        ((net(x) - y) ** 2).sum(1).mean().backward()  # equal numbers of rows
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adamw.param_groups[0]["lr"] = 0.02 * schedule(RUN, step / RUN.steps)
        adamw.step()
    for a, b in zip(weights, net.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_always_fresh_is_none():
    """B is zero in a fresh adapter, so the base cannot tell it from no adapter."""
    for a, b in zip(_base(restart_every=1)[0], _base(adapter_dropout=1.0)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_restarts_take_the_optimiser_along():
    tasks = family(3)
    method = foretune.PEFTML(**RATES, restart_every=4)
    seen: list[set[int]] = []
    original = foretune.training.optim.SlotAdamW.forget

    def forget(self, slots):
        original(self, slots)
        seen.append(set(slots))
        for state in self.state.values():
            assert not any(value[list(slots)].any() for value in state.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foretune.training.optim.SlotAdamW, "forget", forget)
        foretune.retrain(Net(), tasks, method, RUN.replace(steps=40))
    together = [len(slots) for slots in seen]
    assert 0.1 < sum(together) / 120 < 0.45  # one in four
    assert together.count(1) > 0 and together.count(3) < 10  # not all tasks at once


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_interpolation_lies_on_the_line(share):
    start = [p.detach() for p in Net().parameters()]
    end, _ = _base()
    weights, bank = _base(interpolate=share)
    for a, b, p in zip(start, end, weights, strict=True):
        torch.testing.assert_close(p, a + share * (b - a), rtol=1e-5, atol=1e-7)
    assert (bank is not None) == (share == 1)
    same = foretune.Standard(learning_rate=0.02, interpolate=share)
    outcome = foretune.retrain(Net(), family(3), same, RUN.replace(eval_every=5))
    assert (outcome.validation_score is None) == (share != 1)  # that was of another base
    if share == 0:
        assert _distance([p.detach() for p in outcome.model.parameters()], start) == 0


def test_the_network_itself_is_routed_again_after_a_bare_step():
    net = Net()
    bank = AdapterBank(net, ["a"], lora=LORA)
    for p in bank.parameters():
        nn.init.normal_(p)
    x = torch.ones(1, 4)
    with bank.attached(), route([0]):
        adapted = net(x)
        with bank.bare():
            torch.testing.assert_close(net(x), Net()(x))
        torch.testing.assert_close(net(x), adapted)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"penalty": -1}, "penalty"),
        ({"adapter_dropout": 1.5}, "adapter_dropout"),
        ({"restart_every": 0}, "restart_every"),
        ({"interpolate": "half"}, "interpolate"),
        ({"form": "last-layer", "adapter_dropout": 0.5}, "last-layer"),
        ({"penalty_towards": "median"}, "penalty_towards must be one of zero, mean"),
    ],
)
def test_bad_values_are_named(fields, word):
    with pytest.raises(UserError, match=word):
        foretune.PEFTML(**fields)


def test_bare_steps_train_heads_but_no_adapters():
    tasks, run = family(3), RUN.replace(tasks_per_step=2)
    fields = {**RATES, "form": "both"}
    bare = foretune.retrain(Net(), tasks, foretune.PEFTML(**fields, adapter_dropout=1.0), run)
    assert _products(bare.bank) == 0
    weights = [bare.bank.head_state("out", slot)["weight"] for slot in range(3)]
    assert all((w - Net().out.weight).abs().max() > 0.01 for w in weights)
    # Without LoRA, form both is form last-layer.
    method = foretune.PEFTML(learning_rate=0.02, adapter_learning_rate=0.05, form="last-layer")
    heads = foretune.retrain(Net(), tasks, method, run)
    for a, b in zip(bare.model.parameters(), heads.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for slot, weight in enumerate(weights):
        expected = heads.bank.head_state("out", slot)["weight"]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
