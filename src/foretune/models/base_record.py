"""`foretune.json`, the record beside a retrained base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, with_config
from torch import nn
from typing_extensions import TypedDict

from foretune.entry_points import entry_point
from foretune.errors import UserError
from foretune.files import BASE_FILE, BASIS_FILE, write_whole
from foretune.formats import BASE, read_json, stamped
from foretune.models.checkpoint import stored_dtypes
from foretune.models.surgery import head_width, name_outputs, set_trainable


@with_config(ConfigDict(extra="allow"))
class ObjectiveRecord(TypedDict, total=False):
    """The objective's settings, by the names of its fields, and what it learnt of the tasks."""

    kind: str
    labels: dict[str, list[str | int | float]]
    space: list[str | int | float] | None
    guess: float | None


class BaseRecord(TypedDict, total=False):
    """How the base was retrained, and what its weights do not say."""

    foretune: str
    base_model: str | None
    datasets: list[str]
    method: dict[str, Any]
    objective: ObjectiveRecord
    fingerprint: str
    trainable: list[str]
    head_labels: list[str | None] | None
    adapting: dict[str, Any]


def read_base_record(folder: Path) -> BaseRecord | None:
    """The record in the folder of a base; None where there is none.

    Raises:
        UserError: It is damaged.
    """
    file = folder / BASE_FILE
    return read_json(file, BaseRecord, BASE) if file.is_file() else None


def record_adapting(folder: Path, adapting: Mapping[str, Any]) -> None:
    """Adds to the record of a base how it is best adapted.

    Args:
        folder: The folder of the base.
        adapting: What held-out tasks chose, as JSON types.
    """
    _add(folder, adapting=adapting)


def record_origin(folder: Path, base_model: str | None, datasets: Sequence[str]) -> None:
    """Adds to the record of a base what of the Hub it was made from.

    Args:
        folder: The folder of the base.
        base_model: Id of the pretrained model; None where it is not of the Hub.
        datasets: Ids of the data sets that it was retrained on.
    """
    _add(folder, base_model=base_model, datasets=list(datasets))


def _add(folder: Path, **fields: Any) -> None:
    file = folder / BASE_FILE
    earlier = read_json(file, dict[str, Any], BASE)
    record = {**earlier, **fields}
    if record != earlier:
        write_whole(file, json.dumps(stamped(record, BASE), indent=1))


def restore(folder: Path, model: nn.Module) -> None:
    """Gives the model what lies beside it: parameters to train, its head's labels, its basis.

    How it is best adapted becomes its attribute `foretune_adapting`.

    Raises:
        UserError: The record or the basis is damaged.
    """
    if (folder / BASIS_FILE).is_file():
        entry_point("foretune.adapters.basis_file:attach_basis")(folder, model)
    record = read_base_record(folder)
    if record is None:
        return
    if "trainable" in record:
        names = set(record["trainable"])
        set_trainable(model, {name: name in names for name, _ in model.named_parameters()})
    model.foretune_adapting = record.get("adapting")  # type: ignore[assignment]
    # Earlier versions recorded the labels as the objective's.
    labels = record.get("head_labels", record.get("objective", {}).get("space"))
    if isinstance(labels, list):
        with_meaning = [str(label) for label in labels if label is not None]
        width = head_width(model)
        if len({*with_meaning}) < len(with_meaning) or (width is not None and len(labels) > width):
            raise UserError(
                f"{folder / BASE_FILE} is damaged: head_labels: {len(labels)} labels, of which "
                f"{len({*with_meaning})} differ, for {width} outputs"
            )
        name_outputs(model, labels)


def check_fingerprint(folder: Path, model: nn.Module) -> None:
    """Checks that the weights of a retrained base are those that were saved.

    Args:
        folder: The folder of the base; without a record in it nothing is checked.
        model: The model with the weights of the folder, in any precision.

    Raises:
        UserError: They differ, or the record is damaged.
    """
    saved = (read_base_record(folder) or {}).get("fingerprint")
    halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    if saved is None or (halves and "F32" in stored_dtypes(folder)):  # rounded on loading
        return
    is_base: Any = entry_point("foretune.adapters.fingerprint:is_base")
    if not is_base(model, {"base": saved, "without": ()}):
        raise UserError(
            f"the weights in {folder} are not those that were retrained: {folder / BASE_FILE} "
            f"records the fingerprint {saved[:12]}; retrain again, or remove that file to load the "
            "folder as any other model"
        )
