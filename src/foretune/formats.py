"""The formats of the files that foretune reads back, and the readers that check a file's content.

A file's version stands in it as a field "format".

"foretune-run-2" is version 2 of the record of a run. The number goes up when an earlier foretune
would misread the file; a field that it can ignore needs no new number. A file without the field was
written before there was one and counts as version 1. `docs/formats.md` lists all formats.

Formats of the core are defined here, those of a wing beside the wing's writer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foretune.errors import ForetuneError, UserError
from foretune.printable import in_one_line

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
M = TypeVar("M", bound="nn.Module")

FIELD = "format"
ADAPTING = "foretune-adapting-1"  # adapting.json, the search of how to adapt a base
ADAPTER = "foretune-adapter-2"  # base_fingerprint.json
BASE = "foretune-base-1"  # foretune.json
BASIS = "foretune-basis-1"  # foretune_basis/basis.safetensors
CHECKPOINT = "foretune-checkpoint-1"  # checkpoint-N/state.json
CHOICE = "foretune-choice-1"  # choice.json, the trials of `auto`
COMPARISON = "foretune-comparison-1"  # comparison.json, repeats/seed-N.json
GGUF = "foretune-gguf-1"  # gguf.json, in the cache
INPUTS = "foretune-inputs-1"  # inputs.json
MODULE = "foretune-module-1"  # foretune_module.json
RECIPE = "foretune-recipe-1"  # config.yaml
RUN = "foretune-run-1"  # run.json
SPARSE = "foretune-sparse-1"  # sparse_delta.safetensors
SPECTRUM = "foretune-spectrum-1"  # spectrum.json
STAGE = "foretune-stage-1"  # stage.json
TRAINED_ON = "foretune-trained-on-1"  # trained_on.json, beside an adapter

_NAME = re.compile(r"(foretune-[a-z-]+)-(\d+)")


def read_json(path: Path, shape: type[T], current: str | None = None) -> T:
    """Reads a JSON file and checks its content against a type.

    Nothing is coerced: a number in quotes is not a number. Fields that a `TypedDict` does not name
    are dropped.

    Args:
        path: The file.
        shape: The type of the content, such as `dict[str, list[str]]` or a `TypedDict`.
        current: Its format as it is written now, checked and taken out of the content; None for a
            file without the field.

    Returns:
        The content as `shape`.

    Raises:
        UserError: The file cannot be read, is not JSON, has another format, or its content is not
            of that type. The message names the first field that is wrong.
    """
    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"no file {path}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return parse_json(text, path, shape, current)


def parse_json(text: bytes | str, path: Path, shape: type[T], current: str | None = None) -> T:
    """As `read_json`, for a text that stands in the file at `path`.

    Raises:
        UserError: As `read_json`.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import from_json

    try:
        content = from_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if current is not None:
        content = unstamped(path, content, current)
    try:
        return TypeAdapter(shape).validate_python(content, strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field = ".".join(map(str, wrong["loc"])) or "its content"
        value = "" if wrong["type"] == "missing" else f", got {shortened(wrong['input'])}"
        raise UserError(f"{path} is damaged: {field}: {wrong['msg'].lower()}{value}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file of finite numbers.

    Returns:
        Tensors of any shape by name.

    Raises:
        UserError: The file cannot be read, is not a safetensors file, or a number in it is NaN or
            infinite; the message names the tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} is not a file" if path.exists() else f"no file {path}")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = in_one_line(str(error))
        raise UserError(f"{path} is not a readable safetensors file: {reason}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds NaN or infinite numbers")
    return tensors


def load_tensors(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file of finite numbers into a model.

    Raises:
        UserError: As `read_tensors`, or the tensors are not those of the model.
    """
    from safetensors.torch import load_model

    read_tensors(path)
    try:
        load_model(model, str(path))
    except RuntimeError as error:
        reason = shortened_text(in_one_line(str(error)))
        raise UserError(f"{path} does not fit the files beside it: {reason}") from error


def build_for(path: Path, build: Callable[[], M]) -> M:
    """Builds a model whose sizes a file gives, once they are those of its weights.

    It is built without memory first: sizes in a damaged file may be larger than all memory.

    Args:
        path: The safetensors file of its weights.
        build: Makes the model with random weights.

    Raises:
        UserError: A tensor of the model and of the file have different shapes.
    """
    import torch

    stored = {name: tensor.shape for name, tensor in read_tensors(path).items()}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    for name, shape in shapes.items():
        if stored.get(name, shape) != shape:
            raise UserError(
                f"{path} does not fit the files beside it: {name} has shape "
                f"{tuple(stored[name])}, not {tuple(shape)}"
            )
    return build()


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Inside the block, whatever the content of a file breaks becomes one line that names it.

    For code that builds something from a file's content, where a number that nobody checked ends up
    in any exception of any library.

    Raises:
        UserError: The block raised an exception that is not a `ForetuneError`.
        ForetuneError: The block raised it.
    """
    try:
        yield
    except ForetuneError:
        raise
    except Exception as error:
        reason = in_one_line(str(error))
        if "allocate" in reason or isinstance(error, MemoryError):
            reason = "it asks for more memory than there is"
        raise UserError(
            f"{path} is damaged: {type(error).__name__}: {shortened_text(reason)}"
        ) from error


def shortened_text(text: str, length: int = 200) -> str:
    """The text, cut after `length` characters."""
    return text if len(text) <= length else f"{text[:length]}…"


def shortened(value: Any, length: int = 60) -> str:
    """A value for a message, cut after `length` characters.

    >>> shortened(list(range(100)), 12)
    '[0, 1, 2, 3,…'
    """
    return shortened_text(ascii(value) if isinstance(value, str) else repr(value), length)


def stamped(record: Mapping[str, Any], current: str) -> dict[str, Any]:
    """The record with its format in front.

    >>> stamped({"finished": True}, RUN)
    {'format': 'foretune-run-1', 'finished': True}
    """
    return {FIELD: current, **{key: value for key, value in record.items() if key != FIELD}}


def unstamped(path: Path, record: Any, current: str) -> dict[str, Any]:
    """The record without its format, once that is checked.

    Raises:
        UserError: As `check_format`.
    """
    check_format(path, record, current)
    return {key: value for key, value in record.items() if key != FIELD}


def check_format(path: Path, record: Any, current: str) -> None:
    """Checks that this version of foretune can read a file.

    Args:
        path: The file, for the message.
        record: Its content; a format that is a bare number counts as that version.
        current: The format as it is written now.

    Raises:
        UserError: The content is not a mapping, its format is a different one, or a newer foretune
            wrote it.
    """
    kind, _, number = current.rpartition("-")
    if not isinstance(record, Mapping):
        raise UserError(f"{path} is not a file of format {current}: it holds no mapping")
    stored = record.get(FIELD, 1)
    if isinstance(stored, int) and not isinstance(stored, bool):
        stored = f"{kind}-{stored}"
    match = _NAME.fullmatch(str(stored))
    if match is None or match[1] != kind or int(match[2]) < 1:
        raise UserError(f"{path} is not a file of format {current}: its format is {stored!r}")
    if int(match[2]) > int(number):
        raise UserError(
            f"{path} was written by a newer foretune (format {stored}); this version reads up to "
            f"{current}: upgrade"
        )
