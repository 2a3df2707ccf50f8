"""faiss's graph of a store's keys: built once, saved beside the store, mapped from its files."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from foretune.decoding import nearest
from foretune.decoding.nearest import FaissIndex, faiss_module
from foretune.errors import ForetuneError, UserError
from foretune.files import whole_folder
from foretune.formats import read_json, stamped

INDEX_FILE = "index.json"
FORMAT = "foretune-index-1"  # of index.json
COMPARED = 256  # vectors of a file that are compared with the store's keys


class IndexRecord(TypedDict):
    """The fields of index.json."""

    keys: str
    heads: int
    bytes: list[int]


def store_indices(keys: Tensor, heads: int, folder: Path | None) -> list[FaissIndex]:
    """The index of each slice of a store's keys.

    A graph is read from the store's folder if it is of these keys, and otherwise built and saved
    there. A folder that cannot be written only costs the next process the time.

    Args:
        keys: (N, d), on the CPU.
        heads: Number of slices.
        folder: The store's folder; None for a store that has none.

    Raises:
        UserError: faiss is not installed.
    """
    parts = keys.chunk(heads, dim=1)
    if folder is None or len(keys) <= nearest.FLAT:
        return [FaissIndex(part) for part in parts]
    faiss_module()
    final, digest = folder / f"faiss-{heads}", keys_sha256(keys)
    if final.exists():
        try:
            return _read(final, parts, digest)
        except UserError as error:
            warnings.warn(f"{error}; it is built again", stacklevel=2)
    warnings.warn(
        f"building the index of {len(keys):,} entries, once; it is saved in {final}", stacklevel=2
    )
    indices = [FaissIndex(part) for part in parts]
    try:
        _write(final, indices, digest)
    except ForetuneError as error:
        warnings.warn(f"the index is not saved: {error}", stacklevel=2)
        return indices
    return _read(final, parts, digest)


def keys_sha256(keys: Tensor) -> str:
    """SHA-256 of the type, shape and values of keys (N, d)."""
    digest = hashlib.sha256(f"{keys.dtype} {tuple(keys.shape)}".encode())
    digest.update(keys.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(final: Path, indices: list[FaissIndex], digest: str) -> None:
    with whole_folder(final) as part:
        files = [part / f"{i}.faiss" for i in range(len(indices))]
        for index, file in zip(indices, files, strict=True):
            try:
                faiss_module().write_index(index.index, str(file))
            except RuntimeError as error:  # faiss reports a full disk so
                raise UserError(f"cannot write {file}: {_first_line(error)}") from error
        record = {
            "keys": digest,
            "heads": len(indices),
            "bytes": [file.stat().st_size for file in files],
        }
        (part / INDEX_FILE).write_text(json.dumps(stamped(record, FORMAT)) + "\n", "utf-8")


def _read(folder: Path, parts: tuple[Tensor, ...], digest: str) -> list[FaissIndex]:
    """The indices in a folder, mapped from their files.

    Raises:
        UserError: They are not of these keys, or a file is damaged.
    """
    record = read_json(folder / INDEX_FILE, IndexRecord, FORMAT)
    files = [folder / f"{i}.faiss" for i in range(len(parts))]
    if record["keys"] != digest or record["heads"] != len(parts):
        raise UserError(f"the index in {folder} is of other keys than the store's")
    for file, size in zip(files, record["bytes"], strict=False):
        if not file.is_file() or file.stat().st_size != size:
            raise UserError(f"{file} is not whole")
    return [FaissIndex(part, _mapped(file, part)) for file, part in zip(files, parts, strict=True)]


def _mapped(file: Path, keys: Tensor) -> Any:
    """The index of faiss for keys (N, d), mapped from its file.

    Raises:
        UserError: The file is damaged, or its vectors are not these keys.
    """
    faiss = faiss_module()
    try:
        index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        fits = (index.ntotal, index.d) == tuple(keys.shape) and hasattr(index, "hnsw")
        sample = torch.linspace(0, len(keys) - 1, COMPARED).long().unique() if fits else None
        if sample is not None:
            vectors = torch.from_numpy(index.reconstruct_batch(sample.numpy()))
            fits = torch.equal(vectors, keys[sample].float())
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{file} is damaged: {_first_line(error)}") from error
    if not fits:
        raise UserError(f"{file} holds other vectors than the store's keys")
    return index


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
