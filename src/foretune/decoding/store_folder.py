"""The folder of a `ReferenceStore`: safetensors, metadata and rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from foretune.decoding import STORE_FILE
from foretune.errors import UserError
from foretune.files import write_whole
from foretune.formats import damage_named, read_json, read_tensors, stamped

TENSORS_FILE, ROWS_FILE = "store.safetensors", "rows.jsonl"
FORMAT = "foretune-store-2"  # of store.json


class ModelFingerprints(TypedDict):
    """Digests of the model that a store was built with."""

    base: str
    adapter: str | None


class Metadata(TypedDict):
    """The fields of store.json that are read back."""

    kind: Literal["label", "choice", "completion", "text"]
    labels: dict[str, int] | dict[str, list[int]]  # version 1: the first token of each
    model: ModelFingerprints | None
    name: str | None
    lookup: dict[str, Any]
    tuned: dict[str, Any] | None
    rows: NotRequired[int]


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


def read_store(folder: Path) -> tuple[dict[str, Tensor], list[Any], Metadata]:
    """(tensors, rows, metadata) of a store's folder.

    Raises:
        UserError: A file is missing or damaged.
    """
    for name in (TENSORS_FILE, STORE_FILE, ROWS_FILE):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is not a store: it has no {name}; foretune datastore build makes one"
            )
    metadata = read_json(folder / STORE_FILE, Metadata, FORMAT)
    with damage_named(folder / ROWS_FILE):
        lines = (folder / ROWS_FILE).read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
    if metadata.get("rows", len(rows)) != len(rows):
        raise UserError(
            f"{folder / ROWS_FILE} is damaged: it has {len(rows)} rows of {metadata['rows']}"
        )
    return read_tensors(folder / TENSORS_FILE), rows, metadata


def labels_and_values(
    metadata: Metadata, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, list[int]], Tensor, Tensor | None]:
    """(label → tokens, values (N,), log-probabilities of the model) of a store of either version.

    In version 1 values are the first tokens of labels, and the model has scored the true one alone,
    which does not help to tune.
    """
    labels = {k: [v] if isinstance(v, int) else v for k, v in metadata["labels"].items()}
    values, model_log_p = tensors["values"], tensors.get("own")
    if labels and model_log_p is not None and model_log_p.ndim == 1:
        order = torch.tensor([tokens[0] for tokens in labels.values()]).sort()
        values, model_log_p = order.indices[torch.searchsorted(order.values, values)], None
    return labels, values, model_log_p


def _as_text(metadata: Mapping[str, Any]) -> str:
    return json.dumps(stamped(metadata, FORMAT), indent=1, ensure_ascii=False) + "\n"
