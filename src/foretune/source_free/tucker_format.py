"""The file format of a model in Tucker form.

model.safetensors   weights, factors and cores
sfda.json           architecture, ranks by layer, labels, imputer, scores
README.md           model card
config.json         the model's config, for an architecture of transformers
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NotRequired

import safetensors.torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import TypedDict

from foretune.errors import UserError
from foretune.files import CARD_FILE, WEIGHTS_FILE
from foretune.formats import build_for, damage_named, load_tensors, read_json, stamped
from foretune.models.loading import load_named_module
from foretune.models.surgery import match_head
from foretune.source_free import MODEL_FILE
from foretune.source_free.imputer import Imputer
from foretune.source_free.time_series_cnn import TimeSeriesCNN
from foretune.source_free.tucker import tucker_layers, tuckerize

FORMAT = "foretune-tucker-1"  # of sfda.json


def write_tucker(model: nn.Module, folder: Path, metadata: dict[str, Any]) -> None:
    """Writes a model in the format that `load_tucker` reads.

    Args:
        model: A model with layers in Tucker form.
        folder: An existing folder.
        metadata: Further entries of sfda.json.

    Raises:
        UserError: The architecture of the model is unknown.
    """
    imputer = getattr(model, "imputer", None)
    record = {
        "architecture": _architecture(model, folder),
        "ranks": {name: list(layer.ranks) for name, layer in tucker_layers(model).items()},
        "imputer": None if imputer is None else imputer.out.out_features,
        **metadata,
    }
    safetensors.torch.save_model(model, str(folder / WEIGHTS_FILE))
    (folder / MODEL_FILE).write_text(
        json.dumps(stamped(record, FORMAT), indent=1) + "\n", encoding="utf-8"
    )
    (folder / CARD_FILE).write_text(
        "---\nlibrary_name: foretune\ntags: [foretune, subspace-sfda]\n---\n\n"
        "# Source model in Tucker form\n\nIts layers are factored into a small core and two bases "
        "(ranks in sfda.json). Adapt it to unlabelled windows:\n\n"
        "```\nforetune sfda adapt THIS_FOLDER --rows target.npz --out adapted\n```\n",
        encoding="utf-8",
    )


class Metadata(TypedDict):
    """The fields of sfda.json that are read back."""

    architecture: dict[str, Any]
    ranks: dict[str, list[int | None]]
    imputer: int | None
    labels: NotRequired[list[str | int]]
    domain: NotRequired[str]
    shape: NotRequired[list[int]]
    rate: NotRequired[float | None]


def load_tucker(
    folder: Path | str, *, trust_remote_code: bool = False
) -> tuple[nn.Module, Metadata]:
    """Loads a model written by `write_tucker`.

    Args:
        folder: The folder.
        trust_remote_code: Run the Python file that the folder names, if it names one.

    Returns:
        (model, contents of sfda.json).

    Raises:
        UserError: The folder holds no such model, or its files do not match.
    """
    folder = Path(folder)
    file = folder / MODEL_FILE
    if not file.is_file():
        raise UserError(
            f"{folder} is not a prepared model: it has no {MODEL_FILE}; `foretune sfda prepare` "
            "writes one"
        )
    metadata = read_json(file, Metadata, FORMAT)
    if "shape" in metadata and len(metadata["shape"]) != 2:
        raise UserError(f"{file} is damaged: shape: {metadata['shape']} is not channels and length")

    def build() -> nn.Module:
        model = _build(metadata["architecture"], folder, trust_remote_code)
        if metadata["architecture"]["kind"] == "module" and "labels" in metadata:
            match_head(model, len(metadata["labels"]), 0)  # preparing fits the head to the labels
        if metadata["ranks"]:
            tuckerize(model, ranks=metadata["ranks"], fit=False)
        if metadata["imputer"] is not None:
            model.imputer = Imputer(metadata["imputer"])
            model.imputer.requires_grad_(False)
        return model

    with damage_named(file):
        by_user = metadata["architecture"]["kind"] == "module"  # its code may need real tensors
        model = build() if by_user else build_for(folder / WEIGHTS_FILE, build)
    load_tensors(model, folder / WEIGHTS_FILE)
    model.name_or_path = str(folder)  # type: ignore[assignment]
    return model.eval(), metadata


def _architecture(model: nn.Module, folder: Path) -> dict[str, Any]:
    if isinstance(model, TimeSeriesCNN):
        return {"kind": "time-series-cnn", **model.sizes}
    if isinstance(model, transformers.PreTrainedModel):
        model.config.save_pretrained(folder)
        return {"kind": "transformers", "class": type(model).__name__}
    origin: Any = getattr(model, "foretune_module", None)
    if origin is None:
        raise UserError(
            f"{type(model).__name__} cannot be saved, as its architecture is unknown; load the "
            "model with load_module(file, factory)"
        )
    return {"kind": "module", **origin}


def _build(architecture: dict[str, Any], folder: Path, trust_remote_code: bool) -> nn.Module:
    fields = dict(architecture)
    kind = fields.pop("kind")
    if kind == "time-series-cnn":
        return TimeSeriesCNN(**fields)
    if kind == "module":
        return load_named_module(folder / MODEL_FILE, fields, trust_remote_code=trust_remote_code)
    model_class = getattr(transformers, str(fields.get("class")), None)
    is_model = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    if kind != "transformers" or not is_model:
        raise ValueError(f"unknown architecture {architecture}")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model: nn.Module = model_class(config)  # type: ignore[misc]
    return model
