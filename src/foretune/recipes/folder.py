"""The folder of a run: refused when something is in it, unless the user says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from foretune.errors import UserError
from foretune.files import INPUTS, RECIPE, check_folder, claim_folder, write_whole
from foretune.processes import num_processes
from foretune.recipes.yaml_io import parse_yaml

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Task

T = TypeVar("T")
MOVABLE = ("out", "device")  # what may change between a run and its continuation


def check_place(folder: Path, *, resume: bool, overwrite: bool, config: str | None = None) -> None:
    """Refuses early what `prepare_folder` would refuse; nothing is done to the folder yet.

    Args:
        folder: Where the results go.
        resume: Keep what is in it.
        overwrite: Remove what is in it.
        config: The resolved recipe, which a resumed run must share.

    Raises:
        UserError: Something is in it and neither was asked for, both were, the folder was begun
            with another recipe, or no run of foretune's has made it.
    """

    def check() -> None:
        if check_folder(folder, resume=resume, overwrite=overwrite) and resume and config:
            _check_same(folder, config)

    _first(check)


def prepare_folder(
    folder: Path, *, resume: bool, overwrite: bool, config: str | None = None
) -> Path:
    """Makes the folder ready to be written to; the recipe is written into it.

    Raises:
        UserError: As `check_place`.
    """

    def prepare() -> Path:
        continued = claim_folder(folder, resume=resume, overwrite=overwrite)
        if continued and config:
            _check_same(folder, config)
        elif config:
            (folder / INPUTS).unlink(missing_ok=True)
            write_whole(folder / RECIPE, config)
        return folder

    return _first(prepare)


def check_inputs(folder: Path, model: nn.Module, tasks: Sequence[Task]) -> None:
    """Writes down the model and the rows of a run, or checks that it was begun with these.

    The recipe does not tell: a file may have changed under its name.

    Raises:
        UserError: The folder was begun with another model or other rows of a task.
    """
    from foretune.training.resume import check_same, inputs_of, read_record

    def check() -> None:
        names = sorted(task.name for task in tasks)
        inputs = {"tasks": names, **inputs_of(model, tasks)}
        path = folder / INPUTS
        if path.is_file():
            check_same(folder, read_record(path), inputs)
        else:
            write_whole(path, json.dumps(inputs, indent=1))

    _first(check)


def _first(work: Callable[[], T]) -> T:
    """Does it on the first of several processes."""
    if num_processes() == 1:
        return work()
    from foretune.training.process_group import process_group

    return process_group().on_first_process(work)


def _check_same(folder: Path, config: str) -> None:
    path = folder / RECIPE
    if not path.is_file():
        raise UserError(f"{folder} holds no run to resume (no {RECIPE}); use --overwrite")
    begun = _flat(parse_yaml(path.read_text("utf-8"), str(path)))
    wanted = _flat(parse_yaml(config, "the recipe"))
    for key in dict.fromkeys([*begun, *wanted]):
        if key not in MOVABLE and begun.get(key) != wanted.get(key):
            raise UserError(
                f"{folder} was begun with {key}={begun.get(key)!r}, the recipe now says "
                f"{wanted.get(key)!r}: resume with the same recipe, or use --overwrite"
            )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, below in value.items():
        flat |= _flat(below, f"{prefix}.{key}" if prefix else str(key))
    return flat
