"""With dropout a task's result is its own, whatever is adapted beside it, however it is split."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import foretune
import tiny_models
from foretune.errors import UserError
from foretune.models import row_dropout
from foretune.models.surgery import freeze_lower
from foretune.run import Run
from foretune.tasks.objectives.causal_lm import CausalLM
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import equal_bits

P = 0.2
LORA = {"r": 2, "lora_dropout": P}
HIDDEN = {"hidden_dropout_prob": P, "attention_probs_dropout_prob": P, "num_hidden_layers": 2}
LLAMA = {"attention_dropout": P, "num_hidden_layers": 2}


def rows(task, count):
    """Texts of unlike lengths and numbers of words."""
    words = tiny_models.WORDS
    return [
        {
            "text": " ".join(words[(task * 3 + i + k) % 20] for k in range(1 + (i * 5 + task) % 9)),
            "label": ("no", "yes")[(i + task) % 2],
        }
        for i in range(count)
    ]


def tasks(objective, count=4):
    return TaskCollection(
        tuple(Task(f"t{k}", rows(k, 5 + k), rows(k + 9, 3), rows(k + 7, 4)) for k in range(count)),
        objective,
    )


def classification():
    return foretune.Classification(tiny_models.tokenizer())


def choice():
    """Candidates that repeat: each is encoded once in a part of a batch."""

    def row(task, i):
        texts = [r["text"] for r in rows(task, 9)]
        return {"context": texts[i], "candidates": texts[i % 3 : i % 3 + 4], "answer": i % 4}

    objective = foretune.Choice(tiny_models.tokenizer(), train_candidates=3)
    return TaskCollection(
        tuple(Task(f"t{k}", [row(k, i) for i in range(6)], (), [row(k, 7)]) for k in range(4)),
        objective,
    )


def windows():
    """Arrays for a convolution, whose batches are not sorted by task where rows are drawn."""
    draws = torch.Generator().manual_seed(4)

    def row(i):
        return {"x": torch.randn(3, 8, generator=draws).numpy(), "y": i % 4}

    return TaskCollection(
        tuple(Task(f"t{k}", [row(i) for i in range(5 + k)], (), [row(0)]) for k in range(4)),
        foretune.Classification(),
    )


KINDS = {
    "convolution": (tiny_models.plain, windows, LORA),
    "bert, own heads": (
        lambda: tiny_models.bert(num_labels=2, **HIDDEN),
        lambda: tasks(classification()),
        {**LORA, "modules_to_save": ["classifier"]},
    ),
    "roberta, a head with dropout": (
        lambda: tiny_models.roberta(num_labels=2, **HIDDEN),
        lambda: tasks(classification()),
        {**LORA, "modules_to_save": ["classifier"]},
    ),
    "llama": (
        lambda: tiny_models.llama(**LLAMA),
        lambda: tasks(CausalLM(tiny_models.tokenizer())),
        LORA,
    ),
    "choice": (lambda: tiny_models.bert(**HIDDEN), choice, LORA),
}


def adapt(kind, *, names=None, **changes):
    model, collection, lora = KINDS[kind]
    collection = collection()
    run = Run(steps=6, batch_size=3, warmup=0.0, seed=3, device="cpu").replace(**changes)
    method = foretune.LoRA(learning_rate=0.02, lora=lora)
    return foretune.adapt(model(), collection.subset(names or collection.names), method, run)


def assert_same(adapted, expected, atol=2e-5):
    for key, tensors in adapted.tensors.items():
        for name, value in tensors.items():
            torch.testing.assert_close(value, expected.tensors[key][name], rtol=1e-3, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_does_not_depend_on_neighbours_waves_and_token_budget(kind):
    together = adapt(kind)
    assert_same(adapt(kind, names=["t2"]), together)
    assert_same(adapt(kind, tasks_per_wave=3), together)
    assert_same(adapt(kind, token_budget=1), together)
    recomputes = kind != "convolution"
    assert_same(adapt(kind, token_budget=40, gradient_checkpointing=recomputes), together)


@pytest.mark.parametrize("method", ["lora", "standard"])
def test_what_transformers_recomputes_has_the_same_masks(method):
    results = []
    for recomputes in (False, True):
        model = tiny_models.llama(**LLAMA)
        if recomputes:
            model.gradient_checkpointing_enable()
        run = Run(steps=3, batch_size=3, device="cpu", eval_every=0)
        if method == "lora":
            made = foretune.LoRA(learning_rate=0.02, lora=LORA)
            results.append(foretune.adapt(model, KINDS["llama"][1](), made, run).tensors["t1", 0])
        else:
            outcome = foretune.retrain(model, KINDS["llama"][1](), METHODS[method], run)
            results.append(outcome.model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_that_a_model_recomputes_on_its_own_is_refused(reentrant):
    class Recomputing(tiny_models.Plain):
        def forward(self, x):
            hidden = torch.relu(self.conv(x)).mean(-1)
            return self.out(checkpoint(self.drop, hidden, use_reentrant=reentrant))

        def drop(self, hidden):
            return torch.nn.functional.dropout(self.body(hidden), P, self.training)

    with pytest.raises(UserError, match="recomputes dropout in the backward pass"):
        foretune.retrain(
            Recomputing(), windows(), foretune.Standard(), Run(steps=1, device="cpu", eval_every=0)
        )


def test_the_seed_decides_the_masks():
    assert equal_bits(adapt("llama").tensors["t1", 0], adapt("llama").tensors["t1", 0])
    model, collection, lora = KINDS["llama"]
    run = Run(steps=1, batch_size=3, warmup=0.0, device="cpu")
    results = []
    for p in (0.0, P):
        method = foretune.LoRA(learning_rate=0.02, lora={**lora, "lora_dropout": p})
        results.append(foretune.adapt(model(), collection(), method, run).tensors["t1", 0])
    assert not equal_bits(*results)


def test_a_resumed_adaptation_has_the_same_masks(tmp_path):
    class StopError(Exception):
        pass

    def stop(update, *_):
        calls.append(update)
        if len(calls) == 9:
            raise StopError

    calls: list[int] = []
    model, collection, lora = KINDS["llama"]
    method = foretune.LoRA(learning_rate=0.02, lora=lora)
    run = Run(steps=6, batch_size=3, device="cpu", tasks_per_wave=2, out=tmp_path)
    with pytest.raises(StopError):
        foretune.adapt(model(), collection(), method, run, progress=stop)
    foretune.adapt(model(), collection(), method, run.replace(resume=True))
    expected = foretune.adapt(model(), collection(), method, run.replace(out=None))
    expected.save(tmp_path / "expected")
    for file in (tmp_path / "expected").rglob("*.safetensors"):
        assert (tmp_path / file.parent.name / file.name).read_bytes() == file.read_bytes()


METHODS = {
    "standard": foretune.Standard(learning_rate=0.01),
    "peft-ml": foretune.PEFTML(learning_rate=0.01, adapter_learning_rate=0.02, lora=LORA),
    "adapter-dropout": foretune.PEFTML(
        learning_rate=0.01, adapter_learning_rate=0.02, lora=LORA, adapter_dropout=0.5
    ),
    "reptile": foretune.Reptile(
        learning_rate=0.01, inner_learning_rate=0.02, inner_steps=2, lora=LORA
    ),
    "fomaml, adapters": replace(
        foretune.FOMAML(learning_rate=0.01, inner_learning_rate=0.02, inner_steps=2, lora=LORA),
        inner="adapter",
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_retraining_does_not_depend_on_the_token_budget(name):
    model, collection, _ = KINDS["llama"]
    results = []
    for budget in (None, 20):
        run = Run(steps=8, batch_size=3, device="cpu", eval_every=4, token_budget=budget)
        results.append(foretune.retrain(model(), collection(), METHODS[name], run))
    first, second = results
    for (key, value), other in zip(
        first.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=1e-3, atol=3e-4, msg=lambda m, k=key: k + m)
    assert first.validation_score == pytest.approx(second.validation_score, rel=1e-3)


@pytest.mark.parametrize("method", [foretune.Standard(), foretune.PEFTML(lora=LORA)])
def test_the_first_step_uses_packing_and_frozen_states_as_later_ones_do(
    method, monkeypatch, caplog
):
    model = tiny_models.bert(num_labels=2, **HIDDEN)
    freeze_lower(model, 1)
    monkeypatch.setattr(row_dropout, "_WARNED", set())
    with caplog.at_level(logging.WARNING, logger="foretune"):
        foretune.retrain(model, tasks(classification()), method, Run(steps=1, device="cpu"))
    assert not [r for r in caplog.records if "depend on the whole" in r.message]
