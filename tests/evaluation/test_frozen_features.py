"""Conflict on features of a model: what models give, and that it is what the tasks are told by."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import foretune
import tiny_models
from foretune.evaluation.frozen_features import conflict_on, embed_texts
from foretune.models.tower import TowerConfig, TowerForSequenceClassification
from foretune.recipes.conflict import recipe_conflict
from foretune.recipes.console import SILENT
from foretune.recipes.schema import load_recipe
from foretune.tasks.candidates import draw_candidates
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import Net, family

TOKENIZER = tiny_models.tokenizer()


def texts(rng: np.random.Generator, number: int) -> list[str]:
    return [" ".join(rng.choice(tiny_models.WORDS, size=7)) for _ in range(number)]


def tastes(model: Any, *, contrary: bool) -> TaskCollection:
    """Tasks that label texts of their own by one direction of the model, half of them contrary."""
    rng, tasks = np.random.default_rng(0), []
    objective = foretune.Classification(TOKENIZER)
    direction = rng.normal(size=16)
    for task in range(24):
        rows = texts(rng, 30)
        scores = embed_texts(model, objective, rows) @ direction
        labels = (scores > np.median(scores)) ^ (contrary and task % 2 == 0)
        examples = [{"text": t, "label": "ny"[int(y)]} for t, y in zip(rows, labels, strict=True)]
        tasks.append(Task(f"t{task}", examples))
    return TaskCollection(tuple(tasks), objective)


@pytest.mark.parametrize("build", [tiny_models.bert, tiny_models.llama, tiny_models.t5])
def test_a_text_is_the_mean_of_its_last_states(build: Any) -> None:
    model, rows = build(), ["the cat", "a red dog sat on the mat"]
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    means = [
        body(input_ids=torch.tensor([TOKENIZER(row)["input_ids"]])).last_hidden_state[0].mean(0)
        for row in rows
    ]
    embedded = embed_texts(model, foretune.Classification(TOKENIZER), rows)
    np.testing.assert_allclose(embedded, torch.stack(means).detach().numpy(), atol=1e-5)


def test_a_text_of_a_tower_is_what_its_frozen_encoder_gives() -> None:
    encoder = tiny_models.bert()
    objective = foretune.Classification(TOKENIZER)
    config = TowerConfig(encoder=encoder.config.to_dict(), widths=[4], num_labels=2)
    tower = TowerForSequenceClassification(config, encoder)
    rows = ["the cat", "a red dog sat on the mat"]
    expected = embed_texts(encoder, objective, rows)
    np.testing.assert_allclose(embed_texts(tower, objective, rows), expected, atol=1e-5)


def test_tasks_that_label_texts_contrary_to_one_another_are_told_from_those_that_agree() -> None:
    model = tiny_models.bert()
    agreed = conflict_on(model, tastes(model, contrary=False), shots=(None,))
    assert agreed.advice == "pool" and agreed.over == "features"
    assert conflict_on(model, tastes(model, contrary=True), shots=(None,)).advice == "PEFT-ML"


def test_arrays_are_told_by_the_better_of_themselves_and_the_head_s_input() -> None:
    rng, net = np.random.default_rng(0), Net()
    with torch.no_grad():
        net.body.weight.mul_(8)  # so that the layer is far from linear
    tasks = []
    for task in range(30):
        x = rng.normal(size=(60, 4)).astype(np.float32)
        states = torch.tanh(net.body(torch.from_numpy(x))).detach().numpy()
        labels = states @ np.arange(-2.5, 3, 1) > 0
        rows = [{"x": a, "y": int(b)} for a, b in zip(x, labels, strict=True)]
        tasks.append(Task(f"t{task}", rows))
    collection = TaskCollection(tuple(tasks), foretune.Classification())
    on_model = conflict_on(net, collection, shots=(None,))
    on_arrays = conflict_on(Net(hidden=None), collection, shots=(None,))  # has no features
    assert on_model.by_shots[0].r2["pooled"] > on_arrays.by_shots[0].r2["pooled"] + 0.1


def test_measuring_changes_neither_the_model_nor_its_mode() -> None:
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    conflict_on(net, family(6), shots=(None,))
    assert net.training and not net.out._forward_pre_hooks
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_distractors_of_a_recipe_s_part_are_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tasks = [
        Task(f"t{task}", [{"context": c, "response": r} for c, r in zip(*rows, strict=True)])
        for task in range(8)
        for rows in [(texts(rng, 20), texts(rng, 20))]
    ]
    objective = foretune.Choice(TOKENIZER)
    drawn = draw_candidates(TaskCollection(tuple(tasks), objective), 5, pool=6)
    overrides = ["tasks.num_candidates=5", "tasks.source=x", "adapt.shots=[4]"]
    setup: Any = SimpleNamespace(
        recipe=load_recipe("convai2", overrides), model=tiny_models.bert(), all_seen=drawn
    )
    conflict = recipe_conflict(setup, SILENT)
    assert not isinstance(conflict, str) and conflict.over == "responses"
    assert conflict.num_rows == 160 and 0.05 < conflict.by_shots[0].scores["blank"][0] < 0.5


def test_other_objectives_are_not_measured() -> None:
    recipe = load_recipe("convai2", ["tasks.source=x"])
    recipe = recipe.model_copy(update={"objective": SimpleNamespace(kind="causal-lm")})
    setup: Any = SimpleNamespace(recipe=recipe)
    assert recipe_conflict(setup, SILENT) == "it cannot be measured for causal-lm"
    few = dataclasses.replace(family(3), objective=foretune.Regression())
    setup = SimpleNamespace(
        recipe=recipe.model_copy(update={"objective": SimpleNamespace(kind="regression")}),
        model=Net(),
        all_seen=few,
    )
    assert str(recipe_conflict(setup, SILENT)).startswith("it cannot be measured: it takes 4 seen")
