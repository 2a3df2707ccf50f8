"""Resuming: a folder continues only the run that it was started with; a finished run is loaded."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import TypedDict

from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import fingerprint
from foretune.adapters.peft_format import load_adapter
from foretune.claims import output_folder
from foretune.errors import UserError
from foretune.files import METRICS_FILE, RUN_FILE, SCORES_FILE, VERSIONS, write_whole
from foretune.formats import RUN, damage_named, parse_json, read_json, stamped
from foretune.manifest import record_files
from foretune.method import Method
from foretune.models.identity import config_of, tokenizer_digest
from foretune.models.loading import load_weights
from foretune.models.surgery import head_modules, head_width
from foretune.run import Run
from foretune.tasks.task import Objective, Task
from foretune.training.adapt_plan import AdaptPlan
from foretune.training.learners.joint import Learner
from foretune.training.outcome import Adapted, SavedTensors, folder_names, readable_name
from foretune.training.process_group import ProcessGroup
from foretune.training.scores_file import SavedTask, TaskDraw, read_scores, write_scores

SCORES_OF_RANK = ".scores-{}.json"  # until the last process has finished
# Fields that may differ between a run and its continuation: they do not change the result.
MOVABLE = ("out", "resume", "overwrite", "device", "tasks_per_wave")


START_OVER = "resume with these, or start over with --overwrite"


class RunRecord(TypedDict, total=False):
    """What is used of run.json and inputs.json; other fields are kept."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012
    finished: bool
    method: dict[str, Any]
    run: dict[str, Any]
    rows: dict[str, str]
    config: dict[str, Any]
    validation_score: float | None
    held_out_scores: dict[str, float] | None
    cost: dict[str, Any]


@contextlib.contextmanager
def claimed(run: Run, kind: str, group: ProcessGroup) -> Iterator[Run]:
    """Claims the folder of a run; the first of several processes does it for all.

    Yields:
        The run with the folder to write to as its `out`.

    Raises:
        UserError: As `output_folder`.
    """
    out = run.out
    if out is None:
        yield run
        return
    with contextlib.ExitStack() as claim:
        enter = lambda: claim.enter_context(  # noqa: E731
            output_folder(out, kind, resume=run.resume, overwrite=run.overwrite)
        )
        yield run.replace(out=group.on_first_process(enter))


def inputs_of(
    model: nn.Module, tasks: Iterable[Task], tokenizer: Any, heads: Sequence[str] = ()
) -> dict[str, Any]:
    """What identifies model, tokenizer and examples: inputs that no setting identifies.

    Args:
        model: The model.
        tasks: The tasks.
        tokenizer: Its tokenizer; None for none.
        heads: Names of modules that do not count.
    """
    return {
        "model": fingerprint(model, heads, buffers=True),
        "config": config_of(model),
        "tokenizer": tokenizer_digest(tokenizer),
        "rows": {task.name: task.digest for task in tasks},
    }


def inputs_to_adapt(
    base: nn.Module, model: nn.Module, tasks: Iterable[Task], objective: Objective
) -> dict[str, Any]:
    """What must be the same when more tasks are added: a head only where the tasks begin from it.

    A task with more labels than the base's head has outputs begins from a fresh head.
    """
    if objective.num_outputs() is None:
        return inputs_of(base, tasks, objective.tokenizer)
    has_its_head = head_width(model) == head_width(base)
    return {
        **inputs_of(base, tasks, objective.tokenizer, head_modules(base)),
        "head": fingerprint(base) if has_its_head else None,
    }


def begin(
    folder: Path,
    method: Method | AdaptPlan,
    run: Run,
    inputs: Mapping[str, Any],
    *,
    replace: bool = False,
    about_rows: str = START_OVER,
) -> dict[str, Any] | None:
    """Records which run begins in the folder, or checks that it is the one that was begun there.

    Args:
        folder: May hold a run to be resumed.
        method: The method's record, or the plan of a base.
        run: The run.
        inputs: What else must be the same, as JSON types. Of "rows" only the tasks of both runs
            are compared, and new tasks are added.
        replace: Whether a task may have other rows than before.
        about_rows: What to do where it may not, and has.

    Returns:
        The record of a run that has finished there, else None.

    Raises:
        UserError: The folder was started with something else; the message names it.
    """
    current = {"method": method.to_dict(), "run": run.to_dict(), **inputs}
    current = json.loads(json.dumps(current))  # tuples become lists, as in the file
    file = folder / RUN_FILE
    if not file.is_file():
        write_whole(file, json.dumps(stamped({"finished": False, **current}, RUN), indent=1))
        return None
    begun = read_record(file, RUN)
    check_same(folder, {**begun, "rows": {}} if replace else begun, current, about_rows)
    if begun.get("finished"):
        missing = [key for key in ("validation_score", "cost") if key not in begun]
        if missing:
            raise UserError(f"{file} is damaged: {missing[0]}: field required")
        return begun
    rows = {**begun.get("rows", {}), **current["rows"]}
    if rows != begun.get("rows"):
        write_whole(file, json.dumps({**begun, "rows": rows}, indent=1))
    return None


