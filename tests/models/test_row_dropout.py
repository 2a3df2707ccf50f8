"""Dropout drawn row by row: a row's is the same whatever it is batched with, padded to or split."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
import transformers
from torch import nn

import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.models import row_dropout
from foretune.models.packing import packed
from foretune.models.recompute import recomputed
from foretune.models.routing import route
from foretune.models.row_dropout import RowDropout

LENGTHS = [9, 2, 5, 3, 1, 9, 4]
SLOTS = [0, 1, 0, 2, 1, 1, 2]
SEEDS = {0: 11, 1: 22, 2: 33}
P = 0.3
HIDDEN = {"hidden_dropout_prob": P, "attention_probs_dropout_prob": P}


def built(name, config, **fields):
    sizes = {**tiny_models.SIZES, "num_hidden_layers": 2, "initializer_range": 0.3}
    config = getattr(transformers, config)(**{**sizes, **fields})
    return tiny_models._seeded(getattr(transformers, name), config, 0)


def deberta():
    return built(
        "DebertaV2Model",
        "DebertaV2Config",
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        position_buckets=14,  # their embeddings are as many vectors as some batches have tokens
        max_relative_positions=-1,
        **HIDDEN,
    )


def opt():
    return built(
        "OPTForCausalLM",
        "OPTConfig",
        ffn_dim=32,
        word_embed_proj_dim=16,
        dropout=P,
        attention_dropout=P,
        layerdrop=0.5,
    )


MODELS = {
    "bert": lambda: tiny_models.bert(**HIDDEN),
    "roberta classifier": lambda: tiny_models.roberta(
        num_labels=3, initializer_range=0.3, **HIDDEN
    ),
    "gpt2": lambda: tiny_models.gpt2(resid_pdrop=P, embd_pdrop=P, attn_pdrop=P),
    "llama, grouped heads": lambda: tiny_models.llama(attention_dropout=P),
    "bloom, heads run together": lambda: built(
        "BloomForCausalLM", "BloomConfig", n_layer=2, n_head=2, hidden_dropout=P
    ),
    "deberta, shared positions": deberta,
    "opt, skipped layers": opt,
    "longformer, one global token": lambda: built(
        "LongformerModel", "LongformerConfig", attention_window=4, **HIDDEN
    ),
}


class OddDropout(nn.Module):
    """Every kind of random draw that a model may make of rows (n, L, 4)."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=P)
        self.channels, self.whole = nn.Dropout2d(P), nn.Dropout(P, inplace=True)

    def forward(self, x):
        first, _ = self.attention(*[x.transpose(0, 1)] * 3, need_weights=True)
        second, _ = self.attention(*[x.transpose(0, 1)] * 3, need_weights=False)
        x = x + nn.functional.dropout(first + second, P).transpose(0, 1)
        x = x + self.channels(x[..., None]).squeeze(-1)
        if torch.rand([]) < 0.5:
            x = -x
        x = x * (0.7 + torch.rand((len(x), 1, 1), dtype=x.dtype)).floor()
        x = x + torch.randn_like(x) + torch.empty_like(x).uniform_(-1, 1)
        x = x * torch.empty(len(x), 1, 1).bernoulli_(0.8) * torch.bernoulli(torch.full_like(x, 0.9))
        return self.whole(x.flatten(0, 1)).view(x.shape)


def text(rows, *, trimmed=True):
    width = max(LENGTHS[i] for i in rows) if trimmed else max(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        3, tiny_models.VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator
    )
    mask = (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": (ids * mask)[rows, :width], "attention_mask": mask[rows, :width]}


def answers(model, dropout, rows, **inputs):
    """Row → its output, of a call for these rows."""
    slots = [SLOTS[i] for i in rows]
    with dropout.seeded({slot: SEEDS[slot] for slot in slots}, 5), route(slots):
        torch.manual_seed(len(rows))
        output = model(**inputs) if inputs else model(**text(rows))
    if not isinstance(output, torch.Tensor):
        output = output.logits if "logits" in output else output.last_hidden_state
    if output.dim() == 2 or inputs:
        return dict(zip(rows, output, strict=True))
    return {i: output[k, : LENGTHS[i]] for k, i in enumerate(rows)}


BATCHES = [*([i] for i in range(7)), [3, 4, 5], [6, 0], [2, 1, 0, 6]]


@pytest.mark.parametrize("without_padding", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_the_same_in_any_batch(name, without_padding):
    model = MODELS[name]()
    plain = model(**text(range(7)))[0]
    model.train()
    with packed(model) if without_padding else contextlib.nullcontext():
        dropout = RowDropout(model)
        together = answers(model, dropout, range(7))
        for batch in BATCHES:
            for i, row in answers(model, dropout, batch).items():
                torch.testing.assert_close(row, together[i], atol=1e-6, rtol=1e-4)
    assert dropout.drew
    assert not torch.allclose(together[0], plain[0], atol=1e-4)


@pytest.mark.parametrize("version", ["Deberta", "DebertaV2"])
def test_a_table_that_rows_share_has_the_same_masks_in_any_batch(version):
    model = built(
        f"{version}Model",
        f"{version}Config",
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        max_position_embeddings=16,
        **HIDDEN,
    )
    model.double().train()
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2, "lora_dropout": 0.5}).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.3)
    with bank.attached(), torch.no_grad():
        dropout = RowDropout(model)
        together = answers(model, dropout, range(7))
        for batch in BATCHES:
            for i, row in answers(model, dropout, batch).items():
                torch.testing.assert_close(row, together[i], atol=1e-10, rtol=1e-9)


