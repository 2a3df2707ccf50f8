"""Choice by a decoder: the context computed once against each pair; logits that count."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import foretune
import tiny_models
from foretune.adapters.bank import AdapterBank
from foretune.models.counted import logits_at
from foretune.models.frozen_prefix import frozen_prefix
from foretune.models.packing import packed
from foretune.models.routing import route
from foretune.models.surgery import freeze_lower
from foretune.run import Run
from foretune.tasks.objectives import shared_context
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.objectives.choice import Choice
from foretune.tasks.task import Task, TaskCollection

TOKENIZER = tiny_models.tokenizer()
ROWS = [
    {"context": "the cat sat", "candidates": ["on the mat", "red", "a b c d"], "answer": 0},
    {"context": ["one two", "a dog"], "candidates": ["blue", "red"], "answer": 1},
    {"context": "green", "candidates": ["red", "on the mat", "the", "cat"], "answer": 2},
]
SLOTS = (2, 0, 2)
DECODERS = {
    "llama": tiny_models.llama,
    "qwen2": tiny_models.qwen2,
    "gpt2": tiny_models.gpt2,
    "llama, eager": lambda: tiny_models.llama(attn_implementation="eager"),
}


def objective(**fields) -> Choice:
    return Choice(TOKENIZER, scoring="causal", temperature=0.7, **fields)


def batch_of(chosen, rows=ROWS, slots=SLOTS):
    return chosen.collate([chosen.encode(row, "t") for row in rows], slots)


def alone(model, chosen, row) -> torch.Tensor:
    """(candidates,) mean log p of each candidate's tokens, one forward pass per candidate."""
    encoded = chosen.encode(row, "t")
    means = []
    for candidate in encoded["candidates"]:
        ids = torch.tensor([[*encoded["context"], *candidate]])
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(encoded["context"])
        token_logp = [logp[start + i - 1, token] for i, token in enumerate(candidate)]
        means.append(torch.stack(token_logp).mean())
    return torch.stack(means)


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", DECODERS)
def test_it_equals_each_pair_alone(name, share, monkeypatch):
    if not share:
        monkeypatch.setattr(shared_context, "shares_context", lambda *_: False)
    model, chosen = DECODERS[name]().double(), objective()
    batch = batch_of(chosen)
    values = [alone(model, chosen, row) for row in ROWS]
    expected = torch.stack(
        [-(v / 0.7).log_softmax(0)[row["answer"]] for v, row in zip(values, ROWS, strict=True)]
    )
    losses = chosen.losses(model, batch)
    torch.testing.assert_close(losses, expected, rtol=1e-7, atol=1e-8)
    right = [float(v.argmax() == row["answer"]) for v, row in zip(values, ROWS, strict=True)]
    assert chosen.scores(model, batch).tolist() == right
    ours, theirs = grads(model, losses.sum()), grads(model, expected.sum())
    for key, grad in theirs.items():
        torch.testing.assert_close(
            ours[key], grad, rtol=1e-4, atol=1e-6
        )  # Llama's norms are float32


def test_the_context_is_computed_once():
    model, chosen = tiny_models.llama(), objective()
    chosen.scores(model, batch_of(chosen))  # tries both ways
    seen = []
    model.model.register_forward_hook(
        lambda m, a, k, o: seen.append(k["input_ids"].shape), with_kwargs=True
    )
    chosen.scores(model, batch_of(chosen))
    longest = max(
        len(e["context"]) + sum(map(len, e["candidates"]))
        for e in (chosen.encode(row, "t") for row in ROWS)
    )
    assert seen == [(3, longest)]


@pytest.mark.parametrize("first", [1, 3])
def test_what_is_cached_decides_whether_the_context_is_computed_once(first):
    """Frozen blocks are served from a cache for plain texts: worth it where most are frozen."""
    model, chosen = tiny_models.llama(num_hidden_layers=4).double(), objective()
    batch = batch_of(chosen)
    expected = chosen.losses(model, batch)
    freeze_lower(model, 4 - first)
    shapes = []
    model.model.register_forward_hook(
        lambda m, a, k, o: shapes.append(k["input_ids"].shape), with_kwargs=True
    )
    with frozen_prefix(model, []):
        chosen.losses(model, batch)
        shapes.clear()
        torch.testing.assert_close(chosen.losses(model, batch), expected, rtol=1e-7, atol=1e-8)
    num_candidates = sum(len(row["candidates"]) for row in ROWS)
    assert [shape[0] for shape in shapes] == [num_candidates if first == 3 else len(ROWS)]


