"""`PromptClassification`: one label for an input, by its similarity to the labels' names.

    score(x, y) = cos(f(x), μ_y) / temperature        μ_y: mean over the templates of g("… y …")

f embeds an input, g a text; g and thus μ_y are those of the model before any training, so the
original model (zero-shot) and a trained one are scored alike. Radford et al., "Learning
transferable visual models from natural language supervision", ICML 2021, arXiv:2103.00020, 3.1.4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from foretune.errors import UserError
from foretune.linalg.prototypes import class_prototypes
from foretune.models.dual_encoder import (
    embeddings,
    freeze_text,
    has_towers,
    temperature_of,
    text_embeddings,
)
from foretune.models.image_input import ImageInput, check_image, image_input, read_image
from foretune.models.routing import route
from foretune.run import check_at_least
from foretune.tasks.batch import Batch
from foretune.tasks.example import SPLITS, row_name
from foretune.tasks.labels import label_places, label_text, shown
from foretune.tasks.objectives import text
from foretune.tasks.objectives.accuracy import accuracies
from foretune.tasks.objectives.classification import LEARNT, Classification
from foretune.tasks.objectives.prompt_templates import IMAGES, TEXTS
from foretune.tasks.objectives.regression import check_arrays, stack
from foretune.tasks.task import TaskCollection


@dataclass(frozen=True)
class PromptClassification(Classification):
    """A label for an image (`image` or `x`) or a text (`text`), by the labels' names.

    `image` is the path of a file, with its `label`; it is read as the model reads pictures, when it
    is needed. `x` with `y` is an array that is normalised already. `text` has a `label`.

    There is no head: an input is compared to a class by the cosine of its embedding and that of
    prompts with the class's name, so labels must be words; `_` in them is read as a space.

    Args:
        tokenizer: The model's tokenizer.
        max_tokens: Maximum length of an input text, special tokens included; longer ones lose
            their end.
        templates: Texts that contain `{}` in place of the name; None for a default set, 80 for
            images and 80 for texts.
        temperature: Divides the cosines; None for exp(−logit_scale) of the model, or 0.05 if it
            has none.
        labels: The labels of each task, learnt by `fit`.
        space: Not used.
        embedded: (templates, labels, d) embeddings of the prompts of each task, made by `bind`.
        images: How the model reads pictures, learnt by `bind`.
    """

    _: KW_ONLY
    templates: tuple[str, ...] | None = None
    temperature: float | None = None
    embedded: Mapping[str, Tensor] = field(
        default_factory=dict, repr=False, hash=False, compare=False, metadata=LEARNT
    )

    images: ImageInput | None = field(
        default=None, repr=False, hash=False, compare=False, metadata=LEARNT
    )

    kind: ClassVar[str] = "prompts"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("temperature", self.temperature, 1e-6)
        if self.templates is None:
            return
        if isinstance(self.templates, str) or not self.templates:
            raise UserError(f"templates must be a list of texts with {{}}, got {self.templates!r}")
        for template in self.templates:
            if not isinstance(template, str) or template.count("{}") != 1:
                raise UserError(f"a template must contain {{}} once, got {template!r}")
        object.__setattr__(self, "templates", tuple(self.templates))

    @property
    @override
    def head(self) -> str:
        return "none"

    @override
    def num_outputs(self) -> int | None:
        return None

    @override
    def shared(self) -> Self:
        return self

    @override
    def fit(self, tasks: TaskCollection) -> Self:
        """Learns each task's labels from its training examples; discards what `bind` made."""
        if any("image" in row for task in tasks for row in task.train):
            _check_images(tasks)
        elif not any("text" in row for task in tasks for row in task.train):
            check_arrays(tasks, ("x",))
        labels = {task.name: self._task_labels(task) for task in tasks}
        return dataclasses.replace(self, labels=labels, space=None, embedded={})

    @override
    def _label_of(self, row: Mapping[str, Any], where: Callable[[], str]) -> Any:
        name = "label" if "text" in row or "image" in row else "y"
        value = row.get(name)
        value = value.item() if isinstance(value, (np.generic, np.ndarray)) else value
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f'{where()}: "{name}" must be the name of a class, in words; got {value!r:.60}'
            )
        return value

    @override
    def bind(self, model: nn.Module) -> Self:
        """The objective with this model's embeddings of each task's prompts.

        Args:
            model: The model before it is adapted; it is not changed.
        """
        templates = self.templates or (IMAGES if has_towers(model) else TEXTS)
        # Many tasks may have classes in common: each is embedded once.
        names = [*dict.fromkeys(label for labels in self.labels.values() for label in labels)]
        words = [str(name).replace("_", " ") for name in names]
        prompts = [template.replace("{}", word) for template in templates for word in words]
        vectors = text_embeddings(model, self.tokenizer, prompts)
        vectors = vectors.view(len(templates), len(names), -1)
        places = {name: i for i, name in enumerate(names)}
        embedded = {
            task: vectors[:, [places[label] for label in labels]]
            for task, labels in self.labels.items()
        }
        temperature = temperature_of(model) if self.temperature is None else self.temperature
        return dataclasses.replace(
            self,
            templates=templates,
            temperature=temperature,
            embedded=embedded,
            images=image_input(model) if has_towers(model) else None,
        )

    @override
    def freeze(self, model: nn.Module) -> None:
        """Freezes, in place, the parts of the model that this objective never runs."""
        freeze_text(model)

    @override
    def encode(self, example: Mapping[str, Any], task: str) -> dict[str, Any]:
        labels = self.labels.get(task)
        if labels is None:
            raise UserError(f'the objective was not fitted on task "{task}"')
        where = text.name_of(example, task)
        label = self._label_of(example, lambda: where)
        places = label_places(labels)
        if label_text(label) not in places:
            raise UserError(f"{where}: label {label!r} is not one of {shown(labels)}")
        encoded: dict[str, Any] = {"label": places[label_text(label)], "task": task}
        if "image" in example:
            return {**encoded, "image": str(example["image"])}
        if "text" not in example:
            return {**encoded, "x": np.asarray(example["x"], dtype=np.float32)}
        single = text.single_template(self.tokenizer)
        ids = text.field_ids(self.tokenizer, example, "text", task)
        ids = single.fill(ids[: single.room(self.max_tokens, "max_tokens")])
        return {**encoded, "input_ids": ids}

    @override
    def collate(self, rows: Sequence[Mapping[str, Any]], slots: Sequence[int]) -> Batch:
        """As `Objective.collate`; images are read here.

        Raises:
            UserError: An image is damaged, or the objective is bound to no model that reads images.
        """
        inputs = {"label": torch.tensor([row["label"] for row in rows])}
        extra = {"tasks": tuple(row["task"] for row in rows)}
        if "image" in rows[0]:
            if self.images is None:
                raise UserError(
                    "image files need a model with an image tower whose input size is known "
                    "(CLIP, SigLIP), and objective.bind(model)"
                )
            inputs["x"] = stack([read_image(row["image"], self.images) for row in rows])
            return Batch(inputs, tuple(slots), len(rows), extra)
        if "x" in rows[0]:
            inputs["x"] = stack([row["x"] for row in rows])
            return Batch(inputs, tuple(slots), len(rows), extra)
        ids = [row["input_ids"] for row in rows]
        inputs["input_ids"] = text.pad(ids, text.pad_id(self.tokenizer))
        inputs["attention_mask"] = text.pad_mask(ids)
        return Batch(inputs, tuple(slots), sum(map(len, ids)), extra)

    def features(self, model: Any, batch: Batch) -> Tensor:
        """(n, d) embeddings of the batch's inputs, of unit length."""
        with route(batch.slots):
            return embeddings(model, batch.inputs)

    @override
    def scores_and_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = batch.inputs["label"]
        logits = self._class_logits(self.features(model, batch), batch)
        return accuracies(logits, labels), F.cross_entropy(logits, labels, reduction="none")

    @override
    def outputs(self, model: Any, batch: Batch) -> Tensor:
        return self._class_logits(self.features(model, batch), batch)

    def losses_of(self, features: Tensor, batch: Batch) -> Tensor:
        """(n,) cross-entropy, given the embeddings (n, d)."""
        logits = self._class_logits(features, batch)
        return F.cross_entropy(logits, batch.inputs["label"], reduction="none")

    def _class_logits(self, features: Tensor, batch: Batch) -> Tensor:
        """(n, most labels of a task) logits, −inf beyond the labels of an example's task.

        Raises:
            UserError: The objective is not bound to a model.
        """
        tasks = batch.extra["tasks"]
        missing = [task for task in tasks if task not in self.embedded]
        if missing:
            raise UserError(
                f'no prompts are embedded for task "{missing[0]}": call objective.bind(model)'
            )
        assert self.temperature is not None  # set by `bind`
        width = max(map(len, self.labels.values()))
        logits = features.new_full((len(tasks), width), -torch.inf)
        for task in dict.fromkeys(tasks):
            classes = class_prototypes(self.embedded[task]).to(features)
            rows = torch.tensor([i for i, row_task in enumerate(tasks) if row_task == task])
            logits[rows, : len(classes)] = features[rows] @ classes.T / self.temperature
        return logits

    @override
    def to_dict(self) -> dict[str, Any]:
        templates = None if self.templates is None else list(self.templates)
        fields = {k: v for k, v in super().to_dict().items() if k != "space"}
        return {**fields, "templates": templates, "temperature": self.temperature}


def _check_images(tasks: TaskCollection) -> None:
    """Check that the images of all rows are there.

    Raises:
        UserError: A row has none, or its file is missing or no picture.
    """
    for task in tasks:
        for split in SPLITS:
            for i, row in enumerate(task.split(split)):
                where = row_name(task.name, split, i, row)
                if not isinstance(row.get("image"), (str, Path)):
                    raise UserError(f'{where}: "image" is missing; the row has {", ".join(row)}')
                check_image(str(row["image"]), where)