def test_packed_rows_have_the_masks_of_padded_ones():
    model = tiny_models.bert(**HIDDEN).train()
    padded = answers(model, RowDropout(model), range(7))
    with packed(model):
        for i, row in answers(model, RowDropout(model), range(7)).items():
            torch.testing.assert_close(row, padded[i], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_all_random_functions_of_torch_are_drawn_by_row(seed):
    torch.manual_seed(seed)
    model, x = OddDropout().train(), torch.randn(7, 5, 4)
    dropout = RowDropout(model)
    together = answers(model, dropout, range(7), x=x)
    for batch in BATCHES:
        for i, row in answers(model, dropout, batch, x=x[batch]).items():
            torch.testing.assert_close(row, together[i], atol=1e-6, rtol=1e-4)


def test_masks_depend_on_the_seed_of_the_task_the_row_and_the_draw():
    class Twice(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, P), nn.functional.dropout(x, P)

    model = Twice().train()
    model.anchor = nn.Parameter(torch.zeros(1))
    x = torch.ones(4, 64)
    x[3] *= 2

    def masks(seeds, slots=(0, 1, 0, 0)):
        with RowDropout(model).seeded(seeds, 0), route(slots):
            return [y > 0 for y in model(x)]

    first, second = masks({0: 1, 1: 2})
    assert not torch.equal(first, second)
    assert torch.equal(first[0], first[2])  # equal rows of a task
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[3])
    again = masks({0: 1, 1: 3})[0]
    assert torch.equal(first[[0, 2, 3]], again[[0, 2, 3]])
    assert not torch.equal(first[1], again[1])


def test_elements_are_dropped_as_often_as_they_should_be_and_independently():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(P)
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.dropout(x)

    model = Dropping().train()
    x = torch.ones(32, 48, 64)
    x[:, 0, 0] = torch.arange(32.0) + 1
    with RowDropout(model).seeded({0: 7}, 0), route([0] * 32):
        y = model(x)
    kept = (y != 0).double()
    torch.testing.assert_close(y[y != 0][1000], torch.tensor(1 / (1 - P)))
    n = kept.numel()
    assert abs(kept.mean() - (1 - P)) < 4 * (P * (1 - P) / n) ** 0.5
    centred = (kept - (1 - P)) / (P * (1 - P)) ** 0.5
    for dim in range(3):
        for shift in (1, 2, 7):
            correlation = (centred * centred.roll(shift, dim)).mean()
            assert abs(correlation) < 4 / n**0.5
    triples = centred * centred.roll(1, 2) * centred.roll(2, 2)
    assert abs(triples.mean()) < 4 / n**0.5


def test_recomputed_blocks_repeat_their_masks():
    model = tiny_models.llama(attention_dropout=P).train()
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2, "lora_dropout": P})
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(std=0.2)
    gradients = []
    for recompute in (False, True):
        dropout = RowDropout(model)
        with contextlib.ExitStack() as stack:
            if recompute:
                stack.enter_context(recomputed(model))
            stack.enter_context(packed(model))
            stack.enter_context(bank.attached())
            rows = answers(model, dropout, range(7))
            sum(row.square().mean() for row in rows.values()).backward()
        named = [*model.named_parameters(), *bank.named_parameters()]
        gradients.append({n: p.grad.clone() for n, p in named})
        for _, p in named:
            p.grad = None
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_first_call_leaves_no_trace_in_buffers_and_generator():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(P)).train()
    x = torch.randn(6, 4)
    nn.Sequential(model[0], model[1])(x)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    model[1].reset_running_stats()
    state = torch.get_rng_state()
    with RowDropout(model).seeded({}, 0):
        model(x)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name])
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_model_that_evaluates_draws_as_torch_does():
    model = tiny_models.bert(**HIDDEN)
    dropout = RowDropout(model)
    expected = model(**text(range(7))).last_hidden_state
    with dropout.seeded(SEEDS, 0):
        assert torch.equal(model(**text(range(7))).last_hidden_state, expected)
    assert dropout.drew is None


def test_a_model_whose_draws_depend_on_the_batch_is_named_once(monkeypatch, caplog):
    class Sorted(nn.Module):
        """Drops out of the sum over all rows, as experts drop out of the tokens they are sent."""

        def __init__(self):
            super().__init__()
            self.anchor = nn.Parameter(torch.ones(1))

        def forward(self, x):
            order = x.flatten().argsort()
            y = nn.functional.dropout(x.flatten()[order], 0.5)
            return self.anchor * y[order.argsort()].view(x.shape)

    monkeypatch.setattr(row_dropout, "_WARNED", set())
    with caplog.at_level(logging.WARNING, logger="foretune"):
        for _ in range(2):
            model = Sorted().train()
            with RowDropout(model).seeded({}, 0):
                model(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    assert len([r for r in caplog.records if "Sorted draws" in r.message]) == 1
