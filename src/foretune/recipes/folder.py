"""The folder of a run: refused if not empty, unless the user resumes or overwrites."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foretune.claims import is_used, output_folder
from foretune.errors import UserError
from foretune.files import INPUTS, RECIPE, RUN_FILE, write_whole
from foretune.formats import INPUTS as INPUTS_FORMAT
from foretune.formats import RECIPE as RECIPE_FORMAT
from foretune.formats import RUN, read_json, stamped
from foretune.processes import num_processes, process_rank
from foretune.recipes.yaml_io import parse_recipe_yaml

if TYPE_CHECKING:
    from torch import nn

    from foretune.tasks.task import Task

T = TypeVar("T")
MAY_DIFFER = ("out", "device", "trackers")  # keys that may change when a run is resumed


@contextlib.contextmanager
def run_folder(
    folder: Path,
    kind: str,
    *,
    resume: bool,
    overwrite: bool,
    config: str | None = None,
    reads: Sequence[Path | str] = (),
) -> Iterator[Path]:
    """Claims the folder of a run and writes the recipe into it.

    Args:
        folder: Output folder.
        kind: See `output_folder`.
        resume: Continue its run.
        overwrite: Replace its result.
        config: The resolved recipe, which must be that of a resumed run.
        reads: Files and folders that the run reads.

    Yields:
        The folder to write to.

    Raises:
        UserError: As `output_folder`, or the run was started with another recipe.
    """
    with contextlib.ExitStack() as claim:

        def begin() -> Path:
            place = output_folder(folder, kind, resume=resume, overwrite=overwrite, reads=reads)
            out = claim.enter_context(place)
            if config and (out / RECIPE).is_file():
                _check_same(out, config)
            elif config and is_used(out):
                raise UserError(f"{folder} has no run to resume (no {RECIPE}): use --overwrite")
            elif config:
                write_whole(out / RECIPE, f"format: {RECIPE_FORMAT}\n{config}")
            return out

        yield on_first_process(begin)


def check_inputs(folder: Path, model: nn.Module, tasks: Iterable[Task], tokenizer: Any) -> None:
    """Records what identifies the inputs of a run, or compares it when the run is resumed.

    The recipe alone is not enough: the content of a file may have changed.

    Raises:
        UserError: The run was started with another model or tokenizer, or other examples of a task.
    """
    from foretune.training.resume import check_same, inputs_of, read_record

    tasks = list(tasks)

    def check() -> None:
        names = sorted(task.name for task in tasks)
        inputs = {"tasks": names, **inputs_of(model, tasks, tokenizer)}
        path = folder / INPUTS
        if path.is_file():
            check_same(folder, read_record(path, INPUTS_FORMAT), inputs)
        else:
            write_whole(path, json.dumps(stamped(inputs, INPUTS_FORMAT), indent=1))

    on_first_process(check)


def write_run_record(folder: Path) -> None:
    """Writes run.json, which says that the run is finished and in which environment."""
    from foretune.training.record import environment

    record = {"format": RUN, "finished": True, "environment": environment()}
    write_whole(folder / RUN_FILE, json.dumps(record, indent=1, ensure_ascii=False))


def is_finished(folder: Path) -> bool:
    """Whether the run or the retraining in a folder has come to its end."""
    file = folder / RUN_FILE
    return file.is_file() and read_json(file, dict[str, Any], RUN).get("finished") is True


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically, in the first of several processes."""
    if process_rank() == 0:
        write_whole(path, json.dumps(value, indent=1, ensure_ascii=False))


def on_first_process(work: Callable[[], T]) -> T:
    """The result of `work`, done by the first of several processes."""
    if num_processes() == 1:
        return work()
    from foretune.training.process_group import process_group

    return process_group().on_first_process(work)


def _check_same(folder: Path, config: str) -> None:
    path = folder / RECIPE
    begun = flat(parse_recipe_yaml(path.read_text("utf-8"), str(path)))
    current = flat(parse_recipe_yaml(config, "the recipe"))
    for key in dict.fromkeys([*begun, *current]):
        if key not in MAY_DIFFER and begun.get(key) != current.get(key):
            raise UserError(
                f"{folder} was started with {key}={begun.get(key)!r}, the recipe now says "
                f"{current.get(key)!r}: resume with the same recipe, or use --overwrite"
            )


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """A value by its dotted key, for all values in nested mappings.

    >>> flat({"retrain": {"steps": 10}, "seeds": 3})
    {'retrain.steps': 10, 'seeds': 3}
    """
    if not isinstance(value, dict):
        return {prefix: value}
    by_key: dict[str, object] = {}
    for key, nested in value.items():
        by_key |= flat(nested, f"{prefix}.{key}" if prefix else str(key))
    return by_key
