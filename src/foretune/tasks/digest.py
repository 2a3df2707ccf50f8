"""A digest of a task's rows: is a run resumed with the rows that it was begun with?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from foretune.tasks.task import SPLITS, Task


def row_digests(tasks: Iterable[Task]) -> dict[str, str]:
    """{name of a task: 16 hexadecimal digits}; equal for equal rows in the same order and split."""
    return {task.name: _digest(task) for task in tasks}


def _digest(task: Task) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for split in SPLITS:
        digest.update(f"{split} {len(task.split(split))}\n".encode())
        for row in task.split(split):
            digest.update(json.dumps(row, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no word for: an array by type, shape and values, all else by its class."""
    import numpy as np

    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype == object:  # its repr may hold an address
        return type(value).__name__
    values = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
    return [str(array.dtype), list(array.shape), values]
