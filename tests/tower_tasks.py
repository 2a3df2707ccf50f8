"""Folders of tiny encoders, and tasks of texts that disagree about the same texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import foretune
import tiny_models
from foretune.tasks.task import Task, TaskCollection

TEXTS = (
    "the cat sat",
    "a red dog",
    "one two three blue",
    "the mat",
    "green cat on the mat",
    "h g f",
)


def encoder_folder(folder: Path, model: Any = None) -> Path:
    """A saved encoder with its tokenizer."""
    (tiny_models.bert() if model is None else model).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def opinions(num_tasks: int = 4, start: int = 0) -> TaskCollection:
    """Tasks that label the same texts "no" or "yes", each in its own way."""
    tasks = []
    for number in range(start, start + num_tasks):
        rng = np.random.default_rng(number)
        rows = [
            {"text": text, "label": label}
            for text, label in zip(TEXTS, rng.permutation(["no", "yes"] * 3).tolist(), strict=True)
        ]
        tasks.append(Task(f"p{number}", train=rows, validation=rows[:2], test=rows))
    objective = foretune.Classification(tiny_models.tokenizer(), max_tokens=16)
    return TaskCollection(tuple(tasks), objective)


def replies(num_tasks: int = 3) -> TaskCollection:
    """Tasks of choosing a reply to a text."""
    tasks = []
    for number in range(num_tasks):
        rows = [
            {"context": text, "candidates": [TEXTS[i], TEXTS[(i + 1) % 6], "blue"], "answer": 0}
            for i, text in enumerate(np.roll(TEXTS, number).tolist())
        ]
        tasks.append(Task(f"p{number}", train=rows, validation=rows[:2], test=rows))
    return TaskCollection(tuple(tasks), foretune.Choice(tiny_models.tokenizer()))
