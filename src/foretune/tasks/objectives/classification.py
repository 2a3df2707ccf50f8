"""`Classification`: one label for a text or an array."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from foretune.errors import UserError, did_you_mean
from foretune.models.routing import route
from foretune.run import check_at_least
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS
from foretune.tasks.objectives import text
from foretune.tasks.objectives.regression import check_arrays, stack
from foretune.tasks.task import Objective, Task, TaskCollection

Label = str | int | float
LEARNT = {"learnt": True}


@dataclass(frozen=True)
class Classification(Objective):
    """One label for a text (`text`, `label`) or for an array (`x`, `y`).

    Where all tasks have one label set, a label has one id in all of them. Otherwise ids are local:
    a task's own labels, sorted, are 0, 1, …, so that tasks with unlike labels can have heads of
    one width; logits beyond a task's own labels do not count. `shared` gives the form with one id
    for each label over all tasks, for a single head that serves them all.

    Args:
        tokenizer: The model's tokenizer; None where the examples are arrays.
        max_tokens: Longest text, special tokens included; what is cut is its end.
        labels: The labels of each task, learnt by `fit`.
        space: The labels over all tasks where ids are shared, learnt by `fit` and `shared`; None
            where ids are local.
    """

    tokenizer: Any = field(default=None, repr=False, compare=False)
    _: KW_ONLY
    max_tokens: int = 128
    labels: Mapping[str, tuple[Label, ...]] = field(
        default_factory=dict, repr=False, hash=False, metadata=LEARNT
    )
    space: tuple[Label, ...] | None = field(default=None, repr=False, metadata=LEARNT)

    kind: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        check_at_least("max_tokens", self.max_tokens, 1)
        labels = {name: tuple(known) for name, known in self.labels.items()}
        object.__setattr__(self, "labels", labels)
        if self.space is not None:
            object.__setattr__(self, "space", tuple(self.space))

    @property
    @override
    def head(self) -> str:
        return "image-classification" if self.tokenizer is None else "classification"

    @override
    def num_outputs(self) -> int | None:
        if self.space is not None:
            return len(self.space)
        return max((len(known) for known in self.labels.values()), default=None)

    @override
    def chance(self) -> float | None:
        """The mean over tasks of 1 / number of the task's labels."""
        if not self.labels:
            return None
        return sum(1 / len(known) for known in self.labels.values()) / len(self.labels)

    @override
    def shared(self) -> Self:
        """The form with one id for each label over all tasks."""
        if self.space is not None:
            return self
        union = sort_labels(label for known in self.labels.values() for label in known)
        return dataclasses.replace(self, space=union)

    @override
    def local(self) -> Self:
        """The form whose ids are a task's own, for a head of each task's own."""
        return dataclasses.replace(self, space=None)

    @override
    def output_labels(self, task: str) -> tuple[Label | None, ...]:
        """The labels of a head's outputs in a task, in their order; outputs beyond mean nothing.

        None for a label that the task has not: its output does not count in loss and score either.
        """
        known = self.labels[task]
        return known if self.space is None else tuple(v if v in known else None for v in self.space)

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Learns each task's labels from its training rows.

        Fitted anew to other tasks, ids stay shared if the labels of those tasks are all known: a
        head that was trained on seen tasks then means the same on unseen ones. Otherwise each of
        those tasks needs a head of its own, and ids are local.

        Raises:
            UserError: A row without a label, or one whose label its task's training rows lack.
        """
        # A recipe fits before there is a tokenizer, so it is the rows that say what they are.
        texts = any("text" in row for task in tasks for row in task.train)
        if self.tokenizer is None and not texts:
            check_arrays(tasks, ("x",))
        labels = {task.name: self._labels(task) for task in tasks}
        found = set().union(*labels.values())
        space = self.space
        if not self.labels:
            space = sort_labels(found) if len(set(labels.values())) == 1 else None
        elif space is not None and not found <= set(space):
            space = None
        return dataclasses.replace(self, labels=labels, space=space)

    def _labels(self, task: Task) -> tuple[Label, ...]:
        known = sort_labels(
            self._label(row, f'task "{task.name}", train row {i + 1}')
            for i, row in enumerate(task.train)
        )
        if not known:
            raise UserError(
                f'task "{task.name}" has no training rows, so its labels are unknown; '
                "it needs one row of each label"
            )
        for split in SPLITS[1:]:
            for i, row in enumerate(task.split(split)):
                label = self._label(row, f'task "{task.name}", {split} row {i + 1}')
                if label not in known:
                    raise UserError(
                        f'task "{task.name}": label {label!r} of {split} row {i + 1} is in none of '
                        f"its training rows, which have {shown(known)}: give it one there, or "
                        "leave it out"
                    )
        return known

    def _label(self, row: Mapping[str, Any], where: str) -> Label:
        name = "y" if self.tokenizer is None and "text" not in row else "label"
        value = row.get(name)
        value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
        if not isinstance(value, (str, int, float)):
            raise UserError(
                f'{where}: "{name}" must be a label (text or a number), got {value!r:.60}; '
                f"the row has {', '.join(row)}"
            )
        return value

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        known = self.labels.get(task)
        if known is None:
            raise UserError(
                f'the objective was not fitted on task "{task}".{did_you_mean(task, self.labels)}'
            )
        label = self._label(example, f'task "{task}"')
        if label not in known:
            raise UserError(f'task "{task}": label {label!r} is not one of {shown(known)}')
        space = known if self.space is None else self.space
        encoded: dict[str, Any] = {
            "label": space.index(label),
            "valid": [i for i, other in enumerate(space) if other in known],
        }
        if self.tokenizer is None:
            if "text" in example:
                raise UserError("a text needs a tokenizer: Classification(tokenizer)")
            encoded["x"] = np.asarray(example["x"], dtype=np.float32)
            return encoded
        single = text.single_template(self.tokenizer)
        ids = text.plain_ids(self.tokenizer, [text.text_of(example, "text", task)])[0]
        encoded["input_ids"] = single.fill(ids[: single.room(self.max_tokens, "max_tokens")])
        return encoded

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        return len(row.get("input_ids", "1"))

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        width = self.num_outputs() or 1 + max(max(row["valid"]) for row in rows)
        valid = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            valid[i, row["valid"]] = True
        inputs = {
            "valid": torch.from_numpy(valid),
            "label": torch.tensor([row["label"] for row in rows]),
        }
        if self.tokenizer is None:
            inputs["x"] = stack([row["x"] for row in rows])
            return Batch(inputs, tuple(slots), len(rows), {})
        ids = [row["input_ids"] for row in rows]
        inputs["input_ids"] = text.pad(ids, text.pad_id(self.tokenizer))
        inputs["attention_mask"] = text.pad_mask(ids)
        return Batch(inputs, tuple(slots), sum(map(len, ids)), {})

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(model, batch), batch.inputs["label"], reduction="none")

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        picked = self.logits(model, batch).argmax(1)
        return (picked == batch.inputs["label"]).float()

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """(n, outputs) logits, −inf where an output is no label of the row's task."""
        inputs = batch.inputs
        with route(batch.slots):
            if self.tokenizer is None:
                output = model(inputs["x"])
            else:
                output = model(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                )
        logits = text.logits_of(output).float()
        valid = inputs["valid"]
        beyond = logits.shape[1] - valid.shape[1]
        if beyond < 0:
            raise UserError(
                f"the tasks have up to {valid.shape[1]} labels, but the model's head has "
                f"{logits.shape[1]} outputs"
            )
        return logits.masked_fill(~F.pad(valid, (0, beyond)), -torch.inf)

    @override
    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "max_tokens": self.max_tokens,
            "labels": {name: list(known) for name, known in self.labels.items()},
            "space": None if self.space is None else list(self.space),
        }


def sort_labels(labels: Iterable[Label]) -> tuple[Label, ...]:
    """Each label once: numbers by value, then texts by alphabet."""
    return tuple(sorted(set(labels), key=lambda v: (isinstance(v, str), v)))


def shown(labels: Sequence[Label], most: int = 10) -> str:
    """The first labels of many, for an error message."""
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(map(repr, labels[:most])) + more
