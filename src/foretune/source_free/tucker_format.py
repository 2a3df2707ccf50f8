"""A model in Tucker form on disk: what it is made of, its ranks, its weights, its labels.

model.safetensors   weights, factors and cores
sfda.json           architecture, ranks by layer, labels, imputer, scores
README.md           what it is; config.json where transformers has the architecture
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import transformers
from safetensors import SafetensorError
from torch import nn

from foretune.errors import UserError
from foretune.models.loading import WEIGHTS_FILE, load_module
from foretune.source_free.imputer import Imputer
from foretune.source_free.time_series_cnn import TimeSeriesCNN
from foretune.source_free.tucker import tucker_layers, tuckerize

ABOUT, CARD = "sfda.json", "README.md"


def write_tucker(model: nn.Module, folder: Path, about: dict[str, Any]) -> None:
    """Writes a model, so that `load_tucker` reads it.

    Args:
        model: With layers in Tucker form.
        folder: Exists.
        about: More for sfda.json.

    Raises:
        UserError: A model that no file says how to build.
    """
    imputer = getattr(model, "imputer", None)
    record = {
        "architecture": _architecture(model, folder),
        "ranks": {name: list(layer.ranks) for name, layer in tucker_layers(model).items()},
        "imputer": None if imputer is None else imputer.out.out_features,
        **about,
    }
    safetensors.torch.save_model(model, str(folder / WEIGHTS_FILE))
    (folder / ABOUT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(
        "---\nlibrary_name: foretune\ntags: [foretune, subspace-sfda]\n---\n\n"
        "# A source model in Tucker form\n\nIts convolutions are small cores between two bases "
        "(ranks in sfda.json). Adapt it to rows without labels:\n\n"
        "```\nforetune sfda adapt THIS_FOLDER --rows target.npz --out adapted\n```\n",
        encoding="utf-8",
    )


def load_tucker(folder: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """(model, what sfda.json says).

    Raises:
        UserError: The folder holds no such model, or its files do not fit each other.
    """
    folder = Path(folder)
    file = folder / ABOUT
    if not file.is_file():
        raise UserError(
            f"{folder} is no prepared model: it has no {ABOUT}; `foretune sfda prepare` makes one"
        )
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        model = _build(about["architecture"], folder)
        if about["ranks"]:
            tuckerize(model, ranks=about["ranks"], fit=False)
        if about["imputer"] is not None:
            model.imputer = Imputer(about["imputer"])
            model.imputer.requires_grad_(False)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not readable: {' '.join(str(error).split())[:200]}") from error
    try:
        safetensors.torch.load_model(model, str(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / WEIGHTS_FILE} does not fit {file}: {reason}") from error
    model.name_or_path = str(folder)  # type: ignore[assignment]
    return model.eval(), about


def _architecture(model: nn.Module, folder: Path) -> dict[str, Any]:
    if isinstance(model, TimeSeriesCNN):
        return {"kind": "time-series-cnn", **model.sizes}
    if isinstance(model, transformers.PreTrainedModel):
        model.config.save_pretrained(folder)
        return {"kind": "transformers", "class": type(model).__name__}
    made: Any = getattr(model, "foretune_module", None)
    if made is None:
        raise UserError(
            f"{type(model).__name__} does not say how it is built, so it cannot be written: load "
            "it by load_module(file, factory)"
        )
    return {"kind": "module", **made}


def _build(architecture: dict[str, Any], folder: Path) -> nn.Module:
    about = dict(architecture)
    kind = about.pop("kind")
    if kind == "time-series-cnn":
        return TimeSeriesCNN(**about)
    if kind == "module":
        return load_module(about["file"], about["factory"], **about["args"])
    if kind != "transformers" or not hasattr(transformers, str(about["class"])):
        raise ValueError(f"unknown architecture {architecture}")
    config = transformers.AutoConfig.from_pretrained(folder)
    model: nn.Module = getattr(transformers, about["class"])(config)
    return model
