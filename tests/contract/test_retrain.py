"""One contract for every form of each retrain method."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import foretune
import linear_tasks
import tiny_models
from contract.retrain_forms import FORMS, PEFT_ML_BOTH, TRAINED_FORMS, named
from foretune.methods import make
from foretune.models.loading import load_base, load_module
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import copy_of, equal_bits, family

# 12 steps: whole updates for 3 inner steps (Reptile) and for 3 + 1 (FOMAML).
RUN = Run(steps=12, batch_size=4, eval_every=4, device="cpu", weight_decay=0.0)


def _retrain(name, fields, *, model=None, tasks=None, **changes):
    model = linear_tasks.Net() if model is None else model
    return foretune.retrain(model, tasks or family(), make(name, **fields), RUN.replace(**changes))


@pytest.mark.parametrize(("name", "fields"), named(FORMS))
def test_retraining_does_not_change_its_input(name, fields):
    model = linear_tasks.Net()
    model.body.bias.requires_grad_(False)
    before, trainable = copy_of(model), [p.requires_grad for p in model.parameters()]
    result = _retrain(name, fields, model=model).model
    assert equal_bits(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(result.body.bias, model.body.bias)  # frozen in, frozen out
    shapes = {k: v.shape for k, v in result.state_dict().items()}
    assert shapes == {k: v.shape for k, v in before.items()}
    assert all(not m.training and "forward" not in vars(m) for m in result.modules())


@pytest.mark.parametrize(("name", "fields"), named(FORMS))
def test_same_seed_same_bits(name, fields):
    torch.manual_seed(7)
    first = _retrain(name, fields, seed=3)
    torch.manual_seed(8)
    second, third = _retrain(name, fields, seed=3), _retrain(name, fields, seed=4)
    assert equal_bits(first.model.state_dict(), second.model.state_dict())
    assert first.history == second.history
    assert equal_bits(first.model.state_dict(), third.model.state_dict()) == (name == "none")


def test_global_random_state_is_unchanged():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    _retrain(*FORMS[3])
    foretune.adapt(linear_tasks.Net(), family(), make("lora"), RUN)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "fields"), named(FORMS))
def test_cost_is_reported(name, fields):
    cost = _retrain(name, fields).cost
    assert {"tokens", "examples", "seconds", "cpu_seconds", "peak_memory_mb"} <= set(cost)
    assert (cost["trainable_parameters"] == 0) == (name == "none")


@pytest.mark.parametrize("rows", [24, [24, 2, 9]])
@pytest.mark.parametrize("together", [None, 1])
def test_budgets_are_equal(rows, together):
    tasks = family(rows=rows)
    counted = {
        str((name, fields)): _retrain(
            name, fields, tasks=tasks, tasks_per_step=together, eval_every=0
        ).cost["examples"]
        for name, fields in TRAINED_FORMS
    }
    low, high = min(counted.values()), max(counted.values())
    # Within one update: where a task has fewer rows than a batch, visits are not all of one size.
    assert high == low if rows == 24 else high - low <= 4 * RUN.batch_size, counted


def _distance(model, tasks):
    """Squared distance to the weights that the family shares, from the model's outputs only."""
    x = torch.eye(4)
    with torch.no_grad():
        w = (model(x) - model(torch.zeros(1, 4))).T.numpy()
    return float(np.sum((w - linear_tasks.shared_weight()) ** 2))


@pytest.mark.parametrize(
    ("name", "fields"),
    # The model is one layer, which is the head: form both has nothing left to adapt.
    named([f for f in TRAINED_FORMS if f[0] != "auto" and f != PEFT_ML_BOTH]),
)
def test_retraining_comes_closer_to_a_known_answer(name, fields):
    tasks = family(6, offset=0.2)
    model = linear_tasks.Net(hidden=None)
    result = _retrain(
        name,
        {**fields, "learning_rate": 0.1},
        model=model,
        tasks=tasks,
        steps=120,
        batch_size=8,
        eval_every=0,
        warmup=0.0,
    ).model
    left = 1 - fields.get("interpolate", 1.0)
    assert _distance(result, tasks) < (0.1 + left**2) * _distance(model, tasks)


@pytest.mark.parametrize(
    ("name", "fields"), named([f for f in TRAINED_FORMS if {"form", "num_factors"} & set(f[1])])
)
def test_per_task_heads_make_progress(name, fields):
    before = _retrain("none", {}).validation_score
    assert _retrain(name, fields, steps=60).validation_score > before + 0.5 * abs(before)


@pytest.mark.parametrize(("name", "fields"), named(FORMS))
def test_saved_base_gives_the_same_outputs(name, fields, tmp_path):
    model = load_module(linear_tasks.module_file(tmp_path), hidden=6)
    outcome = _retrain(name, fields, model=model)
    outcome.save(tmp_path / "out")
    loaded, _ = load_base(tmp_path / "out" / "base")
    x = torch.randn(5, 4)
    assert torch.equal(loaded(x), outcome.model(x))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["finished"] and make(**record["method"]) == outcome.method
    folders = tmp_path / "out" / "adapters"
    assert folders.is_dir() == (outcome.bank is not None)
    moved = {"interpolate", "average"} & set(fields)  # the adapters fit the weights before that
    saves_adapters = (
        name in ("peft-ml", "factorised-heads") and not moved and fields.get("form") != "sparse"
    )
    assert (outcome.bank is not None) == saves_adapters


def _classification(*, same_labels: bool = False) -> TaskCollection:
    words = ("red", "blue", "cat", "dog")
    rows = [{"text": f"the {w} sat on {v}", "label": w} for w in words[:2] for v in words] * 2
    more = [{"text": f"a {v} {w}", "label": w} for w in words[2:] for v in words] * 2
    more = rows if same_labels else more
    tasks = (Task("colour", rows, rows[:4], rows), Task("animal", more, more[:4], more))
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    return TaskCollection(tasks, objective)


@pytest.mark.parametrize(("name", "fields"), named(FORMS))
def test_a_hugging_face_model_goes_through_and_is_loaded_by_transformers(name, fields, tmp_path):
    import transformers

    model = tiny_models.bert(num_labels=4 if name == "standard" else 2, num_hidden_layers=1)
    fields = {k: v for k, v in fields.items() if k != "lora"}
    outcome = _retrain(
        name,
        fields,
        model=model,
        tasks=_classification(same_labels=name == "factorised-heads"),
        steps=4,
        batch_size=2,
        out=tmp_path / "x",
    )
    assert list(outcome.model.state_dict()) == list(model.state_dict())
    auto = transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "x" / "base").eval()
    ids = torch.randint(4, tiny_models.VOCABULARY, (2, 6))
    assert torch.equal(loaded(ids).logits, outcome.model(ids).logits)