def read_record(file: Path, current_format: str) -> dict[str, Any]:
    """The record of an interrupted run, with its format.

    Args:
        file: The record.
        current_format: The newest format that is accepted.

    Raises:
        UserError: As `read_json`.
    """
    return stamped(read_json(file, RunRecord, current_format), current_format)


def check_same(
    folder: Path,
    begun: Mapping[str, Any],
    current: Mapping[str, Any],
    about_rows: str = START_OVER,
    *,
    than: str = "this run has",
    advice: str = START_OVER,
) -> None:
    """Checks that the current run's record agrees with that of the run begun in the folder.

    Args:
        folder: The folder.
        begun: The record in the folder.
        current: The current record.
        about_rows: What to do where a task has other rows.
        than: What the current record is of, for the message.
        advice: What to do where anything else differs.

    Raises:
        UserError: They differ; the message names the first difference.
    """
    for part in current:
        if part in begun:  # earlier versions recorded less
            what = _difference(part, begun[part], current[part], than)
            if what is not None:
                todo = about_rows if part == "rows" else advice
                raise UserError(f"{folder} was started with {what}: {todo}")


def _difference(part: str, begun: Any, current: Any, than: str) -> str | None:
    """What a part of a record has other than the current one; None for nothing."""
    if not (isinstance(begun, Mapping) and isinstance(current, Mapping)):
        begun, current = {part: begun}, {part: current}
    for name in dict.fromkeys([*current, *begun]):
        was, now = begun.get(name), current.get(name)
        added = part in ("rows", "head") and None in (was, now)
        if was == now or added or (part == "run" and name in MOVABLE):
            continue
        if part == "rows":
            return f'other rows of task "{name}"'
        if part == "all_tasks":
            return "another list of tasks"
        if part in ("model", "head"):
            return "another model"
        if part == "tokenizer":
            return "another tokenizer"
        return f"{name}={str(was)[:80]}, {than} {name}={str(now)[:80]}"
    return None


def load_finished(
    folder: Path, learner: Learner | None, model: Any, tasks: Sequence[str]
) -> list[dict[str, Any]]:
    """Loads the base and the adapters of a finished retraining; returns its history.

    Raises:
        UserError: The base has other weights than when it was written.
    """
    load_weights(model, folder / "base")
    bank: AdapterBank | None = None if learner is None else learner.bank
    if bank is not None and (folder / "adapters").is_dir():
        names = folder_names((task, 0) for task in tasks)
        for slot, key in enumerate(bank.keys):
            place = folder / "adapters" / names[key, 0]
            if not place.is_dir():  # as earlier versions named it
                place = place.with_name(readable_name(key))
            load_adapter(bank, slot, place, model)
    file = folder / METRICS_FILE
    with damage_named(file):
        lines = file.read_text(encoding="utf-8").splitlines()
    return [parse_json(line, file, dict[str, Any]) for line in lines]


def save_wave(result: Adapted, wave: Sequence[TaskDraw], folder: Path, group: ProcessGroup) -> None:
    """Writes the adapters of one wave, then adds its scores to this process's scores on disk.

    The result does not hold the adapters any more, but reads them where they were written.
    An adapter that takes the place of an earlier one of its task is its next version; the earlier
    one goes to the folder `versions`.
    """
    for task in (result.earlier[key] for key in wave if key in result.earlier):
        keep_version(folder, task)
    tensors = {key: result.tensors[key] for key in wave if key in result.tensors}
    models = {key: result.models[key] for key in wave if key in result.models}
    replace(result, tensors=tensors, models=models).save(folder)
    result.tensors |= {
        key: SavedTensors(folder.absolute() / result.folders[key]) for key in tensors
    }
    file = folder / (SCORES_FILE if group.size == 1 else SCORES_OF_RANK.format(group.rank))
    saved = {
        key: SavedTask(
            folder=result.folders[key],
            score=result.scores.get(key),
            num_rows=result.num_rows.get(key, 0),
            num_train=result.num_train.get(key),
            adapted=datetime.now(UTC).isoformat(timespec="seconds"),
            digest=result.digests.get(key[0]),
            version=_last_version(folder / VERSIONS / result.folders[key]) + 1,
        )
        for key in wave
    }
    write_scores(file, read_scores(file) | saved)


def keep_version(folder: Path, task: SavedTask) -> None:
    """Moves the adapter of a task to `versions/TASK/N`, unless that was done already."""
    place, target = folder / task.folder, folder / VERSIONS / task.folder / str(task.version)
    if place.is_dir() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        files = [path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_file()]
        record_files(target, [target / file for file in files])
        place.rename(target)


def _last_version(folder: Path) -> int:
    """The number of the newest of the versions in a folder; 0 without any."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def collect_scores(folder: Path) -> dict[TaskDraw, SavedTask]:
    """The finished tasks, merged into one file; a task whose folder is gone is not finished."""
    parts = sorted(folder.glob(SCORES_OF_RANK.format("*")))
    saved = read_scores(folder / SCORES_FILE)
    for part in parts:
        saved |= read_scores(part)
    if parts:
        write_scores(folder / SCORES_FILE, saved)
        for part in parts:
            part.unlink()
    return {key: task for key, task in saved.items() if (folder / task.folder).is_dir()}
