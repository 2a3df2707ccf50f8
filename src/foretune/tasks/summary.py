"""The number of examples in a collection, for people and for `foretune plan`."""

from __future__ import annotations

from foretune.tasks.example import SPLITS
from foretune.tasks.task import TaskCollection


def describe(collection: TaskCollection) -> dict[str, dict[str, int]]:
    """The number of train, validation and test examples of each task, by name.

    >>> from foretune.tasks.task import Task
    >>> describe(TaskCollection((Task("a", train=[{"text": "x"}]),)))
    {'a': {'train': 1, 'validation': 0, 'test': 0}}
    """
    return {task.name: {split: len(task.split(split)) for split in SPLITS} for task in collection}
