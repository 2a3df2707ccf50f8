"""Digests of examples.

`digest_of` checks that a resumed run has the data it was started with; `rows_sha256` says in an
adapter's folder which rows it was trained on, whatever file they were read from.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from foretune.tasks.example import DrawnExample, Example
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


def rows_sha256(rows: Iterable[Example]) -> str:
    """64 hexadecimal digits, equal for equal rows in any order, whichever format they came in.

    It is the SHA-256 of the sorted SHA-256 digests (32 bytes each) of the rows, each written as
    JSON in UTF-8 with sorted keys and without blanks. Cells that are null are left out; numbers
    are written as text, since a CSV file has nothing else, with the precision of float32, which is
    what a model reads; an array is its shape and the SHA-256 of its float32 values. Candidates that
    were drawn are left out: a row counts as it was read.
    """
    digests = sorted(hashlib.sha256(_canonical_text(row)).digest() for row in rows)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _canonical_text(row: Example) -> bytes:
    if isinstance(row, DrawnExample):
        drawn = ("candidates", "answer")
        fields = {name: value for name, value in row.items() if name not in drawn}
        row = {**fields, "response": row["candidates"][row["answer"]]}
    text = json.dumps(_canonical(row), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="surrogatepass")


def _canonical(value: Any) -> Any:
    """A form of a cell that all formats of files share."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {str(k): _canonical(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_canonical(element) for element in value]
    if hasattr(value, "detach"):
        value = value.detach().cpu().to_dense().float().numpy()
    if hasattr(value, "__array__"):
        import numpy as np

        array = np.asarray(value)
        if array.ndim == 0 or array.dtype.kind not in "fiub":
            return _canonical(array.tolist())
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(array, dtype="<f4").tobytes()
        return {"shape": list(array.shape), "float32": hashlib.sha256(data).hexdigest()}
    return _plain(value) if " at 0x" in repr(value) else str(value)


def _number(value: float) -> str:
    """A number with the precision of float32, in nine digits; a whole one without a point."""
    if value.is_integer():
        return str(int(value))
    try:
        (single,) = struct.unpack("<f", struct.pack("<f", value))
    except OverflowError:
        return repr(value)
    return f"{single:.9g}"


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
