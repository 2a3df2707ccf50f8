"""The forms of subspace SFDA."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import foretune
from contract.cases import AdaptCase
from foretune.source_free.core_state import load_core
from foretune.source_free.time_series_cnn import TimeSeriesCNN
from foretune.source_free.tucker import tuckerize
from foretune.tasks.task import Task, TaskCollection


def windows(count: int, seed: int, shift: float = 0.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, 3])
    time = np.arange(24)
    examples = []
    for i in range(count):
        wave = np.sin(time * (0.4 + 0.5 * (i % 3)) + rng.uniform(0, 6))
        x = np.stack([wave, shift + 0.5 * wave, np.roll(wave, 3)]) + 0.3 * rng.normal(size=(3, 24))
        examples.append({"x": x.astype("f4"), "y": "abc"[i % 3]})
    return examples


def model(factored: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = TimeSeriesCNN(3, 3, mid=4, features=8, dropout=0.0).eval()
    if factored:
        tuckerize(network, rank_factor=2)
    return network


def tasks() -> TaskCollection:
    """Two targets of a labelled source; labels are there for the scores alone."""
    source = TaskCollection((Task("source", windows(12, 9)),))
    objective = foretune.Unlabelled(source=foretune.Classification().fit(source))
    targets = [
        Task(f"target{k}", windows(18, k, 0.7), (), windows(9, 7 + k, 0.7)) for k in range(2)
    ]
    return TaskCollection(tuple(targets), objective)


def case(label: str, **fields: Any) -> AdaptCase:
    return AdaptCase(
        "subspace-sfda",
        {"learning_rate": 1e-2, **fields},
        model,
        tasks,
        file="core.safetensors",
        reload=load_core,
        progress_steps=None,  # it minimises no loss of labels
        label=label,
    )


ADAPT_CASES = [
    case("shot"),
    case("aad", loss="aad", tuned="all", rank_factor=None, entropy=0.5),
    case("nrc", loss="nrc", bn="affine"),
]
