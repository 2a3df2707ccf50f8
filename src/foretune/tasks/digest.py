"""A digest of a task's examples, to check that a resumed run has the data it was started with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from foretune.tasks.row_store import View


def digest_of(splits: Mapping[str, Sequence[Any]]) -> str:
    """16 hexadecimal digits, equal for equal examples in the same order and splits.

    An object whose repr is its address counts by its class only.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, examples in splits.items():
        digest.update(f"{name} {len(examples)}\n".encode())
        for example in examples.stored() if isinstance(examples, View) else examples:
            digest.update(_text(example).encode())
    return digest.hexdigest()


def _text(example: Any) -> str:
    try:
        return json.dumps(example, sort_keys=True, default=_plain)
    except TypeError:  # keys that JSON lacks, or keys of mixed types
        return json.dumps(_keyed(example), sort_keys=True, default=_plain)


def _keyed(value: Any) -> Any:
    """The value with the repr of each key as its key, at any depth."""
    if isinstance(value, Mapping):
        return {repr(key): _keyed(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_keyed(element) for element in value]
    return value


def _plain(value: Any) -> Any:
    """A JSON-able form of a value that JSON does not support."""
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

    dense = tensor.detach().cpu().to_dense().resolve_conj().contiguous()
    values = dense.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _hash(values)]


def _hash(values: bytes) -> str:
    return hashlib.blake2b(values, digest_size=8).hexdigest()
