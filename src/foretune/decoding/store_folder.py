"""The folder of a `ReferenceStore`: safetensors, metadata and rows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretune.decoding import STORE_FILE
from foretune.errors import UserError
from foretune.files import write_whole
from foretune.formats import check_format, stamped

TENSORS_FILE, ROWS_FILE = "store.safetensors", "rows.jsonl"
FORMAT = "foretune-store-1"  # of store.json


def write_store(
    folder: Path,
    tensors: dict[str, Tensor],
    rows: Sequence[Mapping[str, Any]],
    metadata: Mapping[str, Any],
) -> None:
    """Writes the three files of a store into an empty folder."""
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
    (folder / ROWS_FILE).write_text("".join(f"{line}\n" for line in lines), "utf-8")
    (folder / STORE_FILE).write_text(_as_text(metadata), "utf-8")


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Replaces `store.json`."""
    write_whole(folder / STORE_FILE, _as_text(metadata))


def read_store(folder: Path) -> tuple[dict[str, Tensor], list[Any], dict[str, Any]]:
    """(tensors, rows, metadata) of a store's folder; call it within `damage_reported`.

    Raises:
        UserError: A file is missing.
    """
    for name in (TENSORS_FILE, STORE_FILE, ROWS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is not a store: it has no {name}; foretune datastore build makes one"
            )
    metadata = json.loads((folder / STORE_FILE).read_text("utf-8"))
    check_format(folder / STORE_FILE, metadata, FORMAT)
    lines = (folder / ROWS_FILE).read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return load_file(folder / TENSORS_FILE), rows, metadata


@contextlib.contextmanager
def damage_reported(folder: Path) -> Iterator[None]:
    """Inside the block, errors of malformed files become a UserError.

    Raises:
        UserError: The store is damaged.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{folder} is a damaged store: {reason}; rebuild it") from error


def _as_text(metadata: Mapping[str, Any]) -> str:
    return json.dumps(stamped(metadata, FORMAT), indent=1, ensure_ascii=False) + "\n"
