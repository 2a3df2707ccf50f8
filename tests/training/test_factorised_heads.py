"""Factorised heads: each task's head is w_t V, of V that all tasks share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foretune
from foretune.adapters.bank import AdapterBank
from foretune.adapters.factors import shared_heads
from foretune.errors import UserError
from foretune.methods import make
from foretune.models.loading import load_base, load_module
from foretune.run import Run
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.task import Task, TaskCollection
from foretune.training.data import TaskData, sampler_for
from foretune.training.loop import schedule
from linear_tasks import Net, family, module_file

RATES = {"learning_rate": 0.02, "adapter_learning_rate": 0.05}
RUN = Run(batch_size=4, steps=8, eval_every=0, device="cpu", weight_decay=0.1, seed=3)


def retrain(tasks=None, *, model=None, run=RUN, **fields):
    method = make("factorised-heads", **{**RATES, "num_factors": 3, **fields})
    return foretune.retrain(Net() if model is None else model, tasks or family(4), method, run)


def heads(bank, slots):
    """(slots, outputs, hidden + 1) weights and biases."""
    states = [bank.head_state("out", slot) for slot in slots]
    parts = [torch.cat([s["weight"], s["bias"][:, None]], 1) for s in states]
    return torch.stack(parts).detach()


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("together", [None, 2])
def test_it_equals_a_plain_loop_over_tasks_with_w_and_v(together, penalty):
    tasks, run = family(3, rows=[24, 3, 24]), RUN.replace(tasks_per_step=together)
    outcome = retrain(tasks, run=run, penalty=penalty)

    net, data = Net(), TaskData.of(tasks, tasks.objective)
    start = shared_heads(AdapterBank(net, data.keys, heads=["out"]), 3, run.seed)
    shapes = sorted(start.shared, key=lambda p: -p.dim())  # (3, out, hidden), (3, out)
    v = [nn.Parameter(p.detach().clone()) for p in shapes]
    w = [nn.Parameter(row.clone()) for row in start.z.detach()]
    sampler = sampler_for(data, run, pooled=False)
    shared = [*net.body.parameters(), *v]
    base_adamw = torch.optim.AdamW(shared, weight_decay=0.1)
    adamws = [torch.optim.AdamW([row], weight_decay=0.1) for row in w]
    for step in range(run.steps):
        rows_of: dict[int, list] = {}
        for slot, i in sampler.picks(step):
            rows_of.setdefault(slot, []).append(data.slots[slot].train[i])
        for slot, rows in rows_of.items():
            x, y = (torch.stack([torch.tensor(r[k]) for r in rows]) for k in ("x", "y"))
            weight, bias = (torch.tensordot(w[slot], part, 1) for part in v)
            loss = ((torch.tanh(net.body(x)) @ weight.T + bias - y) ** 2).sum(1).mean()
            (loss + penalty * (weight**2).sum()).backward()
        for p in shared:
            p.grad /= len(rows_of)
        moved = [(base_adamw, shared, 0.02), *[(adamws[s], [w[s]], 0.05) for s in rows_of]]
        for adamw, parameters, rate in moved:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            adamw.param_groups[0]["lr"] = rate * schedule(run, step / run.steps)
            adamw.step()
            adamw.zero_grad()
    expected = torch.stack(
        [
            torch.cat([torch.tensordot(row, v[0], 1), torch.tensordot(row, v[1], 1)[:, None]], 1)
            for row in w
        ]
    ).detach()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(heads(outcome.bank, range(3)), expected, **close)
    torch.testing.assert_close(outcome.model.body.weight, net.body.weight, **close)
    torch.testing.assert_close(outcome.model.out.weight, expected.mean(0)[:, :-1], **close)


def test_all_start_at_the_head_of_the_base_and_factors_differ():
    net = Net()
    bank = AdapterBank(net, ["a", "b"], heads=["out"])
    coefficients = shared_heads(bank, 4, 0)
    before = heads(bank, range(2))
    coefficients.write(range(2))
    torch.testing.assert_close(heads(bank, range(2)), before)
    factors = torch.cat([p.detach().flatten(1) for p in coefficients.shared], 1)
    assert torch.linalg.matrix_rank(factors - factors.mean(0)) == 3


def test_the_heads_of_all_tasks_have_the_rank_of_the_factors():
    values = heads(retrain(family(8), run=RUN.replace(steps=40)).bank, range(8)).flatten(1)
    sizes = torch.linalg.svdvals(values)
    assert sizes[2] > 1e-3 * sizes[0] and sizes[3] < 1e-5 * sizes[0]
    assert values.std(0).max() > 0.01


def test_a_new_task_is_fitted_within_the_span_of_the_factors():
    outcome = retrain(family(8), run=RUN.replace(steps=40))
    assert outcome.basis is not None and outcome.basis.rank <= 3
    run = Run(steps=20, batch_size=8, device="cpu")
    adapted = foretune.adapt(outcome.model, family(2, prefix="new"), make("basis"), run)
    seen = heads(outcome.bank, range(8)).flatten(1)
    tensors = adapted.tensors["new0", 0]
    names = sorted(tensors)
    assert [name.rpartition(".")[2] for name in names] == ["bias", "weight"]
    new = torch.cat([tensors[names[1]], tensors[names[0]][:, None]], 1).flatten()
    fit = torch.linalg.lstsq(seen.T.double(), new.double(), driver="gelsd").solution
    torch.testing.assert_close(seen.T.double() @ fit, new.double(), rtol=1e-3, atol=1e-4)
    assert float((new - seen.mean(0)).norm()) > 0.01


def test_what_a_task_has_of_its_own_are_its_weights_of_the_factors():
    cost = retrain().cost
    net = sum(p.numel() for p in Net().parameters())
    factors = 3 * sum(p.numel() for p in Net().out.parameters())
    assert cost["trainable_parameters"] == net + factors + 4 * 3


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_a_stopped_run_is_resumed_to_the_same_bits(tmp_path, average):
    model = load_module(module_file(tmp_path), hidden=6)
    run = RUN.replace(eval_every=2)
    whole = retrain(model=model, run=run, average=average)

    class Stop(Exception):  # noqa: N818
        pass

    def progress(update, updates, figures):
        if update == 5:
            raise Stop

    method = make("factorised-heads", **RATES, num_factors=3, average=average)
    out = run.replace(out=tmp_path / "out", resume=True)
    with pytest.raises(Stop):
        foretune.retrain(model, family(4), method, out, progress=progress)
    resumed = foretune.retrain(model, family(4), method, out)
    x = torch.ones(2, 4)
    loaded, _ = load_base(tmp_path / "out" / "base")
    assert torch.equal(whole.model(x), resumed.model(x)) and torch.equal(
        loaded(x), resumed.model(x)
    )
    if not average:
        assert torch.equal(heads(whole.bank, range(4)), heads(resumed.bank, range(4)))


def test_tasks_with_other_labels_each_are_refused():
    tasks = [
        Task(name, [{"x": [1.0, 2, 3, i], "y": f"{name}{i % 3}"} for i in range(6)], (), ())
        for name in "ab"
    ]
    with pytest.raises(UserError, match="the tasks have different labels: use peft-ml"):
        retrain(TaskCollection(tuple(tasks), Classification()))


@pytest.mark.parametrize("bad", [1, 2.5, None])
def test_a_number_of_factors_that_mixes_nothing_is_refused(bad):
    with pytest.raises(UserError, match="num_factors must be a whole number not below 2"):
        make("factorised-heads", num_factors=bad)
