"""PEFT-ML with a head per task: its steps, its penalty, and the head that the base keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Conv1D

import foretune
import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.models.loading import load_base
from foretune.models.surgery import head_labels
from foretune.run import Run
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.task import Task, TaskCollection
from foretune.training.data import TaskData, sampler_for
from foretune.training.loop import schedule
from linear_tasks import Net, family

RATES = {"learning_rate": 0.02, "adapter_learning_rate": 0.05}
LORA = {"r": 2, "lora_alpha": 3}
RUN = Run(batch_size=4, steps=8, eval_every=0, device="cpu", weight_decay=0.1)


def retrain(model=None, tasks=None, *, run=RUN, **fields):
    method = foretune.PEFTML(**{**RATES, "form": "last-layer", **fields})
    return foretune.retrain(Net() if model is None else model, tasks or family(3), method, run)


@pytest.mark.parametrize(("penalty", "towards"), [(0.0, "zero"), (0.3, "zero"), (0.3, "mean")])
@pytest.mark.parametrize("together", [None, 2])
def test_it_equals_a_plain_loop_over_tasks_with_a_head_each(together, penalty, towards):
    tasks, run = family(3, rows=[24, 3, 24]), RUN.replace(tasks_per_step=together)
    outcome = retrain(tasks=tasks, run=run, penalty=penalty, penalty_towards=towards)

    net, data = Net(), TaskData.of(tasks, tasks.objective)
    heads = [copy.deepcopy(net.out) for _ in range(3)]
    sampler = sampler_for(data, run, pooled=False)
    base_adamw = torch.optim.AdamW(net.body.parameters(), weight_decay=0.1)
    adamws = [torch.optim.AdamW(head.parameters(), weight_decay=0.1) for head in heads]
    for step in range(run.steps):
        rows_of: dict[int, list] = {}
        for slot, i in sampler.picks(step):
            rows_of.setdefault(slot, []).append(data.slots[slot].train[i])
        mean = torch.stack([head.weight.detach() for head in heads]).mean(0)
        centre = mean if towards == "mean" else torch.zeros_like(mean)
        for slot, rows in rows_of.items():
            x, y = (torch.stack([torch.tensor(r[k]) for r in rows]) for k in ("x", "y"))
            loss = ((heads[slot](torch.tanh(net.body(x))) - y) ** 2).sum(1).mean()
            (loss + penalty * ((heads[slot].weight - centre) ** 2).sum()).backward()
        for p in net.body.parameters():
            p.grad /= len(rows_of)
        moved = [(base_adamw, net.body, 0.02), *[(adamws[s], heads[s], 0.05) for s in rows_of]]
        for adamw, module, rate in moved:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            adamw.param_groups[0]["lr"] = rate * schedule(run, step / run.steps)
            adamw.step()
            adamw.zero_grad()
    for slot, head in enumerate(heads):
        for name, value in outcome.bank.head_state("out", slot).items():
            torch.testing.assert_close(value, getattr(head, name), rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):
        trained = getattr(outcome.model.body, name)
        torch.testing.assert_close(trained, getattr(net.body, name), rtol=1e-5, atol=1e-6)
        mean = torch.stack([getattr(head, name) for head in heads]).mean(0)
        torch.testing.assert_close(getattr(outcome.model.out, name), mean, rtol=1e-5, atol=1e-6)


# --- the gradient of the penalty ----------------------------------------------------------------


def random_bank(module, **more):
    bank = AdapterBank(nn.Sequential(module).double(), ["a", "b", "c"], **more).double()
    for p in bank.parameters():
        nn.init.normal_(p)
        p.grad = torch.ones_like(p)
    return bank


def products(factors):
    """(slots, out, in · k) s·B A of LoRA factors [(A, B), …]."""
    return torch.stack([1.5 * b.flatten(1) @ a.flatten(1) for a, b in factors])


def centred(values):
    """Σ ‖v_t − mean‖², which is differentiated through the mean too."""
    return ((values - values.mean(0)) ** 2).sum()


@pytest.mark.parametrize("module", [nn.Linear(5, 4), nn.Conv1d(5, 4, 3), Conv1D(4, 5)])
def test_the_gradient_towards_the_mean_is_that_of_the_whole_sum(module):
    bank = random_bank(module, lora={**LORA, "target_modules": ["0"]})
    factors = [[f.detach().requires_grad_() for f in bank.factors("0", s)] for s in range(3)]
    (0.7 * centred(products(factors))).backward()
    bank.add_penalty([0, 1, 2], 0.7, centre=bank.mean())
    layer = bank._layer("0")
    for slot, (a, b) in enumerate(factors):
        grad_b = layer.b.grad[slot][..., None] if layer.is_conv else layer.b.grad[slot].T
        torch.testing.assert_close(layer.a.grad[slot], 1 + a.grad)
        torch.testing.assert_close(grad_b, 1 + b.grad)


def test_the_gradient_of_sparse_changes_and_of_heads_too():
    lora = {**LORA, "target_modules": ["0"]}
    sparse = random_bank(nn.Linear(5, 4), lora=lora, sparse=0.5)
    heads = random_bank(nn.Linear(5, 4), heads=["0"])
    for bank, p in (
        (sparse, sparse._layer("0").values),
        (heads, heads._head("0").stacked["weight"]),
    ):
        values = p.detach().clone().requires_grad_()
        (0.7 * centred(values)).backward()
        bank.add_penalty([0, 1, 2], 0.7, centre=bank.mean(), heads=True)
        torch.testing.assert_close(p.grad, 1 + values.grad)
    biases = heads._head("0").stacked["bias"]
    assert torch.equal(biases.grad, torch.ones_like(biases))


def test_heads_are_left_alone_where_only_adapters_are_penalised():
    bank = random_bank(nn.Linear(5, 4), heads=["0"])
    bank.add_penalty([0, 2], 0.7)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in bank.parameters())


# --- what a great penalty comes to --------------------------------------------------------------


def spread(bank):
    """How far the tasks' heads are from their mean, and their mean from zero."""
    weights = torch.stack([bank.head_state("out", s)["weight"].detach() for s in range(3)])
    return float((weights - weights.mean(0)).norm()), float(weights.mean(0).norm())


