"""Each retraining method against a plain-torch loop of a few lines over stock PEFT modules."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

import foretune
from foretune.adapters.bank import AdapterBank
from foretune.adapters.peft_format import peft_config, peft_tensors
from foretune.run import Run
from foretune.training.data import TaskData, sampler_for
from foretune.training.loop import schedule
from foretune.training.optim import SlotAdamW
from linear_tasks import Net, family

LORA = {"r": 2, "lora_alpha": 3}
RATE, ADAPTER_RATE, DECAY = 0.02, 0.05, 0.1
CLIPS = [None, 0.05]  # the second one cuts every gradient here
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _run(**changes) -> Run:
    fixed = {"batch_size": 4, "steps": 6, "weight_decay": DECAY, "eval_every": 0, "device": "cpu"}
    return Run(**{**fixed, "max_grad_norm": None, **changes})


class Reference:
    """Stock PEFT around a copy of the model, an adapter for each task, and the sampler's rows."""

    def __init__(self, model, tasks, method, run, batches_per_update=1, lora=LORA):
        self.budget = method.run_for(run, len(tasks))
        self.data = TaskData.of(tasks, tasks.objective)
        self.sampler = sampler_for(
            self.data, self.budget, pooled=method.pooled, batches_per_update=batches_per_update
        )
        self.num_updates = self.budget.steps // batches_per_update
        self.plain, self.run = copy.deepcopy(model), run
        if lora is None:
            self.model, self.base = self.plain, list(self.plain.parameters())
            return
        bank = AdapterBank(model, self.data.keys, lora=lora, seed=run.seed)
        fields = ("r", "lora_alpha", "target_modules")
        config_fields = peft_config(bank, model, None)
        config = peft.LoraConfig(**{k: config_fields[k] for k in fields})
        self.base = list(self.plain.parameters())
        self.model = peft.get_peft_model(self.plain, config, adapter_name="0")
        for slot in range(1, len(tasks)):
            self.model.add_adapter(str(slot), config)
        self.load(bank)

    def load(self, bank: AdapterBank) -> None:
        for slot in range(len(bank.keys)):
            peft.set_peft_model_state_dict(self.model, peft_tensors(bank, slot), str(slot))

    def adapter(self, slot: int) -> dict[str, nn.Parameter]:
        mark = f".{slot}.weight"
        return {
            n.removesuffix(mark): p for n, p in self.model.named_parameters() if n.endswith(mark)
        }

    def train_only(self, *groups) -> None:
        trainable = {id(p) for group in groups for p in group}
        for p in self.model.parameters():
            p.requires_grad_(id(p) in trainable)
            p.grad = None

    def rows(self, step: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The step's rows by slot."""
        rows_by_slot: dict[int, list] = {}
        for slot, i in self.sampler.picks(step):
            rows_by_slot.setdefault(slot, []).append(self.data.slots[slot].train[i])
        return {
            slot: tuple(torch.stack([torch.tensor(r[k]) for r in rows]) for k in ("x", "y"))
            for slot, rows in rows_by_slot.items()
        }

    def rate(self, update: int) -> float:
        return schedule(self.budget, update / self.num_updates)

    def step(self, optimizer, parameters, rate: float) -> None:
        if self.run.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.run.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def _loss(model, rows):
    x, y = rows
    return ((model(x) - y) ** 2).sum(1).mean()


def _assert_same_base(outcome, reference) -> None:
    for trained, expected in zip(outcome.model.parameters(), reference.base, strict=True):
        torch.testing.assert_close(trained, expected, **CLOSE)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("together", [None, 1, 2])
def test_peft_ml_equals_stock_peft_with_an_optimiser_for_each_adapter(together, clip):
    tasks, model = family(3, rows=[24, 3, 24]), Net()
    run = _run(tasks_per_step=together, max_grad_norm=clip)
    method = foretune.PEFTML(learning_rate=RATE, adapter_learning_rate=ADAPTER_RATE, lora=LORA)
    outcome = foretune.retrain(model, tasks, method, run)

    ref = Reference(model, tasks, method, run)
    adapters = [list(ref.adapter(slot).values()) for slot in range(3)]
    ref.train_only(ref.base, *adapters)
    base_adamw = torch.optim.AdamW(ref.base, weight_decay=DECAY)
    adamws = [torch.optim.AdamW(a, weight_decay=DECAY) for a in adapters]
    for step in range(run.steps):
        rows = ref.rows(step)
        for slot in rows:
            ref.model.set_adapter(str(slot))
            for p in ref.base:
                p.requires_grad_(True)
            _loss(ref.model, rows[slot]).backward()
        for p in ref.base:
            p.grad /= len(rows)
        ref.step(base_adamw, ref.base, RATE * ref.rate(step))
        for slot in rows:
            ref.step(adamws[slot], adapters[slot], ADAPTER_RATE * ref.rate(step))

    _assert_same_base(outcome, ref)
    for slot in range(3):
        trained = peft_tensors(outcome.bank, slot)
        expected = ref.adapter(slot)
        assert len(trained) == len(expected) == 4
        for name, p in expected.items():
            torch.testing.assert_close(trained[f"{name}.weight"], p.detach(), **CLOSE)


@pytest.mark.parametrize("clip", CLIPS)
def test_standard_equals_a_plain_loop(clip):
    tasks, model, run = family(3), Net(), _run(max_grad_norm=clip)
    method = foretune.Standard(learning_rate=RATE)
    outcome = foretune.retrain(model, tasks, method, run)

    ref = Reference(model, tasks, method, run, lora=None)
    adamw = torch.optim.AdamW(ref.base, weight_decay=DECAY)
    for step in range(run.steps):
        rows = ref.rows(step)
        count = sum(len(x) for x, _ in rows.values())
        sum(len(rows[slot][0]) / count * _loss(ref.model, rows[slot]) for slot in rows).backward()
        ref.step(adamw, ref.base, RATE * ref.rate(step))
    _assert_same_base(outcome, ref)


@pytest.mark.parametrize("query", [False, True], ids=["reptile", "fomaml"])
@pytest.mark.parametrize("clip", CLIPS)
def test_episodes_on_all_weights_equal_a_plain_loop(query, clip):
    tasks, model = family(3), Net()
    cls = foretune.FOMAML if query else foretune.Reptile
    method = cls(learning_rate=RATE, inner_learning_rate=ADAPTER_RATE, inner_steps=2)
    per_update = 2 + query
    run = _run(steps=per_update * 2, max_grad_norm=clip)  # six updates, of one task each
    outcome = foretune.retrain(model, tasks, method, run)

    ref = Reference(model, tasks, method, run, per_update, lora=None)
    assert ref.num_updates == 6
    adamw = torch.optim.AdamW(ref.base, weight_decay=DECAY)
    for update in range(ref.num_updates):
        start = [p.detach().clone() for p in ref.base]
        inner = torch.optim.AdamW(ref.base, lr=ADAPTER_RATE, weight_decay=0.0)
        steps = [ref.rows(update * per_update + i) for i in range(per_update)]
        assert all(set(rows) == {update % 3} for rows in steps)
        for rows in steps[:2]:
            _loss(ref.model, rows[update % 3]).backward()
            inner.step()
            inner.zero_grad()
        if query:
            _loss(ref.model, steps[2][update % 3]).backward()
        for p, before in zip(ref.base, start, strict=True):
            if not query:
                p.grad = before - p.detach()  # so that the step goes towards the adapted weights
            p.data.copy_(before)
        ref.step(adamw, ref.base, RATE * ref.rate(update))
    _assert_same_base(outcome, ref)


@pytest.mark.parametrize("query", [False, True], ids=["reptile", "fomaml"])
@pytest.mark.parametrize("together", [None, 2])
def test_episodes_on_adapters_equal_a_plain_loop(query, together):
    tasks, model = family(3), Net()
    cls = foretune.FOMAML if query else foretune.Reptile
    method = cls(
        learning_rate=RATE,
        inner_learning_rate=ADAPTER_RATE,
        inner_steps=2,
        inner="adapter",
        lora=LORA,
    )
    per_update = 2 + query
    run = _run(steps=3 * per_update, tasks_per_step=together)
    outcome = foretune.retrain(model, tasks, method, run)

    ref = Reference(model, tasks, method, run, per_update)
    ref.train_only(ref.base)
    adamw = torch.optim.AdamW(ref.base, weight_decay=DECAY)
    for update in range(3):
        seed = run.seed * 1_000_003 + update  # of the fresh adapters of this episode
        ref.load(AdapterBank(model, ref.data.keys, lora=LORA, seed=seed))
        steps = [ref.rows(update * per_update + i) for i in range(per_update)]
        for slot in steps[0]:
            adapter = list(ref.adapter(slot).values())
            ref.model.set_adapter(str(slot))
            inner = torch.optim.AdamW(adapter, lr=ADAPTER_RATE, weight_decay=0.0)
            for rows in steps[:2]:
                _loss(ref.model, rows[slot]).backward()
                inner.step()
                inner.zero_grad()
        ref.train_only(ref.base)
        for slot in steps[0]:
            if query:
                ref.model.set_adapter(str(slot))
                for p in ref.base:
                    p.requires_grad_(True)
                (_loss(ref.model, steps[2][slot]) / len(steps[2])).backward()
            else:
                for layer in (ref.plain.body, ref.plain.out):
                    way = -layer.get_delta_weight(str(slot)).detach() / len(steps[0])
                    p = layer.base_layer.weight
                    p.grad = way if p.grad is None else p.grad + way
        ref.step(adamw, ref.base, RATE * ref.rate(update))
        ref.train_only(ref.base)
    _assert_same_base(outcome, ref)


def test_reptile_moves_towards_the_adapted_weights():
    tasks, model = family(1, offset=0.0), Net(hidden=None)
    method = foretune.Reptile(learning_rate=RATE, inner_learning_rate=0.1, inner_steps=3)
    outcome = foretune.retrain(model, tasks, method, _run(steps=3, weight_decay=0.0, warmup=0.0))
    x, y = (torch.stack([torch.tensor(r[k]) for r in tasks.tasks[0].train]) for k in ("x", "y"))
    assert _loss(outcome.model, (x, y)) < _loss(model, (x, y))


# --- the optimiser of stacked parameters --------------------------------------------------------

TURNS = [(0, 1, 2, 3), (2,), (0, 3), (0, 1, 2, 3), (3, 1), (2, 0, 1)]


@pytest.mark.parametrize("max_norm", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_slot_adamw_equals_one_adamw_for_each_slot(max_norm, scale):
    torch.manual_seed(0)
    stacked = [nn.Parameter(torch.randn(4, *shape).double()) for shape in ((3, 2), (5,))]
    single = [[nn.Parameter(p.detach()[s].clone()) for p in stacked] for s in range(4)]
    ours = SlotAdamW(stacked, lr=0.1, weight_decay=0.2)
    theirs = [torch.optim.AdamW(params, lr=0.1, weight_decay=0.2) for params in single]
    for present in TURNS:
        before = [p.detach().clone() for p in stacked]
        for i, p in enumerate(stacked):
            p.grad = torch.randn_like(p)  # also for slots that take no part
            for slot in present:
                single[slot][i].grad = p.grad[slot] * scale
        ours.step_slots(present, grad_scale=scale, max_norm=max_norm)
        for slot in range(4):
            if slot in present:
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(single[slot], max_norm)
                theirs[slot].step()
            for i, p in enumerate(stacked):
                torch.testing.assert_close(p[slot], single[slot][i], rtol=1e-6, atol=1e-7)
                if slot not in present:
                    assert torch.equal(p[slot], before[i][slot])


def test_slots_are_clipped_one_by_one():
    p = nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.tensor([[3.0, 0, 4], [0, 0.1, 0]])
    seen = SlotAdamW([p], lr=1.0, weight_decay=0.0)
    seen.step_slots((0, 1), max_norm=1.0)
    clipped = torch.tensor([[0.6, 0, 0.8], [0, 0.1, 0]])
    torch.testing.assert_close(seen.state[p]["exp_avg"], 0.1 * clipped, rtol=1e-5, atol=1e-6)


def test_an_absent_task_does_not_move():
    """Through the whole loop: with one task a step, the third has not had its turn yet."""
    tasks, model = family(3), Net()
    method = foretune.PEFTML(learning_rate=RATE, adapter_learning_rate=ADAPTER_RATE, lora=LORA)
    outcome = foretune.retrain(model, tasks, method, _run(steps=2, tasks_per_step=1))
    fresh = AdapterBank(model, tasks.names, lora=LORA, seed=0)
    moved = SimpleNamespace(
        **{
            f"slot{s}": any(
                not torch.equal(a, b)
                for a, b in zip(
                    outcome.bank.slot_state(s).values(), fresh.slot_state(s).values(), strict=True
                )
            )
            for s in range(3)
        }
    )
    assert (moved.slot0, moved.slot1, moved.slot2) == (True, True, False)
