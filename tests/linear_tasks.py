"""A task family whose answer is known: y = (W + U_t) x, with one W for all tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from foretune.tasks.objectives.regression import Regression
from foretune.tasks.task import Task, TaskCollection

MODULE = """\
import torch


class Net(torch.nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.body = torch.nn.Linear(4, hidden)
        self.out = torch.nn.Linear(hidden, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.body(x)))


class Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.out(x)


def build(hidden=6):
    return Flat() if hidden is None else Net(hidden)
"""


def shared_weight(seed: int = 0) -> np.ndarray:
    """W of `family` with the same seed."""
    return np.random.default_rng(seed).normal(size=(3, 4))


def family(
    num_tasks: int = 3,
    *,
    rows: int | list[int] = 24,
    validation: int = 8,
    test: int = 8,
    offset: float = 0.3,
    seed: int = 0,
    prefix: str = "task",
) -> TaskCollection:
    """Tasks with offsets U_t of rank one; `rows` training rows of each, or of each in turn."""
    w = shared_weight(seed)
    sizes = rows if isinstance(rows, list) else [rows] * num_tasks
    tasks = []
    for t, size in enumerate(sizes):
        rng = np.random.default_rng([seed, t, len(prefix)])
        wt = w + offset * np.outer(rng.normal(size=3), rng.normal(size=4))
        x = rng.normal(size=(size + validation + test, 4)).astype("f4")
        y = (x @ wt.T).astype("f4")
        examples = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
        ends = size, size + validation
        tasks.append(
            Task(
                f"{prefix}{t}",
                examples[: ends[0]],
                examples[ends[0] : ends[1]],
                examples[ends[1] :],
            )
        )
    return TaskCollection(tuple(tasks), Regression())


class Net(nn.Module):
    """Two linear layers, float32, seeded; `hidden=None` for one layer without bias."""

    def __init__(self, hidden: int | None = 6, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Identity() if hidden is None else nn.Linear(4, hidden)
            self.act = nn.Identity() if hidden is None else nn.Tanh()
            self.out = nn.Linear(4 if hidden is None else hidden, 3, bias=hidden is not None)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.body(x)))


def module_file(folder: Path) -> Path:
    """A user's file with a model for these tasks."""
    file = folder / "user_model.py"
    file.write_text(MODULE)
    return file


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two states hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """A snapshot of a model's state."""
    return {k: v.clone() for k, v in model.state_dict().items()}