def test_a_great_penalty_makes_heads_alike_or_zero():
    run = RUN.replace(steps=80, warmup=0.0)
    free, mean = spread(retrain(run=run).bank)
    alike, still = spread(retrain(run=run, penalty=1e3, penalty_towards="mean").bank)
    assert alike < 0.1 * free and still > 0.5 * mean
    assert sum(spread(retrain(run=run, penalty=1e3).bank)) < 0.1 * mean


def test_form_both_penalises_adapters_and_heads():
    run = RUN.replace(steps=80, warmup=0.0)
    bank = retrain(run=run, form="both", lora=LORA, penalty=1e3).bank
    assert bank.layer_names == ["body"] and sum(spread(bank)) < 0.1
    a, b = bank.factors("body", 0)
    assert float((b @ a).detach().norm()) < 0.02


# --- the base's head ----------------------------------------------------------------------------


def opinions(names="abc"):
    """Tasks with one label set and inputs in common, that mostly agree."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 4, generator=generator)
    tasks = []
    for i, name in enumerate(names):
        direction = torch.tensor([2.0, -1.0, 0.3 * i, 0.0])
        rows = [{"x": v.numpy(), "y": "yes" if v @ direction > 0 else "no"} for v in x]
        tasks.append(Task(name, rows[:12], rows[12:18], rows[18:]))
    return TaskCollection(tuple(tasks), Classification())


class Voter(nn.Module):
    """Four numbers in, two logits out."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.classifier = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.classifier(F.gelu(self.body(x)))


@pytest.mark.parametrize("form", ["last-layer", "both"])
def test_before_adapting_the_base_answers_in_the_tasks_labels(form):
    run = RUN.replace(steps=60)
    outcome = retrain(Voter(), opinions(), run=run, form=form, lora=LORA)
    assert head_labels(outcome.model) == ("no", "yes")
    scores = foretune.compare(
        {"base": outcome, "none": Voter()},
        opinions("xyz"),
        adapt=foretune.Head(),
        run=Run(steps=1, device="cpu"),
        shots=(1,),
    ).to_dict()["scores"]
    before = [row["score"] for row in scores if (row["base"], row["shots"]) == ("base", 0)]
    assert len(before) == 3 and min(before) > 0.8


def test_a_saved_base_has_the_mean_of_the_heads_under_their_labels(tmp_path):
    tokenizer, words = tiny_models.tokenizer(), ("red", "blue")
    rows = [{"text": f"the {w} sat", "label": w} for w in words] * 4
    tasks = TaskCollection(
        tuple(Task(n, rows, rows[:2], rows) for n in "ab"), Classification(tokenizer=tokenizer)
    )
    model = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    outcome = retrain(model, tasks, run=RUN.replace(out=tmp_path))
    base, _ = load_base(tmp_path / "base")
    assert head_labels(base) == ("blue", "red")
    heads = [outcome.bank.head_state("classifier", slot)["weight"] for slot in range(2)]
    assert not torch.equal(heads[0], heads[1])
    torch.testing.assert_close(base.classifier.weight, torch.stack(heads).mean(0))
    again = retrain(model, tasks, run=RUN.replace(out=tmp_path, resume=True))
    assert torch.equal(again.model.classifier.weight, base.classifier.weight)


def test_heads_for_other_labels_in_each_task_have_no_mean():
    other = [
        Task(name, [{"x": [1.0, 2, 3, i], "y": f"{name}{i % 2}"} for i in range(6)], (), ())
        for name in "ab"
    ]
    tasks = TaskCollection(tuple(other), Classification())
    before, outcome = Voter(), retrain(Voter(), tasks)
    assert outcome.bank.mean_heads() == {}
    assert torch.equal(outcome.model.classifier.weight, before.classifier.weight)
    with pytest.raises(UserError, match="the tasks have different labels: use penalty_towards zer"):
        retrain(Voter(), tasks, penalty=1.0, penalty_towards="mean")


def test_a_frozen_head_stays_as_it_is():
    model = Net()
    model.out.requires_grad_(False)
    outcome = retrain(model)
    assert torch.equal(outcome.model.out.weight, model.out.weight)
    assert not torch.equal(outcome.bank.head_state("out", 0)["weight"], model.out.weight)


def test_interpolation_is_between_the_mean_head_and_the_original():
    whole, half = retrain(), retrain(interpolate=0.5)
    expected = torch.lerp(Net().out.weight, whole.model.out.weight, 0.5)
    torch.testing.assert_close(half.model.out.weight, expected)
