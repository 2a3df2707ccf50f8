"""Distractors of their own for choice examples that moved to another split after the drawing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from foretune.tasks.example import DrawnExample, Example
from foretune.tasks.responses import true_response
from foretune.tasks.seeds import seed_for
from foretune.tasks.task import Task, TaskCollection


def redraw_validation(collection: TaskCollection, seed: int) -> TaskCollection:
    """The collection whose validation examples share no distractors with the training examples.

    Test examples have distractors of their own (`draw_candidates` draws for each split), but an
    example that moves from train to validation keeps those of train. A model that is adapted on the
    others has then learnt which texts are never right, and looks better than it is.

    Each drawn validation example gets as many distractors as before, out of as many texts:
    responses of the other tasks that the task's training examples do not have. Where distractors
    are responses of the task itself, each of the two splits draws from its own: the right answers
    of validation must not be what training examples call wrong. If there are too few, an example
    stays as it is; so does one that came with its candidates.

    Args:
        collection: Choice tasks with candidates, of one side.
        seed: Random seed of the distractors and of the place of the true response.
    """
    responses = {
        task.name: {*_responses(task.train), *_responses(task.validation)} for task in collection
    }
    order = np.random.default_rng(seed).permutation(sorted(set().union(*responses.values())))
    texts = order.tolist()
    tasks = [_redrawn(task, responses[task.name], texts, seed) for task in collection]
    return TaskCollection(tuple(tasks), collection.objective)


def _responses(examples: Sequence[Example]) -> list[str]:
    return [true_response(example) for example in examples]


def _redrawn(task: Task, responses: set[str], texts: Sequence[str], seed: int) -> Task:
    """The task with other distractors.

    Args:
        task: A choice task.
        responses: Its responses.
        texts: Those of all tasks, in random order.
        seed: Random seed.
    """
    drawn = [example for example in task.train if isinstance(example, DrawnExample)]
    if not drawn:
        return task
    distractors = {
        text
        for example in drawn
        for place, text in enumerate(example["candidates"])
        if place != example["answer"]
    }
    rng = np.random.default_rng(seed_for(seed, task.name, "redrawn"))
    train: Sequence[Example] = task.train
    if len(distractors & responses) > len(distractors) / 2:
        pool = sorted({*_responses(task.validation)})
        trained = sorted({*_responses(task.train)} - {*pool})
        train = [_with_distractors(example, trained, rng) for example in task.train]
    else:
        start = int(rng.integers(len(texts)))
        turned = (texts[(start + i) % len(texts)] for i in range(len(texts)))
        foreign = (text for text in turned if text not in responses and text not in distractors)
        pool = list(itertools.islice(foreign, len(distractors)))
    validation = [_with_distractors(example, pool, rng) for example in task.validation]
    return Task(task.name, train, validation, task.test)


def _with_distractors(example: Example, pool: Sequence[str], rng: np.random.Generator) -> Example:
    """The example with as many distractors as before, from the pool; itself if they are too few."""
    if not isinstance(example, DrawnExample):
        return example
    response, count = true_response(example), len(example["candidates"]) - 1
    texts = [text for text in pool if text != response]
    if len(texts) < count:
        return example
    candidates = [texts[i] for i in rng.choice(len(texts), count, replace=False)]
    place = int(rng.integers(count + 1))
    candidates.insert(place, response)
    fields = {**example, "candidates": candidates, "answer": place}
    return DrawnExample(fields, example.source, example.number)
