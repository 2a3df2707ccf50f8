"""One contract for every form of each adapt method, on a model and tasks that suit it."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import safetensors.torch
import torch

import foretune
import tiny_models
from contract.cases import adapt_cases
from foretune.errors import UserError
from foretune.methods import make
from foretune.run import Run
from foretune.tasks.task import Task, TaskCollection
from foretune.training.data import TaskData
from linear_tasks import Net, copy_of, equal_bits, family

CASES = adapt_cases()
RUN = Run(steps=6, batch_size=8, eval_every=0, device="cpu", weight_decay=0.0)


def adapt(case, *, model=None, tasks=None, draws=2, **changes):
    return foretune.adapt(
        case.model() if model is None else model,
        case.tasks() if tasks is None else tasks,
        case.method,
        RUN.replace(**changes),
        shots=case.shots,
        draws=draws,
    )


def mean_score(adapted):
    return np.mean(list(adapted.scores.values()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_base_is_unchanged_and_every_task_and_draw_is_scored(case):
    model, tasks = case.model(), case.tasks()
    next(model.parameters()).requires_grad_(False)
    before, requires_grad = copy_of(model), [p.requires_grad for p in model.parameters()]
    adapted = adapt(case, model=model)
    assert equal_bits(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    assert all("forward" not in vars(module) for module in model.modules())
    assert set(adapted.scores) == {(task.name, draw) for task in tasks for draw in range(2)}
    assert all(adapted.num_rows[task.name, 0] == len(task.test) for task in tasks)
    assert {"tokens", "examples", "seconds", "trainable_parameters"} <= set(adapted.cost)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_seed_same_bits(case):
    torch.manual_seed(7)
    first = adapt(case, seed=3)
    torch.manual_seed(8)
    second, third = adapt(case, seed=3), adapt(case, seed=4)
    assert first.scores == second.scores
    for key, tensors in first.tensors.items():
        assert equal_bits(tensors, second.tensors[key])
        assert not equal_bits(tensors, third.tensors[key])
    for key, model in first.models.items():
        assert equal_bits(model.state_dict(), second.models[key].state_dict())
        assert not equal_bits(model.state_dict(), third.models[key].state_dict())


@pytest.mark.parametrize("case", [c for c in CASES if c.progress_steps], ids=str)
def test_adapting_makes_progress(case):
    options = {"draws": 1, "schedule": "constant", "warmup": 0.0}
    short = adapt(case, steps=1, **options)
    assert mean_score(adapt(case, steps=case.progress_steps, **options)) > mean_score(short)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_task_does_not_depend_on_the_others(case):
    tasks = case.tasks()
    together = adapt(case, tasks=tasks)
    waves = adapt(case, tasks=tasks, tasks_per_wave=2)
    alone = adapt(case, tasks=tasks.subset(tasks.names[1:2]), draws=1)
    key = tasks.names[1], 0
    assert waves.scores == pytest.approx(together.scores, rel=1e-4)
    assert alone.scores[key] == pytest.approx(together.scores[key], rel=1e-4)
    for slot, tensors in together.tensors.items():
        for name, value in tensors.items():
            torch.testing.assert_close(waves.tensors[slot][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_task_is_saved_in_a_folder_and_loads_bit_for_bit(case, tmp_path):
    base = case.model()
    adapted = adapt(case, model=base)
    adapted.save(tmp_path)
    folders = {
        name if draw == 0 else f"{name}-draw{draw}": (name, draw) for name, draw in adapted.scores
    }
    assert {path.name for path in tmp_path.iterdir()} == set(folders)
    for folder, key in folders.items():
        files = {path.name for path in (tmp_path / folder).iterdir()}
        assert case.file in files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
        if case.reload is not None:
            loaded = case.reload(base, tmp_path / folder)
            assert equal_bits(loaded.state_dict(), adapted.models[key].state_dict())


@pytest.mark.parametrize("name", ["lora", "head"])
def test_a_task_does_not_depend_on_how_many_labels_the_others_have(name):
    rows = [{"text": f"the {w}", "label": w} for w in ("red", "blue", "green", "cat", "dog")] * 2
    few = Task("few", [r for r in rows if r["label"] in ("red", "blue")], (), rows[:2])
    objective = foretune.Classification(tokenizer=tiny_models.tokenizer())
    model = tiny_models.bert(num_labels=2, num_hidden_layers=1)
    run = RUN.replace(steps=3, batch_size=4)
    beside_two, beside_three = (
        foretune.adapt(
            model,
            TaskCollection((few, Task("other", others, (), others)), objective),
            make(name, learning_rate=0.01),
            run,
        ).tensors["few", 0]
        for others in (
            [r for r in rows if r["label"] in ("cat", "dog")],
            [r for r in rows if r["label"] in ("cat", "dog", "green")],
        )
    )
    for k, value in beside_two.items():
        torch.testing.assert_close(beside_three[k][: len(value)], value, rtol=1e-3, atol=1e-5)


def test_a_model_that_the_caller_put_in_place_is_the_one_saved(tmp_path):
    base, tasks = Net(), family(rows=[24, 24, 24])
    adapted = foretune.adapt(base, tasks, make("full", learning_rate=0.03), RUN)
    adapted.models["task0", 0] = replacement = Net(seed=5)
    adapted.save(tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "task0" / "model.safetensors")
    assert equal_bits(saved, replacement.state_dict())
    saved = safetensors.torch.load_file(tmp_path / "task1" / "model.safetensors")
    assert equal_bits(saved, adapted.models["task1", 0].state_dict())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_result_does_not_hold_the_tasks_examples(case):
    adapted = adapt(case, draws=1)
    gc.collect()
    results = [adapted, *adapted.learners.values()]
    assert not [
        o for result in results for o in gc.get_referents(vars(result)) if isinstance(o, TaskData)
    ]
    assert all(learner.partition is None for learner in adapted.learners.values())


class Homemade:
    """It has what an objective has, but does not subclass the protocol, and so no defaults."""

    kind = "homemade"


def test_an_objective_that_does_not_subclass_the_protocol_is_refused_in_one_line():
    tasks = family().with_objective(Homemade())
    with pytest.raises(UserError, match="Homemade is not an objective: it must subclass"):
        foretune.adapt(Net(), tasks, make("full"), RUN)
