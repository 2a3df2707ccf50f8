"""`read_rows`: the arrays from which conflict is measured, from tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.errors import UserError
from foretune.evaluation.conflict_rows import Indices, LabelledInputs
from foretune.linalg.task_moments import Array
from foretune.tasks.example import DrawnExample, Example
from foretune.tasks.labels import label_of
from foretune.tasks.leakage import content
from foretune.tasks.row_store import select
from foretune.tasks.rows import CLASSES
from foretune.tasks.task import Task, TaskCollection

Features = Callable[[Sequence[Any]], NDArray[Any]]

MIN_TASKS = 4
MIN_ROWS = 5  # of a task: fewer leave nothing to score
MAX_LABELS = 32
MIN_ANSWERS = 5  # other tasks that answer an input, for it to count as shared
SHARED = 0.5  # share of rows with shared inputs from which on no features are needed
MAX_ROWS = 200_000
MAX_ARRAYS = 20_000
TASKS_TO_KEEP, ROWS_TO_KEEP = 20, 40  # where there are too many rows, if there are as many
NUM_FEATURES = 64
NUM_CHOICE_FEATURES = 32  # of a context, and of a candidate
MAX_COORDINATES = 2048  # of a vector, and vectors, from which principal components are computed


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """How inputs become features, where tasks do not share them.

    Args:
        embed: Texts or arrays → (n, d) features; None for arrays as they are.
        most: Number of inputs to embed at most.
        redraw: Replaces the candidates that were drawn, for a part of the tasks of a choice, by
            fewer different ones; None if it need not.
        context_turns: Number of turns to keep of a context that is a list; None keeps all.
        shared_only: Refuse tasks that do not share their inputs.
    """

    embed: Features | None = None
    most: int = 3000
    redraw: Callable[[TaskCollection], TaskCollection] | None = None
    context_turns: int | None = None
    shared_only: bool = False


def read_rows(tasks: TaskCollection, kind: str, inputs: Inputs, seed: int) -> LabelledInputs:
    """The train and validation rows of tasks; if there are too many, of some that are drawn.

    Args:
        tasks: Tasks with rows of this kind.
        kind: "classification", "prompts", "regression" or "choice".
        inputs: How inputs become features.
        seed: Random seed of the draw.

    Raises:
        UserError: There are too few tasks or rows, or nothing embeds the inputs.
    """
    large = [t.name for t in tasks if len(t.train) + len(t.validation) >= MIN_ROWS]
    if len(large) < MIN_TASKS:
        raise UserError(
            f"it takes {MIN_TASKS} seen tasks with at least {MIN_ROWS} train and validation rows "
            f"each, got {len(large)}"
        )
    tasks = tasks.subset(large)
    if kind == "choice":
        return _read_choices(tasks, inputs, seed)
    rows = _Rows.of(_part(tasks, MAX_ROWS, seed), kind)
    if rows.shared >= SHARED and not rows.own_labels:
        return rows.labelled()
    if inputs.shared_only:
        raise UserError("tasks do not share their inputs")
    if inputs.embed is None and "x" not in rows.examples[0]:
        raise UserError("texts that tasks do not share need a model that embeds them")
    most = MAX_ARRAYS if inputs.embed is None else inputs.most
    rows = replace(_Rows.of(_part(tasks, most, seed), kind), shared=rows.shared)
    return rows.labelled(_features(rows, inputs.embed))


def _part(tasks: TaskCollection, most: int, seed: int) -> TaskCollection:
    """All rows, or about `most` of them: some rows of all tasks, or of some."""
    if sum(len(task.train) + len(task.validation) for task in tasks) <= most:
        return tasks
    rng = np.random.default_rng(seed)
    num_tasks = min(len(tasks), max(most // ROWS_TO_KEEP, TASKS_TO_KEEP))
    per_task = max(most // num_tasks, MIN_ROWS)
    order = rng.permutation(len(tasks))[:num_tasks]
    names = [tasks.names[place] for place in sorted(order)]
    drawn = []
    for task in tasks.subset(names):
        share = min(1.0, per_task / (len(task.train) + len(task.validation)))
        splits = {}
        for split in ("train", "validation"):
            rows = task.split(split)
            places = rng.permutation(len(rows))[: int(np.ceil(share * len(rows)))]
            splits[split] = select(rows, sorted(places.tolist()))
        drawn.append(Task(task.name, **splits))
    return replace(tasks, tasks=tuple(drawn))


@dataclass(frozen=True)
class _Rows:
    """Rows with labels or a target, before their inputs are made numbers.

    Args:
        examples: The rows, task by task.
        tasks: (n,) task of each.
        learnable: (n,) whether it is a train row.
        labels: (n,) index of its label; None for a regression.
        own_labels: Whether tasks have labels of their own.
        inputs: (n,) equal for equal inputs.
        shared: Share of the rows whose input several other tasks answer.
    """

    examples: list[Example]
    tasks: Indices
    learnable: Any
    labels: Indices | None
    own_labels: bool
    inputs: Indices
    shared: float

    @classmethod
    def of(cls, tasks: TaskCollection, kind: str) -> _Rows:
        """The rows of tasks; without those of the rarest labels if there are very many labels."""
        examples = [e for task in tasks for rows in (task.train, task.validation) for e in rows]
        of_task, learnable = _tasks_of(tasks)
        labels, own_labels = None, False
        if kind in CLASSES:
            labels, own_labels = _labels(examples, of_task)
            common = np.flatnonzero(labels >= 0)
            examples = [examples[row] for row in common]
            learnable, labels = learnable[common], labels[common]
            of_task = np.unique(of_task[common], return_inverse=True)[1]
        digests = np.array([content(example)[0] for example in examples], dtype=np.uint64)
        inputs = np.unique(digests, return_inverse=True)[1]
        shared = _shared(of_task, inputs)
        return cls(examples, of_task, learnable, labels, own_labels, inputs, shared)

    def labelled(self, features: Array | None = None) -> LabelledInputs:
        """The arrays, over features of the inputs (n, D), or else over the inputs themselves.

        Raises:
            UserError: A target has too many numbers.
        """
        if self.own_labels and features is not None:
            return self._labels_as_candidates(features)
        labels, allowed = self.labels, None
        if labels is None:
            labels, targets = np.zeros(len(self.examples), int), _standardised(self.examples)
        else:
            targets, allowed = _one_hot(labels, self.tasks)
        return LabelledInputs(
            units=self.tasks,
            unit_tasks=np.arange(self.tasks[-1] + 1),
            examples=np.arange(len(self.examples)),
            targets=targets,
            learnable=self.learnable,
            labels=labels,
            allowed=allowed,
            inputs=self.inputs if features is None else None,
            features=features,
            shared=self.shared,
            has_classes=self.labels is not None,
        )

    def _labels_as_candidates(self, features: Array) -> LabelledInputs:
        """A row for each example and each label of its task; a label of a task is a unit."""
        assert self.labels is not None
        pairs = np.stack([self.tasks, self.labels])
        units, of_row = np.unique(pairs, axis=1, return_inverse=True)
        num_labels = np.bincount(units[0])
        first = np.cumsum(num_labels) - num_labels  # unit of each task
        lengths = num_labels[self.tasks]
        examples = np.repeat(np.arange(len(self.tasks)), lengths)
        place = np.arange(len(examples)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        of_unit = first[self.tasks[examples]] + place
        right = of_unit == of_row.ravel()[examples]
        return LabelledInputs(
            units=of_unit,
            unit_tasks=units[0],
            examples=examples,
            targets=(right - 1 / lengths[examples])[:, None],
            learnable=self.learnable,
            labels=self.labels,
            allowed=None,
            inputs=None,
            features=features[examples],
            shared=self.shared,
            candidates="labels",
        )


def _tasks_of(tasks: TaskCollection) -> tuple[Indices, Any]:
    """(n,) task of each row, and whether it is a train row, train before validation."""
    lengths = [len(rows) for task in tasks for rows in (task.train, task.validation)]
    places = np.repeat(np.arange(len(lengths)), lengths)
    return places // 2, places % 2 == 0


def _labels(examples: Sequence[Example], tasks: Indices) -> tuple[Indices, bool]:
    """(n,) label indices, −1 for a rare one, and whether tasks have labels of their own."""
    texts = [label_of(example) for example in examples]
    counts = Counter(label for _, label in {*zip(tasks.tolist(), texts, strict=True)})
    own_labels = bool(np.mean([counts[label] > 1 for label in texts]) < SHARED)
    most = Counter(texts).most_common(None if own_labels else MAX_LABELS)
    places = {label: place for place, label in enumerate(sorted(label for label, _ in most))}
    return np.array([places.get(label, -1) for label in texts]), own_labels


def _one_hot(labels: Indices, tasks: Indices) -> tuple[Array, Any]:
    """(n, C) −1 or 1 for two labels, one-hot for more, and (T, C) the labels of each task."""
    one_hot = np.eye(labels.max() + 1)[labels]
    if one_hot.shape[1] <= 2:
        return 2 * one_hot[:, -1:] - 1, None
    allowed = np.zeros((tasks.max() + 1, one_hot.shape[1]), dtype=bool)
    allowed[tasks, labels] = True
    return one_hot, None if allowed.all() else allowed


def _standardised(examples: Sequence[Example]) -> Array:
    """(n, C) the targets of a regression, each of mean 0 and variance 1.

    Raises:
        UserError: There are too many.
    """
    y = np.stack([np.asarray(example["y"], dtype=float).ravel() for example in examples])
    if y.shape[1] > MAX_LABELS:
        raise UserError(f"targets may have at most {MAX_LABELS} numbers, got {y.shape[1]}")
    spread = y.std(0)
    return (y - y.mean(0)) / np.where(spread > 0, spread, 1)


def _shared(tasks: Indices, inputs: Indices) -> float:
    """The share of rows whose input several other tasks answer."""
    pairs = np.unique(np.stack([tasks, inputs]), axis=1)
    num_tasks = np.bincount(pairs[1])
    return float(np.mean(num_tasks[inputs] > min(MIN_ANSWERS, tasks[-1] // 2)))


def _features(rows: _Rows, embed: Features | None) -> Array:
    """(n, 1 + d) a 1, and the principal components of the inputs."""
    first = np.unique(rows.inputs, return_index=True)[1]
    inputs = [rows.examples[row].get("text", rows.examples[row].get("x")) for row in first]
    if embed is not None:
        vectors = embed(inputs)
    else:
        vectors = np.stack([np.asarray(x, dtype=np.float32).ravel() for x in inputs])
        spread = vectors.std(0)
        vectors = vectors / np.where(spread > 1e-6, spread, 1)
    components = principal_components(vectors, NUM_FEATURES)
    return np.concatenate([np.ones((len(rows.inputs), 1)), components[rows.inputs]], 1)


def principal_components(vectors: NDArray[Any], number: int) -> Array:
    """(n, ≤ number) principal components of (n, d) vectors, scaled to mean square 1 together."""
    rng = np.random.default_rng(0)
    if vectors.shape[1] > MAX_COORDINATES:
        vectors = vectors[:, rng.choice(vectors.shape[1], MAX_COORDINATES, replace=False)]
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    sample = centred[rng.permutation(len(centred))[:MAX_COORDINATES]]
    directions = np.linalg.svd(sample, full_matrices=False)[2][:number]
    return _unit_scale(centred @ directions.T)


def _unit_scale(vectors: Array) -> Array:
    """The vectors (n, d), scaled so that their mean square length is 1."""
    return vectors / np.sqrt((vectors**2).sum(1).mean() or 1.0)


def _read_choices(tasks: TaskCollection, inputs: Inputs, seed: int) -> LabelledInputs:
    """A row per candidate, with features of the context and the candidate together.

    Raises:
        UserError: Nothing embeds the texts.
    """
    if inputs.embed is None:
        raise UserError("choices need a model that embeds their texts")
    first = next(row for task in tasks for row in task.train)
    redraws = inputs.redraw is not None and isinstance(first, DrawnExample)
    texts_per_row = 2 if redraws else 1 + len(first["candidates"])
    tasks = _part(tasks, inputs.most // texts_per_row, seed)
    if inputs.redraw is not None:
        tasks = inputs.redraw(tasks)
    examples = [e for task in tasks for rows in (task.train, task.validation) for e in rows]
    of_task, learnable = _tasks_of(tasks)
    lengths = np.array([len(example["candidates"]) for example in examples])
    starts = np.cumsum(lengths) - lengths
    of_example = np.repeat(np.arange(len(examples)), lengths)

    def centred(values: Array) -> Array:
        means = np.add.reduceat(values, starts) / lengths[:, None]
        return values - means[of_example]

    features = [centred(part) for part in _choice_features(examples, of_example, inputs)]
    right = np.zeros((len(of_example), 1))
    right[starts + [example["answer"] for example in examples]] = 1
    return LabelledInputs(
        units=of_task[of_example],
        unit_tasks=np.arange(len(tasks)),
        examples=of_example,
        targets=centred(right),
        learnable=learnable,
        labels=np.zeros(len(examples), int),
        allowed=None,
        inputs=None,
        features=np.concatenate([_unit_scale(part) for part in features], 1),
        shared=0.0,
        candidates="responses",
    )


def _choice_features(
    examples: Sequence[Example], of_example: Indices, inputs: Inputs
) -> tuple[Array, Array, Array]:
    """The cosine of context c and candidate r, c ∘ r, and r, a row per candidate."""
    texts: dict[str, int] = {}
    contexts, candidates = [], []
    for example in examples:
        turns = example["context"]
        if not isinstance(turns, str):
            turns = " ".join(turns[-(inputs.context_turns or len(turns)) :])
        contexts.append(texts.setdefault(turns, len(texts)))
        candidates += [texts.setdefault(text, len(texts)) for text in example["candidates"]]
    assert inputs.embed is not None
    vectors = inputs.embed(list(texts))
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    parts = principal_components(vectors, NUM_CHOICE_FEATURES)
    context = np.array(contexts)[of_example]
    cosine = np.einsum("nd,nd->n", vectors[context], vectors[candidates])
    return cosine[:, None], parts[context] * parts[candidates], parts[candidates]
