"""The forms of the core's adapt methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import foretune
import tiny_models
from contract.cases import AdaptCase
from foretune.adapters.basis_file import set_basis
from foretune.methods import make
from foretune.tasks.task import Task, TaskCollection
from linear_tasks import Net, family

TEMPLATES = ("a {}", "the {} sat", "one {} on the mat", "two {}", "red {}", "blue {} e f")


def load_whole(base: nn.Module, folder: Path) -> nn.Module:
    model = Net()
    safetensors.torch.load_model(model, str(folder / "model.safetensors"))
    return model


def linear(name: str, fields: dict[str, Any], **options: Any) -> AdaptCase:
    fields = {"learning_rate": 0.03, **fields}
    return AdaptCase(name, fields, Net, lambda: family(rows=[24, 5, 24]), shots=8, **options)


def with_basis(method: str) -> Callable[[], nn.Module]:
    """Builds a base with a basis of adapters of that kind."""

    def build() -> nn.Module:
        base, run = Net(), foretune.Run(steps=30, device="cpu")
        fit = make(method, learning_rate=0.03)
        set_basis(base, foretune.fit_basis(base, family(4, prefix="seen"), fit, run))
        return base

    return build


def from_basis(method: str, **fields: Any) -> AdaptCase:
    tasks = lambda: family(rows=[24, 12, 24])  # noqa: E731
    return AdaptCase("basis", fields, with_basis(method), tasks, shots=8, label=method)


def prompt_model() -> nn.Module:
    model = tiny_models.clip()
    with torch.no_grad():  # random towers of this size embed everything almost alike
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return model


def prompt_tasks() -> TaskCollection:
    """One task with images of three classes, and one with two of them."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        {
            "x": (torch.randn(3, 8, 8, generator=generator) + i % 3).numpy(),
            "y": ("cat", "dog", "mat")[i % 3],
        }
        for i in range(12)
    ]
    two = [example for example in examples if example["y"] != "mat"]
    objective = foretune.PromptClassification(tiny_models.tokenizer(), templates=TEMPLATES)
    return TaskCollection(
        (Task("three", examples, (), examples), Task("two", two, (), two)), objective
    )


def fd_align(fields: dict[str, Any], **options: Any) -> AdaptCase:
    return AdaptCase("fd-align", fields, prompt_model, prompt_tasks, **options)


ADAPT_CASES = [
    linear("full", {}, file="model.safetensors", reload=load_whole),
    linear("head", {}),
    linear("lora", {"lora": {"r": 2, "lora_alpha": 2}}),
    linear("sara", {"fraction": 0.5}, file="sparse_delta.safetensors", reload=foretune.load_sparse),
    from_basis("lora", free=1.0),
    from_basis("head"),
    # Its score is an accuracy, which a few small steps need not change.
    fd_align(
        {
            "learning_rate": 1e-3,
            "weight": 2.0,
            "num_kept": 5,
            "direction": "reverse",
            "interpolate": 0.5,
        },
        file="model.safetensors",
        progress_steps=None,
        label="reverse",
    ),
    fd_align(
        {"learning_rate": 0.01, "lora": {"r": 2, "lora_alpha": 2}},
        progress_steps=None,
        label="lora",
    ),
]
