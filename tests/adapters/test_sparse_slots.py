"""Sparse adapters of many tasks against one task at a time in plain autograd, in float64."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import foretune
import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.errors import UserError
from foretune.models.recompute import recomputed
from foretune.models.routing import route
from foretune.run import Run
from foretune.training.data import TaskData, sampler_for
from foretune.training.loop import schedule
from linear_tasks import Net, family

MODELS = {"bert": tiny_models.bert, "gpt2": tiny_models.gpt2}  # gpt2: transformers' Conv1D
ROWS = {
    "uniform": (0, 0, 1, 1, 2, 2),
    "ragged": (0, 1, 1, 1, 2, 2),
    "unsorted": (2, 0, 1, 0, 2, 2),
    "absent": (2, 0, 0, 2),
}


def _bank(model, *, moved=True, fraction=0.2, **lora):
    bank = AdapterBank(model, ["a", "b", "c"], lora=lora, sparse=fraction).double()
    if moved:
        with torch.no_grad():
            for p in bank.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    return bank


def output_of(out):
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def _ids(rows):
    ids = torch.randint(4, tiny_models.VOCABULARY, (rows, 5))
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return ids, mask


def _weight_of(bank, name, slot, weight, transposed):
    """(slot's weight as a differentiable function of weight and values, the values)."""
    layer = bank.layers[name.replace(".", "/")]
    value = layer.values.detach()[slot].clone().requires_grad_()
    plain = weight.T if transposed else weight
    change = torch.zeros(plain.numel(), dtype=plain.dtype)
    change = change.index_put((layer.positions.long(),), value).view(plain.shape)
    return plain.add(change).T if transposed else plain + change, value


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("slots", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", MODELS)
def test_outputs_and_all_gradients_are_those_of_one_task_at_a_time(family, slots, recompute):
    torch.manual_seed(0)
    model = MODELS[family](use_cache=False).double()
    bank = _bank(model)
    ids, mask = _ids(len(slots))
    weights = torch.randn(len(slots), 1, 1, dtype=torch.float64)
    if recompute:
        model.train()
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0

    expected = {}
    base_grads = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    value_grads = {n: torch.zeros_like(bank._layer(n).values) for n in bank.layer_names}
    parameters = dict(model.named_parameters())
    for slot in sorted(set(slots)):
        slot_parameters, leaves = dict(parameters), {}
        for name in bank.layer_names:
            w = parameters[f"{name}.weight"]
            transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
            slot_parameters[f"{name}.weight"], leaves[name] = _weight_of(
                bank, name, slot, w, transposed
            )
        rows = [i for i, s in enumerate(slots) if s == slot]
        out = output_of(
            functional_call(
                model, slot_parameters, (), {"input_ids": ids[rows], "attention_mask": mask[rows]}
            )
        )
        expected |= dict(zip(rows, out.detach(), strict=True))
        trainable = [p for p in parameters.values() if p.requires_grad]
        grads = torch.autograd.grad(
            (out * weights[rows]).pow(2).sum(), [*trainable, *leaves.values()], allow_unused=True
        )
        names = [n for n, p in parameters.items() if p.requires_grad]
        for name, grad in zip(names, grads[: len(names)], strict=True):
            base_grads[name] += 0 if grad is None else grad
        for name, grad in zip(leaves, grads[len(names) :], strict=True):
            value_grads[name][slot] = 0 if grad is None else grad

    with bank.attached(), recomputed(model) if recompute else route(None), route(slots):
        out = output_of(model(input_ids=ids, attention_mask=mask))
        (out * weights).pow(2).sum().backward()
    torch.testing.assert_close(out.detach(), torch.stack([expected[i] for i in range(len(slots))]))
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(grad, base_grads[name], msg=name)
    for name in bank.layer_names:
        grad = bank._layer(name).values.grad
        grad = torch.zeros_like(value_grads[name]) if grad is None else grad
        torch.testing.assert_close(grad, value_grads[name], msg=name)
        assert grad[list(set(slots))].abs().sum() > 0 or "pooler" in name
        assert grad[[s for s in range(3) if s not in slots]].abs().sum() == 0


@pytest.mark.parametrize("family", MODELS)
def test_without_a_change_it_is_the_base_and_so_it_is_in_bare_and_after_a_reset(family):
    torch.manual_seed(0)
    model = MODELS[family]().double()
    ids, mask = _ids(6)

    def out(bank, slots=(2, 0, 1, 0, 2, 2)):
        with torch.no_grad(), bank.attached(), route(slots):
            return output_of(model(input_ids=ids, attention_mask=mask))

    base = output_of(model(input_ids=ids, attention_mask=mask)).detach()
    torch.testing.assert_close(out(_bank(model, moved=False)), base)
    bank = _bank(model)
    changed = out(bank)
    assert not torch.allclose(changed, base)
    with bank.bare():
        assert torch.equal(out(bank), base)
    bank.reset([])
    assert torch.equal(out(bank), changed)
    bank.reset([0, 2])
    rows = torch.tensor([True, True, False, True, True, True])
    torch.testing.assert_close(out(bank)[rows], base[rows])
    assert not torch.allclose(out(bank)[2], base[2])


def test_the_positions_are_the_smallest_entries_of_all_adapted_layers_together():
    model = Net().double()
    bank = _bank(model, fraction=0.25)
    changed, unchanged = [], []
    for name in bank.layer_names:
        entries = model.get_submodule(name).weight.detach().abs().flatten()
        mask = torch.zeros(len(entries), dtype=torch.bool)
        mask[bank._layer(name).positions.long()] = True
        changed.append(entries[mask])
        unchanged.append(entries[~mask])
    changed, unchanged = torch.cat(changed), torch.cat(unchanged)
    assert len(changed) == round(0.25 * (len(changed) + len(unchanged))) == bank.parameters_per_slot
    assert changed.max() < unchanged.min()


def test_the_penalty_adds_the_gradient_of_the_squared_changes():
    model = Net().double()
    bank = _bank(model)
    for p in bank.parameters():
        p.grad = torch.ones_like(p)
    bank.add_penalty([0, 2], 0.5)
    for p in bank.parameters():
        torch.testing.assert_close(p.grad[[0, 2]], 1 + p.detach()[[0, 2]])
        assert torch.equal(p.grad[1], torch.ones_like(p[1]))


def test_it_runs_in_bfloat16_autocast():
    model = tiny_models.bert(num_hidden_layers=1)
    bank = _bank(model).float()
    ids, mask = _ids(4)
    with bank.attached(), route((1, 0, 2, 1)), torch.autocast("cpu", torch.bfloat16):
        low = output_of(model(input_ids=ids, attention_mask=mask))
        low.float().sum().backward()
    with torch.no_grad(), bank.attached(), route((1, 0, 2, 1)):
        torch.testing.assert_close(
            low.float(), output_of(model(input_ids=ids, attention_mask=mask)), rtol=0.1, atol=0.1
        )
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in bank.parameters())


def test_what_cannot_be_changed_sparsely_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 2))
    with pytest.raises(UserError, match=r"0 is a convolution.*lora target_modules"):
        AdapterBank(model, ["a"], lora={}, sparse=0.1)
    equal = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.nn.init.ones_(equal[0].weight)
    with pytest.raises(UserError, match="selects no entry"):
        AdapterBank(equal, ["a"], lora={}, sparse=0.5)
    assert AdapterBank(equal, ["a"], lora={}, sparse=1).parameters_per_slot == 4


