"""A digest of a task's rows: is a run resumed with the rows that it was begun with?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from foretune.tasks.row_store import View


def digest_of(splits: Mapping[str, Sequence[Any]]) -> str:
    """16 hexadecimal digits, equal for equal rows in the same order and splits.

    An object that has no value of its own to show counts by its class alone.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, rows in splits.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows.stored() if isinstance(rows, View) else rows:
            digest.update(_text(row).encode())
    return digest.hexdigest()


def _text(row: Any) -> str:
    try:
        return json.dumps(row, sort_keys=True, default=_plain)
    except TypeError:  # keys that JSON has not, or of several types
        return json.dumps(_keyed(row), sort_keys=True, default=_plain)


def _keyed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {repr(key): _keyed(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_keyed(one) for one in value]
    return value


def _plain(value: Any) -> Any:
    """What JSON has no word for."""
    import numpy as np

    if isinstance(value, Mapping):
        return _keyed(value)
    if hasattr(value, "detach"):
        return _of_tensor(value)
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        if array.dtype.hasobject:
            return [str(array.dtype), array.tolist()]
        return [str(array.dtype), list(array.shape), _hash(np.ascontiguousarray(array).tobytes())]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    shown = repr(value)
    return type(value).__name__ if " at 0x" in shown else shown


def _of_tensor(tensor: Any) -> list[Any]:
    import torch

    whole = tensor.detach().cpu().to_dense().resolve_conj().contiguous()
    values = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _hash(values)]


def _hash(values: bytes) -> str:
    return hashlib.blake2b(values, digest_size=8).hexdigest()
