"""Rows of each task for `fuse`: those that make the gate and those that measure what was fused."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from foretune.errors import UserError
from foretune.tasks.readers import Row, read_rows
from foretune.tasks.split_names import SplitNames

APART = ("", "train", "validation", "test")
MAX_HELD_OUT = 200  # rows per task that measure: a standard error of 3.5 points at most


@dataclass(frozen=True)
class SampleRow:
    """One row of a task.

    Args:
        text: What the model reads; of a prompt and its completion, both.
        prompt: The part of `text` in front of what is scored; empty to score all of it.
        label: Name of its class; None where the row has none.
    """

    text: str
    prompt: str = ""
    label: str | None = None


@dataclass(frozen=True)
class Samples:
    """Rows of each task, in two parts that share no text.

    Args:
        gate: Task → texts, or batches (mappings that the model is called with), that make the gate
            of gate="activations".
        held_out: Task → rows, or batches with "labels", that measure a fused model.
        notes: What the user should know about the rows.
    """

    gate: Mapping[str, Sequence[Any]]
    held_out: Mapping[str, Sequence[Any]]
    notes: Sequence[str] = field(default_factory=list)


def read_samples(file: Path, names: Sequence[str], num_gate: int, seed: int = 0) -> Samples:
    """Draw rows of each task at random, as many of each label as there are.

    Rows of a split "test" are left alone. Where there are rows of a split "validation", these are
    held out and the others make the gate; elsewhere half of the rows are held out.

    Args:
        file: A file of rows with `task` and `text` (or `prompt` and `completion`), and possibly
            `label` and `split`.
        names: Names of the tasks; rows of other tasks are ignored.
        num_gate: Rows per task that make the gate, at most.
        seed: Seed of the draw.

    Raises:
        UserError: A row without a text, or a task with fewer than two texts.
    """
    drawn: dict[str, dict[str, tuple[str, SampleRow]]] = {name: {} for name in names}
    tasks: set[str] = set()
    splits = SplitNames()
    for row in read_rows(str(file), splits):
        task = str(row.fields.get("task"))
        tasks.add(task)
        if task in drawn:
            sample, split = _sample(row), _split_of(row, splits)
            earlier = drawn[task].get(sample.text, ("", sample))[0]
            # A text that stands in several splits belongs to the one that must be kept apart most.
            drawn[task][sample.text] = (max(earlier, split, key=APART.index), sample)
    gate, held_out, notes = {}, {}, []
    for task, rows in drawn.items():
        if not rows:
            shown = ", ".join(sorted(tasks)[:8])
            raise UserError(f"{file} has no rows of task {task}; its tasks: {shown}")
        generator = random.Random(f"{seed}-{task}")
        validation = _shuffled(
            [r for split, r in rows.values() if split == "validation"], generator
        )
        rest = [r for split, r in rows.values() if split not in ("validation", "test")]
        rest = _shuffled(rest, generator)
        _check_number(file, task, len(validation) + len(rest), len(rows))
        if validation and rest:
            makers, measurers = rest[:num_gate], validation
        else:
            pool = validation or rest
            num = min(num_gate, len(pool) // 2)
            makers, measurers = pool[:num], pool[num:]
        gate[task] = [row.text for row in makers]
        held_out[task] = measurers[:MAX_HELD_OUT]
        if not validation and any(split == "train" for split, _ in rows.values()):
            notes.append(
                f"the held-out rows of {task} are of the split train, which its model may have "
                "learned by heart; rows of a split validation measure better"
            )
    return Samples(gate, held_out, notes)


def _split_of(row: Row, splits: SplitNames) -> str:
    """The split of a row; empty where nothing names one."""
    name = row.fields.get("split")
    return splits.split_of(name, row.place) if name is not None else (row.split or "")


def _sample(row: Row) -> SampleRow:
    text, prompt = row.fields.get("text"), row.fields.get("prompt")
    completion = row.fields.get("completion")
    label = row.fields.get("label")
    label = None if label is None else str(label)
    if isinstance(text, str) and text:
        return SampleRow(text, label=label)
    if isinstance(prompt, str) and isinstance(completion, str) and completion:
        return SampleRow(prompt + completion, prompt, label)
    raise UserError(
        f'{row.place}: samples need "task" and "text" (or "prompt" and "completion"), got '
        f"{', '.join(row.fields)}"
    )


def _shuffled(rows: Sequence[SampleRow], generator: random.Random) -> list[SampleRow]:
    """The rows in random order, the labels taking turns."""
    by_label: dict[str | None, list[SampleRow]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    groups = list(by_label.values())
    for group in (groups, *groups):
        generator.shuffle(group)  # type: ignore[arg-type]
    return [row for turn in zip_longest(*groups) for row in turn if row is not None]


def _check_number(file: Path, task: str, usable: int, total: int) -> None:
    if usable < 2:
        beside = f" and {total - usable} of the split test" if total > usable else ""
        raise UserError(
            f"{file} has {usable} texts of task {task}{beside}; two or more are needed, outside "
            "the split test: to make the gate, and to measure"
        )
