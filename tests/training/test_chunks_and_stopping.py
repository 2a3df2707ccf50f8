"""Chunks of a batch, the choices of training, early stopping, waves by memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import foretune
import tiny_models
from foretune.errors import UserError
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from foretune.training import adapting
from foretune.training.data import TaskData
from foretune.training.learners.banks import make_bank
from foretune.training.learners.joint import Learner
from foretune.training.token_budget import default_token_budget
from linear_tasks import Net, equal_bits, family

WORDS = ["the", "red", "blue", "green", "cat", "dog", "a", "big", "small", "runs", "sits"]


def choices(names=("a", "b", "c"), rows=6) -> TaskCollection:
    def row(t, i):
        words = [WORDS[(t + i + k) % len(WORDS)] for k in range(1 + (i * 5 + t) % 9)]
        return {
            "context": " ".join(words),
            "candidates": [
                " ".join(WORDS[k : k + 1] + WORDS[(i + k) % 11 : (i + 2 * k) % 11 + 1])
                for k in range(6)
            ],
            "answer": (t + i) % 6,
        }

    tasks = [Task(n, [row(ord(n), i) for i in range(rows)], (), [row(7, 3)]) for n in names]
    return TaskCollection(
        tuple(tasks), foretune.Choice(tiny_models.tokenizer(), train_candidates=3)
    )


def _gradients(budget, *, recompute=False):
    tasks = choices()
    objective = tasks.objective.fit(tasks)
    model = tiny_models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    bank = make_bank(model, objective, tasks.names, 0, lora={"r": 2}).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in bank.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    learner = Learner(model, objective, bank=bank, learning_rate=0.1, bank_learning_rate=0.1)
    learner.start(Run(device="cpu", gradient_checkpointing=recompute))
    picks = [(s, i) for s in range(3) for i in range(2 + 2 * s)]
    step = TaskData.of(tasks, objective).step(picks, "train", train=True, seed=[3], budget=budget)
    model.train()
    with learner.ready():
        losses = learner.backward(step)
    named = [*model.named_parameters(), *bank.named_parameters()]
    return len(step.chunks), losses, {n: p.grad for n, p in named if p.grad is not None}


@pytest.mark.parametrize(
    ("budget", "recompute"), [(1, False), (40, False), (90, False), (60, True)]
)
def test_chunks_and_recomputed_blocks_change_no_gradient(budget, recompute):
    _, losses, grads = _gradients(None)
    count, chunk_losses, chunk_grads = _gradients(budget, recompute=recompute)
    assert count == 12 if budget == 1 else 2 <= count < 12
    assert chunk_losses == pytest.approx(losses, rel=1e-6)
    assert chunk_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(
            chunk_grads[name], grad, rtol=1e-4, atol=1e-6
        )  # cosines are float32


def test_what_is_drawn_for_a_task_depends_on_no_other():
    three_tasks, one_task = choices(), choices(names=("b",))
    drawn = []
    for tasks, slot in ((three_tasks, 1), (one_task, 0)):
        data = TaskData.of(tasks, tasks.objective.fit(tasks))
        picks = [(s, i) for s in range(len(tasks)) for i in range(4)]
        step = data.step(picks, "train", train=True, seed=[5])
        drawn.append(
            [
                int(a)
                for a, s in zip(step.chunks[0].inputs["answer"], step.slots, strict=True)
                if s == slot
            ]
        )
    assert drawn[0] == drawn[1]


def test_the_default_budget_keeps_the_widest_activation_under_32_mb():
    model = tiny_models.bert()
    widest = model.config.intermediate_size
    assert default_token_budget(model) == 32 * 2**20 // 4 // widest
    assert default_token_budget(tiny_models.plain()) is None


def test_encoded_rows_are_kept_within_a_bound():
    tasks = choices()
    data = TaskData.of(tasks, tasks.objective.fit(tasks))
    unbounded = [data.row(0, "train", i) for i in range(6)]
    sizes = [data.objective.size(row) for row in unbounded]
    bounded = TaskData(data.slots, data.objective, max_cached_tokens=sum(sizes[-2:]))
    assert [bounded.row(0, "train", i) for i in range(6)] == unbounded
    assert list(bounded._encoded.values()) == unbounded[-2:]


# --- early stopping ------------------------------------------------------------------------------


def _adapt(tasks, **changes):
    run = Run(steps=12, batch_size=4, device="cpu", warmup=0.0, schedule="constant", **changes)
    return foretune.adapt(Net(), tasks, foretune.LoRA(lora={"r": 2}, learning_rate=0.01), run)


def _validated(worse=()):
    """Tasks of which some have validation rows that contradict what they learn from."""

    def turned(row):
        return {"x": row["x"], "y": [-10 * v for v in row["y"]]}

    tasks = []
    for task in family(3, rows=[24, 24, 24]):
        rows = task.train[:4]
        validation = [turned(r) for r in rows] if task.name in worse else rows
        tasks.append(replace(task, validation=validation))
    return replace(family(3), tasks=tuple(tasks))


def test_a_task_that_no_longer_gains_stops_and_keeps_its_best_state():
    adapted = _adapt(_validated(worse=["task1"]), patience=2, eval_every=1)
    assert set(adapted.stopped) == {("task1", 0)}
    at = adapted.stopped["task1", 0]
    best = at - 2
    until = _adapt(_validated(), eval_every=1)
    for name in ("task0", "task2"):  # the others have not noticed
        assert adapted.scores[name, 0] == pytest.approx(until.scores[name, 0], rel=1e-4)
    short = foretune.adapt(
        Net(), _validated(), foretune.LoRA(lora={"r": 2}, learning_rate=0.01),
        Run(steps=best, batch_size=4, device="cpu", warmup=0.0, schedule="constant"),
    )  # fmt: skip
    for name, value in short.tensors["task1", 0].items():
        torch.testing.assert_close(adapted.tensors["task1", 0][name], value, rtol=1e-4, atol=1e-6)


def test_without_validation_rows_no_task_stops():
    tasks = replace(family(3), tasks=tuple(replace(t, validation=[]) for t in family(3)))
    patient, plain = _adapt(tasks, patience=1, eval_every=1), _adapt(tasks)
    assert not patient.stopped
    for key, tensors in plain.tensors.items():
        assert equal_bits(patient.tensors[key], tensors)


def test_when_all_have_stopped_the_wave_ends():
    seen = []
    tasks = _validated(worse=["task0", "task1", "task2"])
    run = Run(steps=50, batch_size=4, device="cpu", patience=1, eval_every=1)
    method = foretune.LoRA(lora={"r": 2}, learning_rate=0.01)
    foretune.adapt(Net(), tasks, method, run, progress=lambda step, *_: seen.append(step))
    assert max(seen) < 50


@pytest.mark.parametrize("bad", [0, 1.5, "soon"])
def test_patience_is_a_number_of_validations(bad):
    with pytest.raises(UserError, match="patience must be a whole number"):
        Run(patience=bad)


# --- waves ---------------------------------------------------------------------------------------


def test_waves_are_as_large_as_the_free_memory_allows(monkeypatch):
    sizes = []
    plain = adapting._adapt_wave
    monkeypatch.setattr(
        adapting,
        "_adapt_wave",
        lambda m, wave, *a: (sizes.append(len(wave.data)), plain(m, wave, *a))[1],
    )
    probe = (
        foretune.LoRA(lora={"r": 2})
        .learner(Net(), family().objective, ["x"], Run(device="cpu"))
        .bank
    )
    per_task = 16 * probe.parameters_per_slot
    monkeypatch.setattr(adapting, "free_memory", lambda device: 2 * (2 * per_task) + 1)
    small = _adapt(family(3))
    assert sizes == [2, 1]
    monkeypatch.setattr(adapting, "free_memory", lambda device: 2**40)
    large = _adapt(family(3))
    assert sizes == [2, 1, 3]
    assert small.scores == pytest.approx(large.scores, rel=1e-5)