@pytest.mark.parametrize("together", [None, 2])
def test_retraining_is_the_loop_written_out_by_hand(together):
    """There is one AdamW per task, so a task that is absent does not move."""
    run = Run(
        steps=7, tasks_per_step=together, batch_size=4, eval_every=0, device="cpu", weight_decay=0.1
    )
    rates = {"learning_rate": 0.02, "adapter_learning_rate": 0.05}
    method = foretune.PEFTML(form="sparse", fraction=0.4, **rates)
    tasks, net = family(3), Net()
    outcome = foretune.retrain(net, tasks, method, run)
    assert outcome.bank is None
    data = TaskData.of(tasks, tasks.objective)
    sampler = sampler_for(data, run, pooled=method.pooled)

    weights = {"body": net.body.weight, "out": net.out.weight}
    sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    border = sizes.sort().values[round(0.4 * len(sizes))]
    masks = {name: w.detach().abs() < border for name, w in weights.items()}
    changes = [
        {n: torch.zeros_like(w).requires_grad_() for n, w in weights.items()} for _ in range(3)
    ]
    for p in net.parameters():
        p.grad = None
    base_adamw = torch.optim.AdamW(net.parameters(), weight_decay=0.1)
    adamws = [torch.optim.AdamW(slot_values.values(), weight_decay=0.1) for slot_values in changes]
    absent = 0
    for step in range(run.steps):
        rows = [(s, data.slots[s].train[i]) for s, i in sampler.picks(step)]
        slots = sorted({s for s, _ in rows})
        absent += 3 - len(slots)
        for slot in slots:
            x, y = (torch.stack([torch.tensor(r[k]) for s, r in rows if s == slot]) for k in "xy")
            weights_of_slot = {
                f"{n}.weight": w + changes[slot][n] * masks[n] for n, w in weights.items()
            }
            loss = ((functional_call(net, weights_of_slot, (x,)) - y) ** 2).sum(1).mean()
            ends = [*changes[slot].values(), *net.parameters()]
            grads = torch.autograd.grad(loss, ends)
            for p, grad in zip(changes[slot].values(), grads[:2], strict=True):
                p.grad = grad
            for p, grad in zip(net.parameters(), grads[2:], strict=True):
                p.grad = grad / len(slots) + (0 if p.grad is None else p.grad)
        for adamw, lr in [(base_adamw, 0.02), *[(adamws[s], 0.05) for s in slots]]:
            moved = [p for group in adamw.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            adamw.param_groups[0]["lr"] = lr * schedule(run, step / run.steps)
            adamw.step()
            adamw.zero_grad()
    assert (absent > 0) == (together == 2)
    for a, b in zip(outcome.model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)


def test_it_is_another_retraining_than_without_a_change_and_with_lora():
    run = Run(steps=5, batch_size=4, eval_every=0, device="cpu")
    outputs = [
        foretune.retrain(Net(), family(3), foretune.PEFTML(**fields), run).model.out.weight
        for fields in (
            {"form": "sparse"},
            {"form": "sparse", "fraction": 1},
            {"form": "sparse", "adapter_dropout": 1.0},
            {},
        )
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize("sparse", [None, 0.2], ids=["lora", "sparse"])
def test_a_layer_with_empty_input_returns_empty_output(sparse):
    """A scene without lanes has no rows for the lanes' encoder."""
    model = Net()
    bank = AdapterBank(model, ["a", "b"], lora={} if sparse else {"r": 2}, sparse=sparse)
    layer = model.get_submodule("body")
    x = torch.zeros(0, 4, requires_grad=True)
    with bank.attached(), route([0, 1]):
        y = layer(x)
    y.sum().backward()
    assert y.shape == (0, layer.out_features)
    assert x.grad is not None
