"""The linear theory of Block et al. (arXiv:2410.22264), through the library's own bank and loop.

    y = (A* + U_t U_tᵀ) x + noise,   A* symmetric (d, d),  U_t of shape (d, k),   T seen tasks

Standard retraining ends at A* + mean_t U_t U_tᵀ, which is off A* by rank kT, so an unseen task is
k(T+1) ranks away. Retraining with one adapter of rank k for each task recovers A* from T = 3 on,
and an unseen task is k ranks away; with T = 2 an error of rank 2k remains.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from torch import nn

import foretune
from foretune.run import Run
from foretune.tasks.objectives.regression import Regression
from foretune.tasks.task import Task, TaskCollection

pytestmark = pytest.mark.slow  # about fifteen seconds in all

D, K, NOISE = 10, 1, 0.01
ROWS, SHOTS = 600, 80
SEED = 2


def _run(steps: int, batch_size: int) -> Run:
    return Run(
        steps=steps, batch_size=batch_size, weight_decay=0.0, max_grad_norm=None, eval_every=0,
        device="cpu", warmup=0.0,
    )  # fmt: skip


@cache
def _problem(num_tasks: int):
    """(A*, seen tasks, the unseen task, its true weight)."""
    rng = np.random.default_rng(SEED)
    a = rng.normal(size=(D, D))
    a = (a + a.T) / 2
    us = rng.normal(size=(4, D, K))  # three seen ones at most, and the unseen one

    def rows(w: np.ndarray, count: int) -> list[dict]:
        x = rng.normal(size=(count, D)).astype("f4")
        y = (x @ w.T + NOISE * rng.normal(size=(count, D))).astype("f4")
        return [{"x": x, "y": y} for x, y in zip(x, y, strict=True)]

    seen = [Task(f"task{t}", rows(a + us[t] @ us[t].T, ROWS)) for t in range(num_tasks)]
    w = a + us[3] @ us[3].T
    shots = rows(w, SHOTS)
    unseen = TaskCollection((Task("new", shots, (), shots[:1]),), Regression())
    return a, TaskCollection(tuple(seen), Regression()), unseen, w


@cache
def _retrained(name: str, num_tasks: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(D, D, bias=False))
    nn.init.zeros_(model[0].weight)
    method = {
        "peft-ml": foretune.PEFTML(
            learning_rate=0.05, adapter_learning_rate=0.05, lora={"r": K, "lora_alpha": K}
        ),
        "standard": foretune.Standard(learning_rate=0.05),
    }[name]
    steps = 800 if name == "peft-ml" else 400
    outcome = foretune.retrain(model, _problem(num_tasks)[1], method, _run(steps, 32))
    return outcome.model


def _weight(model: nn.Module) -> np.ndarray:
    return model[0].weight.detach().numpy()


def _offset(name: str, num_tasks: int) -> np.ndarray:
    """Singular values of what the retrained base is off A*."""
    return np.linalg.svd(_weight(_retrained(name, num_tasks)) - _problem(num_tasks)[0])[1]


def _error_after_adapting(name: str, rank: int, num_tasks: int = 3) -> float:
    """‖Ŵ − W*‖² on the unseen task, over the whole population of its inputs."""
    _, _, unseen, w = _problem(num_tasks)
    method = foretune.LoRA(learning_rate=0.1, lora={"r": rank, "lora_alpha": rank})
    model = _retrained(name, num_tasks)
    adapted = foretune.adapt(model, unseen, method, _run(600, SHOTS))
    a, b = adapted.tensors["new", 0].values()
    assert a.shape == (rank, D)
    return float(np.sum((_weight(model) + (b @ a).numpy() - w) ** 2))


def test_peft_ml_recovers_the_shared_weight():
    assert np.sum(_offset("peft-ml", 3) ** 2) < 1e-5


def test_peft_ml_leaves_an_unseen_task_one_rank_away():
    assert _error_after_adapting("peft-ml", rank=K) < 1e-4


def test_standard_retraining_is_off_by_rank_k_times_tasks():
    values = _offset("standard", 3)
    assert values[K * 3 - 1] > 0.3
    assert values[K * 3] < 0.03


@pytest.mark.parametrize(
    ("rank", "low", "high"),
    [(K, 10, np.inf), (K * 3, 1e-2, np.inf), (K * 4, 0, 1e-3)],
)
def test_standard_retraining_leaves_an_unseen_task_four_ranks_away(rank, low, high):
    assert low < _error_after_adapting("standard", rank) < high


def test_two_tasks_are_too_few_for_peft_ml():
    values = _offset("peft-ml", 2)
    assert values[2 * K - 1] > 0.01
    assert values[2 * K] < 0.01 * values[0]
