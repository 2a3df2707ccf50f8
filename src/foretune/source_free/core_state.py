"""The difference between an adapted model and its base as a small folder, and how to apply it.

core.safetensors   the tensors that may differ from the base's: cores, batch normalisation
core.json          method, fingerprint of the other weights, labels, ranks if the base has none
README.md          model card
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NotRequired

import safetensors.torch
import torch
from torch import nn
from typing_extensions import TypedDict

from foretune.adapters.fingerprint import fingerprint
from foretune.errors import UserError
from foretune.files import CARD_FILE
from foretune.formats import read_json, read_tensors, stamped
from foretune.source_free import STATE_FILE, STATE_WEIGHTS_FILE
from foretune.source_free.tucker import tucker_layers, tuckerize

FORMAT = "foretune-core-1"  # of core.json


def write_core(
    folder: Path,
    model: nn.Module,
    names: list[str],
    *,
    factored: dict[str, Any],
    method: dict[str, Any],
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes the named tensors of an adapted model.

    Args:
        folder: An existing folder.
        model: The adapted model.
        names: The keys of its state that may differ from the base's.
        factored: (r_out, r_in) of each layer that is not factored in the base; {} for a prepared
            base.
        method: The method's `to_dict()`.
        metadata: Further entries of core.json.
    """
    state = model.state_dict()
    tensors = {name: state[name].detach().cpu().contiguous() for name in names}
    safetensors.torch.save_file(tensors, str(folder / STATE_WEIGHTS_FILE))
    count = sum(t.numel() for t in tensors.values())
    record = {
        "method": method,
        "base": str(getattr(model, "name_or_path", "") or ""),
        "rest": _rest_fingerprint(model, names, list(factored)),
        "factored": {name: list(ranks) for name, ranks in factored.items()},
        "numbers": count,
        **(metadata or {}),
    }
    (folder / STATE_FILE).write_text(
        json.dumps(stamped(record, FORMAT), indent=1) + "\n", encoding="utf-8"
    )
    base = record["base"] or "the base model"
    (folder / CARD_FILE).write_text(
        f"---\nlibrary_name: foretune\ntags: [foretune, {method['name']}]\n---\n\n"
        f"# Adapted state\n\n{count:,} parameters and statistics that replace those of {base}, "
        f"adapted by foretune ({method['name']}, loss {method.get('loss')}). All other weights are "
        "those of the base.\n\n"
        "```python\nfrom foretune.source_free.core_state import load_core\n\n"
        'model = load_core(base, "this folder")\n```\n',
        encoding="utf-8",
    )


class Metadata(TypedDict):
    """The fields of core.json that are read back."""

    base: str
    rest: str
    factored: dict[str, list[int | None]]
    stretched: NotRequired[float]


def read_metadata(folder: Path | str) -> Metadata:
    """The contents of core.json.

    Raises:
        UserError: The folder holds no adapted state, or core.json is not readable.
    """
    file = Path(folder) / STATE_FILE
    if not file.is_file():
        raise UserError(f"{folder} holds no adapted state: it has no {STATE_FILE}")
    return read_json(file, Metadata, FORMAT)


def record_stretch(folder: Path, factor: float) -> None:
    """Adds to core.json by how much the windows were stretched, as others must be, too."""
    file = folder / STATE_FILE
    record = {**read_json(file, dict[str, Any], FORMAT), "stretched": factor}
    file.write_text(json.dumps(stamped(record, FORMAT), indent=1) + "\n", encoding="utf-8")


def load_core(base: nn.Module, folder: Path | str) -> nn.Module:
    """A copy of the base with an adapted state loaded into it.

    Args:
        base: The model that was adapted; it is not changed.
        folder: One task's folder, written by `Adapted.save` or `foretune sfda adapt`.

    Raises:
        UserError: The folder holds no readable adapted state, or it belongs to another base.
    """
    metadata = read_metadata(folder)
    model = copy.deepcopy(base)
    if metadata["factored"]:
        tuckerize(model, ranks=metadata["factored"], fit=False)
    tensors = read_tensors(Path(folder) / STATE_WEIGHTS_FILE)
    state = model.state_dict()
    unmatched = [k for k, v in tensors.items() if k not in state or state[k].shape != v.shape]
    factored = list(metadata["factored"])
    if unmatched or _rest_fingerprint(model, list(tensors), factored) != metadata["rest"]:
        reason = f"it has no {unmatched[0]} of that shape" if unmatched else "its weights differ"
        raise UserError(
            f"{folder} does not belong to this base: {reason}; it was adapted from "
            f"{metadata.get('base') or 'a model in memory'}"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            state[name].copy_(value)
    return model


def _rest_fingerprint(model: nn.Module, adapted: list[str], factored: list[str]) -> str:
    """The fingerprint of the weights that adaptation leaves unchanged."""
    assert all(name in tucker_layers(model) for name in factored)
    return fingerprint(model, [*adapted, *factored])