def test_the_order_of_the_candidates_does_not_matter():
    model, chosen = tiny_models.llama().double(), objective()
    row = ROWS[2]
    reverse = {**row, "candidates": row["candidates"][::-1], "answer": 3 - row["answer"]}
    loss, reverse_loss = (chosen.losses(model, batch_of(chosen, [r], (0,))) for r in (row, reverse))
    torch.testing.assert_close(loss, reverse_loss, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adapters_find_their_rows(name):
    model, chosen = DECODERS[name]().double(), objective()
    bank = AdapterBank(model, ["a", "b", "c"], lora={"r": 2}).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    with bank.attached(), packed(model):
        together = chosen.losses(model, batch_of(chosen))
        for i, row in enumerate(ROWS):
            alone = chosen.losses(model, batch_of(chosen, [row], (SLOTS[i],)))
            torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-10)
    plain = chosen.losses(model, batch_of(chosen))
    assert not torch.allclose(plain, together)


class NoPositions(nn.Module):
    """A decoder that takes no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_models.llama()
        self.config = self.inner.config

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return self.inner(input_ids, attention_mask)


def test_a_model_that_cannot_share_computes_each_pair_and_says_so(caplog):
    model, chosen = NoPositions(), objective()
    with caplog.at_level(logging.WARNING, "foretune"):
        losses = chosen.losses(model, batch_of(chosen))
        chosen.losses(model, batch_of(chosen))
    expected = chosen.losses(model.inner, batch_of(chosen))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert caplog.text.count("cannot compute a context once") == 1


def test_truncation_and_end_of_text():
    chosen = objective(max_context_tokens=3, max_response_tokens=3)
    row = {"context": "a b c d", "candidates": ["a b c d", "e"], "answer": 0}
    encoded = chosen.encode(row, "t")
    before = TOKENIZER("a")["input_ids"][:1]
    remaining = TOKENIZER("c d", add_special_tokens=False)["input_ids"]
    assert encoded["context"] == [*before, *remaining]
    cut, whole = TOKENIZER(["a b c", "e"], add_special_tokens=False)["input_ids"]
    assert encoded["candidates"] == [cut, [*whole, TOKENIZER.eos_token_id]]


def test_peft_ml_learns_by_it():
    rows = [{**ROWS[i % 3]} for i in range(6)]
    tasks = TaskCollection(
        tuple(Task(n, rows, rows[:2], rows[:2]) for n in ("a", "b")),
        objective(train_candidates=2),
    )
    method = foretune.PEFTML(learning_rate=1e-2, adapter_learning_rate=1e-2, lora={"r": 2})
    run = Run(steps=8, batch_size=2, device="cpu", eval_every=0)
    model = tiny_models.llama()
    outcome = foretune.retrain(model, tasks, method, run)
    chosen = tasks.objective
    with torch.no_grad():
        before = chosen.losses(model.eval(), batch_of(chosen)).mean()
        after = chosen.losses(outcome.model, batch_of(chosen)).mean()
    assert after < before


# --- logits where they count ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_head_sees_no_position_that_does_not_count(name):
    model, chosen = DECODERS[name]().double(), CausalLM(TOKENIZER)
    rows = [
        {"prompt": "the cat sat on", "completion": "a mat"},
        {"prompt": "red", "completion": "b"},
    ]
    batch = batch_of(chosen, rows, (0, 1))
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda m, a, o: seen.append(o.shape[:-1]))
    losses = chosen.losses(model, batch)
    assert seen == [(int((batch.inputs["labels"] != -100).sum()),)]
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    logp = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    for i, row in enumerate(batch.inputs["labels"]):
        counted = [j for j in range(1, len(row)) if row[j] != -100]
        expected = -torch.stack([logp[i, j - 1, row[j]] for j in counted]).mean()
        torch.testing.assert_close(losses[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_head_with_adapters_sees_everything():
    model = tiny_models.llama().double()
    counted = torch.tensor([[True, False, True], [False, True, False]])
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    expected = model(input_ids=ids).logits[counted]
    torch.testing.assert_close(logits_at(model, counted, input_ids=ids), expected)
    bank = AdapterBank(model, ["a", "b"], heads=["lm_head"]).double()
    with bank.attached(), route([0, 1]):
        torch.testing.assert_close(logits_at(model, counted, input_ids=ids), expected)
    assert "forward" not in vars(model.lm_head)
