"""The basis of a base: on the model, and in a file beside it.

The file is in a folder of its own: vLLM takes every safetensors file beside a model for weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from typing_extensions import TypedDict

from foretune.adapters.basis import Basis
from foretune.errors import UserError
from foretune.files import BASIS_FILE, whole_folder
from foretune.formats import BASIS, check_format, parse_json, read_tensors
from foretune.models.base_record import read_base_record

ATTRIBUTE = "foretune_basis"
SHARED, LAYERS = ("mean", "directions"), ("left", "right")  # tensors of each part, of each layer


class _Header(TypedDict):
    """What the file says beside its tensors; `base` is the fingerprint of the base."""

    parts: list[str]
    layers: list[str]
    heads: list[str]
    labels: list[str]
    spread: dict[str, float]
    scale: dict[str, float]
    explained: list[float]
    in_span: float
    base: str | None


def basis_of(model: nn.Module) -> Basis | None:
    """The basis that belongs to this base; None where it has none."""
    basis = getattr(model, ATTRIBUTE, None)
    return basis if isinstance(basis, Basis) else None


def set_basis(model: nn.Module, basis: Basis | None) -> None:
    """Gives a base its basis, or none; copies of the model have it too.

    Raises:
        UserError: The model lacks a layer or head of the basis.
    """
    if basis is not None:
        basis.check_fits(model)
    object.__setattr__(model, ATTRIBUTE, basis)


def save_basis(basis: Basis, folder: Path | str) -> Path:
    """Writes a basis beside the base in a folder; returns the path of the file."""
    folder = Path(folder)
    tensors = {"seen": basis.seen}
    for kind in (*SHARED, *LAYERS):
        tensors |= {f"{kind}:{name}": value for name, value in getattr(basis, kind).items()}
    header = _Header(
        parts=list(basis.mean),
        layers=list(basis.left),
        heads=list(basis.heads),
        labels=list(basis.labels),
        spread=dict(basis.spread),
        scale=dict(basis.scale),
        explained=list(basis.explained),
        in_span=basis.in_span,
        base=_fingerprint(folder),
    )
    metadata = {"format": BASIS, "about": json.dumps(header)}
    with whole_folder((folder / BASIS_FILE).parent) as part:
        contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(contiguous, part / Path(BASIS_FILE).name, metadata)
    return folder / BASIS_FILE


def load_basis(folder: Path | str) -> Basis | None:
    """Reads the basis beside the base in a folder; None where there is none.

    Raises:
        UserError: It is damaged, or it belongs to another base.
    """
    path = Path(folder) / BASIS_FILE
    if not path.exists():
        return None
    tensors, header = read_tensors(path), _read_header(path)
    if header["base"] != _fingerprint(Path(folder)):
        raise UserError(f"{path} belongs to another base than the one in {folder}: remove it")
    expected = {"seen"}
    expected |= {f"{kind}:{name}" for kind in SHARED for name in header["parts"]}
    expected |= {f"{kind}:{name}" for kind in LAYERS for name in header["layers"]}
    if tensors.keys() != expected:
        name = min(tensors.keys() ^ expected)
        raise UserError(
            f"{path} is damaged: {name} is {'not needed' if name in tensors else 'missing'}"
        )
    if not set(header["layers"]) <= set(header["parts"]) or tensors["seen"].dim() != 2:
        raise UserError(f"{path} is damaged: its parts do not fit one another")
    by_kind = {
        kind: {name: tensors[f"{kind}:{name}"] for name in names}
        for kinds, names in ((SHARED, header["parts"]), (LAYERS, header["layers"]))
        for kind in kinds
    }
    basis = Basis(
        mean=by_kind["mean"],
        directions=by_kind["directions"],
        left=by_kind["left"],
        right=by_kind["right"],
        spread=header["spread"],
        scale=header["scale"],
        heads=tuple(header["heads"]),
        labels=tuple(header["labels"]),
        seen=tensors["seen"],
        explained=header["explained"],
        in_span=header["in_span"],
    )
    _check_shapes(path, basis)
    return basis


def attach_basis(folder: Path, model: nn.Module) -> None:
    """Gives a model from a folder the basis that lies beside it.

    Raises:
        UserError: It is damaged or does not fit the model.
    """
    basis = load_basis(folder)
    try:
        set_basis(model, basis)
    except UserError as error:
        raise UserError(f"{folder / BASIS_FILE} does not fit the base beside it: {error}") from None


def _fingerprint(folder: Path) -> str | None:
    """The fingerprint that the base in a folder records."""
    return (read_base_record(folder) or {}).get("fingerprint")


def _read_header(path: Path) -> _Header:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from error
    if "format" not in metadata:
        raise UserError(f"{path} is not a basis: its format is None, expected {BASIS!r}")
    check_format(path, metadata, BASIS)
    return parse_json(metadata.get("about", ""), path, _Header)


def _check_shapes(path: Path, basis: Basis) -> None:
    """Checks that all tensors of a part have the shapes that the others say.

    Raises:
        UserError: One has not; the message names its part.
    """
    for name, mean in basis.mean.items():
        expected = (basis.rank, *mean.shape)
        fits = (
            basis.directions[name].shape == expected
            and {name} <= basis.scale.keys() & basis.spread.keys()
        )
        if name in basis.left:
            left, right = basis.left[name], basis.right[name]
            fits = fits and left.dim() == right.dim() == mean.dim() == 2
            fits = fits and (left.shape[1], len(right)) == mean.shape
        if not fits:
            raise UserError(f"{path} is damaged: the tensors of {name} do not fit one another")
