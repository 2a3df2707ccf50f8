"""The folder of a run: refused if not empty, unless the user resumes or overwrites."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from foretune.errors import UserError
from foretune.files import INPUTS, RECIPE, RUN_FILE, check_folder, claim_folder, write_whole
from foretune.formats import INPUTS as INPUTS_FORMAT
from foretune.formats import RECIPE as RECIPE_FORMAT
from foretune.formats import RUN, stamped
from foretune.processes import num_processes
from foretune.recipes.yaml_io import parse_recipe_yaml

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Task

T = TypeVar("T")
MAY_DIFFER = ("out", "device")  # keys that may change when a run is resumed


def check_place(folder: Path, *, resume: bool, overwrite: bool, config: str | None = None) -> None:
    """Checks whether `prepare_folder` would accept the folder, without changing it.

    Args:
        folder: Output folder.
        resume: Keep its content.
        overwrite: Remove its content.
        config: The resolved recipe, which must be that of a resumed run.

    Raises:
        UserError: The folder is not empty and neither or both of `resume` and `overwrite` are set,
            it was started with another recipe, or it was not made by foretune.
    """

    def check() -> None:
        if check_folder(folder, resume=resume, overwrite=overwrite) and resume and config:
            _check_same(folder, config)

    _first(check)


def prepare_folder(
    folder: Path, *, resume: bool, overwrite: bool, config: str | None = None
) -> Path:
    """Creates, empties or keeps the folder as asked, and writes the recipe into it.

    Raises:
        UserError: As `check_place`.
    """

    def prepare() -> Path:
        continued = claim_folder(folder, resume=resume, overwrite=overwrite)
        if continued and config:
            _check_same(folder, config)
        elif config:
            (folder / INPUTS).unlink(missing_ok=True)
            write_whole(folder / RECIPE, f"format: {RECIPE_FORMAT}\n{config}")
        return folder

    return _first(prepare)


def check_inputs(folder: Path, model: nn.Module, tasks: Sequence[Task]) -> None:
    """Records digests of the model and the examples of a run, or compares them when it is resumed.

    The recipe alone is not enough: the content of a file may have changed.

    Raises:
        UserError: The run was started with another model or other examples of a task.
    """
    from foretune.training.resume import check_same, inputs_of, read_record

    def check() -> None:
        names = sorted(task.name for task in tasks)
        inputs = {"tasks": names, **inputs_of(model, tasks)}
        path = folder / INPUTS
        if path.is_file():
            check_same(folder, read_record(path, INPUTS_FORMAT), inputs)
        else:
            write_whole(path, json.dumps(stamped(inputs, INPUTS_FORMAT), indent=1))

    _first(check)


def write_run_record(folder: Path) -> None:
    """Writes run.json, which says that the run is finished and in which environment."""
    from foretune.training.record import environment

    record = {"format": RUN, "finished": True, "environment": environment()}
    write_whole(folder / RUN_FILE, json.dumps(record, indent=1, ensure_ascii=False))


def _first(work: Callable[[], T]) -> T:
    """The result of `work`, done by the first of several processes."""
    if num_processes() == 1:
        return work()
    from foretune.training.process_group import process_group

    return process_group().on_first_process(work)


def _check_same(folder: Path, config: str) -> None:
    path = folder / RECIPE
    if not path.is_file():
        raise UserError(f"{folder} has no run to resume (no {RECIPE}): use --overwrite")
    begun = _flat(parse_recipe_yaml(path.read_text("utf-8"), str(path)))
    current = _flat(parse_recipe_yaml(config, "the recipe"))
    for key in dict.fromkeys([*begun, *current]):
        if key not in MAY_DIFFER and begun.get(key) != current.get(key):
            raise UserError(
                f"{folder} was started with {key}={begun.get(key)!r}, the recipe now says "
                f"{current.get(key)!r}: resume with the same recipe, or use --overwrite"
            )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, nested in value.items():
        flat |= _flat(nested, f"{prefix}.{key}" if prefix else str(key))
    return flat
