"""A head per task gives each task what it gets alone, in one pass over the rows of all of them."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.adapters.head_products import Blocks, of_slots, stacked_linear
from foretune.models.layout import RowSlots
from foretune.models.recompute import recomputed
from foretune.models.routing import route
from foretune.models.surgery import head_modules
from foretune.training.optim import SlotAdamW

ROWS = {
    "uniform": (0, 0, 1, 1, 2, 2),
    "ragged": (0, 1, 1, 1, 2, 2, 1, 2),
    "unsorted": (2, 0, 1, 0, 1, 2),
    "absent": (2, 0, 0, 2, 2, 2, 2),
}


class Headed(nn.Module):
    """A body with one layer and a head."""

    def __init__(self, head: nn.Module, batch_first: bool = True) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), head
        self.batch_first = batch_first
        self.head_modules = ["head"]

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.body(x if self.batch_first else x.transpose(0, 1))))
        return y if self.batch_first else y.transpose(0, 1)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.out.weight, self.out.bias)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.scale = nn.Linear(8, 3), nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def classifier(name: str, **sizes: object):
    config = getattr(transformers, f"{name}Config")(
        **{**tiny_models.SIZES, **sizes, "num_labels": 3}
    )
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
ONE_PASS = {
    "linear": lambda: Headed(nn.Linear(8, 3)),
    "no bias": lambda: Headed(nn.Linear(8, 3, bias=False)),
    "Conv1D": lambda: Headed(transformers.Conv1D(3, 8)),
    "time first": lambda: Headed(
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)), False
    ),
    "BERT": lambda: classifier("Bert"),
    "RoBERTa": lambda: classifier("Roberta"),
    "ELECTRA": lambda: classifier("Electra", embedding_size=16),
    "DistilBERT": lambda: classifier("DistilBert", **DISTILBERT),
    "DeBERTa": lambda: classifier("DebertaV2"),
    "ModernBERT": lambda: classifier("ModernBert", norm_bias=True, global_attn_every_n_layers=2),
    "GPT-2": lambda: tiny_models.gpt2(num_labels=3),
}
SLOT_BY_SLOT = {
    "a weight that is read": lambda: Headed(ReadsWeight()),
    "a parameter of its own": lambda: Headed(Scaled()),
    "a shared weight": lambda: Headed(Tied()),
    "a batch norm": lambda: Headed(nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3, affine=False))),
}


def built(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double().eval()


def bank_of(model, num_slots=3) -> AdapterBank:
    keys = [str(i) for i in range(num_slots)]
    bank = AdapterBank(model, keys, heads=head_modules(model)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in bank.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return bank


def inputs_for(model, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    if isinstance(model, Headed):
        shape = (num_rows, 4) if model.batch_first else (num_rows, 6, 4)
        return {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}
    ids = torch.randint(4, tiny_models.VOCABULARY, (num_rows, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return {"input_ids": ids.where(mask > 0, 0), "attention_mask": mask}


def outputs_of(model, inputs):
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def check(model, bank, slots):
    """Compares outputs and gradients of a batch with those of each task alone."""
    inputs = inputs_for(model, len(slots))
    with bank.attached(), route(slots):
        output = outputs_of(model, inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    (output * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for slot in range(len(bank.keys)):
        mine = torch.tensor([s == slot for s in slots])
        if not mine.any():
            assert all(not p.grad[slot].any() for p in bank.parameters() if p.grad is not None)
            continue
        params = {
            f"{name}.{key}": value.detach().clone().requires_grad_()
            for name in bank.head_names
            for key, value in bank.head_state(name, slot).items()
        }
        part = torch.func.functional_call(
            model, params, (), {k: v[mine] for k, v in inputs.items()}
        )
        part = part if isinstance(part, Tensor) else part.logits
        torch.testing.assert_close(output[mine], part, rtol=1e-9, atol=1e-12)
        (part * weights[mine]).sum().backward()
        for name in bank.head_names:
            for key, p in bank._head(name).stacked.items():
                grad = params[f"{name}.{key.replace('/', '.')}"].grad
                torch.testing.assert_close(p.grad[slot], grad, rtol=1e-9, atol=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ONE_PASS)
def test_heads_in_one_pass_give_each_task_what_it_gets_alone(name, rows):
    model = built(ONE_PASS[name])
    bank = bank_of(model)
    check(model, bank, ROWS[rows])
    calls = []
    head = model.get_submodule(bank.head_names[0])
    layer = head.get_submodule(next(iter(bank._head(bank.head_names[0]).inner)))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with bank.attached(), route(ROWS[rows]), torch.no_grad():
        model(**inputs_for(model, len(ROWS[rows])))
    assert len(calls) == 1


@pytest.mark.parametrize("name", SLOT_BY_SLOT)
def test_other_heads_are_called_slot_by_slot(name):
    model = built(SLOT_BY_SLOT[name])
    bank = bank_of(model)
    check(model, bank, ROWS["unsorted"])
    assert not bank._head("head").inner


def test_statistics_of_a_batch_norm_in_a_head_are_those_of_each_task():
    model = built(SLOT_BY_SLOT["a batch norm"])
    check(model.train(), bank_of(model), ROWS["unsorted"])


def test_heads_that_are_recomputed_get_the_same_gradients():
    model = built(tiny_models.bert).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    names = ["encoder.layer.1.output.dense", "encoder.layer.2.intermediate"]
    inputs, slots = inputs_for(model, 4), (0, 2, 2, 0)
    grads = []
    for context in (contextlib.nullcontext(), recomputed(model)):
        bank = AdapterBank(model, ["a", "b", "c"], heads=names).double()
        with bank.attached(), context:
            with route(slots):
                output = model(**inputs).last_hidden_state
            output.square().sum().backward()
        grads.append([p.grad for p in bank.parameters()])
    for grad, expected in zip(*grads, strict=True):
        assert expected[2].any()
        torch.testing.assert_close(grad, expected)


def test_the_head_of_an_absent_task_does_not_move():
    model = built(ONE_PASS["RoBERTa"])
    bank = bank_of(model)
    optimizer = SlotAdamW(bank.parameters(), lr=0.1)
    before = [bank.slot_state(slot) for slot in range(3)]
    for slots in ((0, 1, 2), (2, 0, 0)):
        with bank.attached(), route(slots):
            outputs_of(model, inputs_for(model, 3)).square().sum().backward()
        if 1 in slots:
            optimizer.step_slots((0, 1, 2))
            before = [bank.slot_state(slot) for slot in range(3)]
    optimizer.step_slots((0, 2))
    for slot in range(3):
        moved = [not v.equal(before[slot][k]) for k, v in bank.slot_state(slot).items()]
        assert not any(moved) if slot == 1 else all(moved)


def test_heads_in_one_pass_follow_autocast():
    model = built(ONE_PASS["linear"]).float()
    bank = bank_of(model).float()
    inputs = {"x": inputs_for(model, 5)["x"].float()}
    outputs = []
    for one_pass in (True, False):
        if not one_pass:
            bank._head("head").inner = {}
        with bank.attached(), route((0, 1, 1, 2, 1)), torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(**inputs))
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs)


def test_gradients_of_parts_of_a_batch_add_up():
    model = built(ONE_PASS["RoBERTa"])
    bank = bank_of(model)
    inputs, slots = inputs_for(model, 6), (2, 0, 0, 2, 2, 0)
    grads = []
    for parts in ([slice(6)], [slice(3), slice(3, 6)], [slice(1), slice(1, 6)]):
        bank.zero_grad()
        for part in parts:
            with bank.attached(), route(slots[part]):
                output = outputs_of(model, {k: v[part] for k, v in inputs.items()})
            output.square().sum().backward()
        grads.append([p.grad for p in bank.parameters()])
    for whole, *split in zip(*grads, strict=True):
        for grad in split:
            torch.testing.assert_close(grad, whole)


@pytest.mark.parametrize("seed", range(8))
def test_padded_blocks_give_each_vector_its_own_product(seed):
    rng = np.random.default_rng(seed)
    slots = np.repeat(rng.permutation(12)[:5], rng.integers(1, 40, 5))
    if seed % 2:
        rng.shuffle(slots)
    per_row = 1 + seed // 4
    owners = np.repeat(slots, per_row)
    x = torch.from_numpy(rng.standard_normal((len(owners), 4)))
    weight, bias = (torch.from_numpy(rng.standard_normal(s)) for s in ((12, 3, 4), (12, 3)))
    blocks = Blocks.of(RowSlots(tuple(slots.tolist())), len(owners), x.device)
    w, b = (of_slots(v, blocks.slots) for v in (weight, bias))
    expected = np.einsum("ni,noi->no", x, weight[owners]) + bias[owners].numpy()
    np.testing.assert_allclose(stacked_linear(x, w, b, blocks), expected, atol=1e-12)
    assert sum(math.prod(shape) for shape in blocks.shapes) < 2 * len(owners)
