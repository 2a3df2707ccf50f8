"""`Classification`: one label for a text or an array."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache, partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from foretune.errors import UserError, did_you_mean
from foretune.models.routing import route
from foretune.models.sentence_cache import SentenceCache, sentence_cache
from foretune.models.surgery import has_fresh_head, head_labels
from foretune.run import check_int
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS, place_of, row_name
from foretune.tasks.labels import Label, label_places, label_text, shown, sort_labels
from foretune.tasks.objectives import text
from foretune.tasks.objectives.accuracy import accuracies
from foretune.tasks.objectives.regression import check_arrays, stack
from foretune.tasks.task import Objective, Task, TaskCollection

LEARNT = {"learnt": True}


@dataclass(frozen=True)
class Classification(Objective):
    """One label for a text (`text`, `label`) or for an array (`x`, `y`).

    If all tasks have the same label set, a label has the same id in all of them. Otherwise ids are
    local: the sorted labels of a task are 0, 1, …, so that tasks with different label sets can have
    heads of one width; logits beyond a task's labels do not count. `shared` returns the form with
    one id per label over all tasks, for a single head that serves them all.

    Args:
        tokenizer: The model's tokenizer; None where the examples are arrays.
        max_tokens: Maximum length of a text, special tokens included; longer ones lose their end.
        labels: The labels of each task, learnt by `fit`.
        space: The labels over all tasks where ids are shared, learnt by `fit` and `shared`; None
            where ids are local.
        sentences: The embeddings of texts where the model has a frozen encoder, learnt by `bind`.
    """

    tokenizer: Any = field(default=None, repr=False, compare=False)
    _: KW_ONLY
    max_tokens: int = 128
    labels: Mapping[str, tuple[Label, ...]] = field(
        default_factory=dict, repr=False, hash=False, metadata=LEARNT
    )
    space: tuple[Label, ...] | None = field(default=None, repr=False, metadata=LEARNT)
    sentences: SentenceCache | None = field(
        default=None, repr=False, compare=False, metadata=LEARNT
    )

    kind: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    select_by_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1)
        labels = {task: tuple(task_labels) for task, task_labels in self.labels.items()}
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
        return max(map(len, self.labels.values()), default=None)

    @override
    def chance(self) -> float | None:
        """The mean over tasks of 1 / number of the task's labels."""
        if not self.labels:
            return None
        return sum(1 / len(labels) for labels in self.labels.values()) / len(self.labels)

    @override
    def shared(self) -> Self:
        """The form with one id per label over all tasks."""
        if self.space is not None:
            return self
        union = sort_labels(label for labels in self.labels.values() for label in labels)
        return dataclasses.replace(self, space=union)

    @override
    def local(self) -> Self:
        """The form with local ids, for one head per task."""
        return dataclasses.replace(self, space=None)

    @override
    def output_labels(self, task: str) -> tuple[Label | None, ...]:
        """The labels of a head's outputs in a task, in order; further outputs have no meaning.

        None for a label that the task does not have: that output is ignored by loss and score.
        """
        labels = self.labels[task]
        if self.space is None:
            return labels
        places = label_places(labels)
        return tuple(label if label_text(label) in places else None for label in self.space)

    @override
    def common_labels(self) -> tuple[str, ...] | None:
        label_sets = {self.space} if self.space is not None else set(self.labels.values())
        return tuple(map(label_text, *label_sets)) if len(label_sets) == 1 else None

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Learns each task's labels from its training examples.

        When it is refitted to other tasks, ids stay shared if `space` has all labels of those
        tasks: a head trained on seen tasks then keeps its meaning on unseen ones. Otherwise each
        of those tasks needs a head of its own, and ids are local.

        Raises:
            UserError: An example has no label, or a label that its task's training examples lack.
        """
        # A recipe fits before it has a tokenizer, so only the rows tell whether they are texts.
        texts = any("text" in row for task in tasks for row in task.train)
        if not texts and any("x" in row for task in tasks for row in task.train):
            check_arrays(tasks, ("x",))
        earlier = self.shared().space or ()
        labels = one_form({task.name: self._task_labels(task) for task in tasks}, earlier)
        union = set().union(*labels.values())
        space = self.space
        if not self.labels:
            space = sort_labels(union) if len(set(labels.values())) == 1 else None
        elif space is not None and not union <= set(space):
            space = None
        return dataclasses.replace(self, labels=labels, space=space)

    @override
    def bind(self, model: nn.Module) -> Self:
        """The form whose ids are the outputs of the model's head, and that embeds texts only once.

        The ids are the outputs if these are named (`head_labels`), and each label of each task is
        among the names, as text. Otherwise they stay: the head has learnt other labels, or nobody
        knows which.

        Raises:
            UserError: The model is one of transformers and has no classification head.
        """
        if isinstance(model, PreTrainedModel) and not has_fresh_head(model):
            raise UserError(
                f"{type(model).__name__} has no classification head: load the model with "
                'foretune.load_model(folder, head="classification"), or with '
                "AutoModelForSequenceClassification.from_pretrained(folder)"
            )
        bound = dataclasses.replace(self, sentences=sentence_cache(model))
        names = head_labels(model)
        if names is None:
            return bound
        texts = [f"LABEL_{i}" if n is None else label_text(n) for i, n in enumerate(names)]
        answered = {text for text, name in zip(texts, names, strict=True) if name is not None}
        by_text = {label_text(v): v for task_labels in self.labels.values() for v in task_labels}
        if not by_text.keys() <= answered or len(set(texts)) < len(texts):
            return bound
        return dataclasses.replace(bound, space=tuple(by_text.get(text, text) for text in texts))

    def _task_labels(self, task: Task) -> tuple[Label, ...]:
        """The sorted labels of a task's training examples; checks those of the other splits.

        Raises:
            UserError: There are no training examples, or a label is missing in them.
        """
        labels = sort_labels(
            self._label_of(row, partial(row_name, task.name, "train", i, row))
            for i, row in enumerate(task.train)
        )
        if not labels:
            raise UserError(
                f'task "{task.name}" has no training rows, so its labels are unknown; '
                "it needs one row per label"
            )
        for split in SPLITS[1:]:
            for i, row in enumerate(task.split(split)):
                label = self._label_of(row, partial(row_name, task.name, split, i, row))
                if label_text(label) not in label_places(labels):
                    raise UserError(
                        f'task "{task.name}": label {label!r} of {split} row {i + 1}'
                        f"{place_of(row)} is missing in its training rows, which have "
                        f"{shown(labels)}: add a training row with it, or leave this one out"
                    )
        return labels

    def _label_of(self, row: Mapping[str, Any], where: Callable[[], str]) -> Label:
        """The label of a row; `where` gives its name for the message.

        Raises:
            UserError: It has none.
        """
        name = "label" if "text" in row or "x" not in row else "y"
        value = row.get(name)
        value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
        if not isinstance(value, (str, int, float)):
            raise UserError(
                f'{where()}: "{name}" must be a label (text or a number), got {value!r:.60}; '
                f"the row has {', '.join(row)}"
            )
        return value

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        labels = self.labels.get(task)
        if labels is None:
            raise UserError(
                f'the objective was not fitted on task "{task}".{did_you_mean(task, self.labels)}'
            )
        label = self._label_of(example, partial(text.name_of, example, task))
        if label_text(label) not in label_places(labels):
            raise UserError(
                f"{text.name_of(example, task)}: label {label!r} is not one of {shown(labels)}"
            )
        outputs = label_places(labels if self.space is None else self.space)
        encoded: dict[str, Any] = {
            "label": outputs[label_text(label)],
            "valid": label_outputs(labels, self.space),
        }
        if "text" not in example:
            encoded["x"] = np.asarray(example["x"], dtype=np.float32)
            return encoded
        if self.tokenizer is None:
            raise UserError(
                "a text needs a tokenizer, and the model came without one: "
                "Classification(tokenizer), or save the tokenizer in the model's folder"
            )
        if self.sentences is None:
            return encoded | {"input_ids": self._input_ids(example, task)}
        key = (*text.state_of(self.tokenizer), self.max_tokens, example["text"])
        numbered = self.sentences.by_text.get(key)
        if numbered is None:
            ids = self._input_ids(example, task)
            numbered = self.sentences.by_text[key] = (self.sentences.number_of(ids), ids)
        encoded["text"], encoded["input_ids"] = numbered
        return encoded

    def _input_ids(self, example: Mapping[str, Any], task: str) -> list[int]:
        single = text.single_template(self.tokenizer)
        ids = text.field_ids(self.tokenizer, example, "text", task)
        return single.fill(ids[: single.room(self.max_tokens, "max_tokens")])

    @override
    def size(self, row: Mapping[str, Any]) -> int:
        return 1 if "text" in row else len(row.get("input_ids", "1"))

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        width = self.num_outputs() or 1 + max(max(row["valid"]) for row in rows)
        outputs: dict[tuple[int, ...], int] = {}  # each set of outputs → its row in `valid`
        index = [outputs.setdefault(row["valid"], len(outputs)) for row in rows]
        valid = np.zeros((len(outputs), width), dtype=bool)
        for places, i in outputs.items():
            valid[i, list(places)] = True
        inputs = {
            "valid": torch.from_numpy(valid[index]),
            "label": torch.tensor([row["label"] for row in rows]),
        }
        if "x" in rows[0]:
            inputs["x"] = stack([row["x"] for row in rows])
            return Batch(inputs, tuple(slots), len(rows), {})
        if self.sentences is not None:
            texts = np.fromiter((row["text"] for row in rows), np.int64, len(rows))
            inputs["embeddings"] = self.sentences.embeddings(texts)
            return Batch(inputs, tuple(slots), len(rows), {})
        ids = [row["input_ids"] for row in rows]
        inputs["input_ids"] = text.pad(ids, text.pad_id(self.tokenizer))
        inputs["attention_mask"] = text.pad_mask(ids)
        return Batch(inputs, tuple(slots), sum(map(len, ids)), {})

    @override
    def losses(self, model: Any, batch: Batch) -> Tensor:
        return self.scores_and_losses(model, batch)[1]

    @override
    def scores(self, model: Any, batch: Batch) -> Tensor:
        return self.scores_and_losses(model, batch)[0]

    @override
    def scores_and_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = self.logits(model, batch), batch.inputs["label"]
        return accuracies(logits, labels), F.cross_entropy(logits, labels, reduction="none")

    @override
    def outputs(self, model: Any, batch: Batch) -> Tensor:
        return self.logits(model, batch)

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """(n, outputs) logits, −inf where an output is not a label of the example's task.

        Raises:
            UserError: The head has fewer outputs than a task has labels.
        """
        inputs = batch.inputs
        with route(batch.slots):
            if "x" in inputs:
                output = model(inputs["x"])
            elif "embeddings" in inputs:
                output = model(embeddings=inputs["embeddings"])
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
            "labels": {task: list(labels) for task, labels in self.labels.items()},
            "space": None if self.space is None else list(self.space),
        }


@lru_cache(maxsize=4096)
def label_outputs(labels: tuple[Label, ...], space: tuple[Label, ...] | None) -> tuple[int, ...]:
    """The ids of a task's labels, ascending; `space` are the labels of shared ids."""
    places = label_places(labels if space is None else space)
    return tuple(sorted(places[label_text(label)] for label in labels))


def one_form(
    labels: Mapping[str, tuple[Label, ...]], earlier: Sequence[Label] = ()
) -> dict[str, tuple[Label, ...]]:
    """The labels of each task with one form of a label in all of them.

    Args:
        labels: The labels of each task.
        earlier: Labels whose form takes precedence, such as those of a head.
    """
    union = sort_labels(label for of_task in labels.values() for label in of_task)
    forms = {label_text(label): label for label in (*union, *earlier)}
    return {
        task: sort_labels(forms[label_text(label)] for label in of_task)
        for task, of_task in labels.items()
    }
