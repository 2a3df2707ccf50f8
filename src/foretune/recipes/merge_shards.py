"""`foretune merge-shards`: the folders that `adapt --shard` wrote become one folder of adapters."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foretune.claims import is_used, output_folder
from foretune.errors import UserError
from foretune.files import RUN_FILE, SCORES_FILE, VERSIONS, disk_errors, write_whole
from foretune.formats import RUN
from foretune.manifest import MARKER_FILE, all_files, foreign_files, is_claimed
from foretune.recipes.on_folders import holds_adapters
from foretune.tasks.shard import Shard
from foretune.training.outcome import folder_names
from foretune.training.resume import (
    check_same,
    read_record,
)
from foretune.training.scores_file import SavedTask, TaskDraw, read_scores, write_scores

RECORDS = (MARKER_FILE, RUN_FILE, SCORES_FILE)  # of a folder of adapters


@dataclass(frozen=True)
class _Part:
    """A finished shard.

    Args:
        folder: Its folder.
        shard: Which one it is.
        record: The content of its run.json.
        saved: Its tasks.
    """

    folder: Path
    shard: Shard
    record: dict[str, Any]
    saved: dict[TaskDraw, SavedTask]


def merge_shards(out: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Makes one folder of adapters, as `adapt` writes it, of all shards of an adaptation.

    Files are hard links to those of the shards, or copies where the file system has no links. The
    folder appears whole. Where `out` holds adapters of the same base, the new tasks join them.

    Args:
        out: Output folder.
        folders: The folders of all shards, in any order; they stay as they are.

    Returns:
        The number of shards, which tasks were added and which were there already, the scores of
        all tasks of the shards, and their mean.

    Raises:
        UserError: A shard is missing, is not finished or was adapted in another way than the
            others, a task is in two of them, or `out` may not be written.
    """
    parts = _checked(sorted(map(_read, folders), key=lambda part: part.shard.number))
    _check_out(out, folders)
    new = {key: part for part in parts for key in part.saved}
    record: dict[str, Any] = {**parts[0].record, "shard": None}
    record.pop("all_tasks")
    rows = {task: digest for part in parts for task, digest in part.record["rows"].items()}
    with output_folder(out, "adapt", overwrite=True, at_once=True, reads=folders) as folder:
        saved: dict[TaskDraw, SavedTask] = {}
        with disk_errors(out):
            if holds_adapters(out):
                record, saved = _joined(out, {**record, "rows": rows})
                _link(out, folder)
            there = [key for key in new if key in saved]
            added = sorted(new.keys() - saved.keys())
            names = folder_names(added, {key: task.folder for key, task in saved.items()})
            for key in added:
                source, task = new[key].folder, new[key].saved[key]
                for place in (Path(), Path(VERSIONS)):
                    _link(source / place / task.folder, folder / place / names[key])
                saved[key] = SavedTask(**{**vars(task), "folder": names[key]})
            record["rows"] = {**record["rows"], **rows}
            write_scores(folder / SCORES_FILE, saved)
            write_whole(folder / RUN_FILE, json.dumps(record, indent=1))
    scores = {key[0]: score for key in sorted(new) if (score := saved[key].score) is not None}
    return {
        "out": str(out),
        "shards": len(parts),
        "added": [task for task, _ in added],
        "there": sorted(task for task, _ in there),
        "scores": scores,
        "mean": sum(scores.values()) / len(scores) if scores else None,
    }


def _read(folder: Path) -> _Part:
    """A shard from its folder.

    Raises:
        UserError: It is not the folder of a shard, or its job has not finished.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    record = read_record(folder / RUN_FILE, RUN) if holds_adapters(folder) else {}
    if not isinstance(record.get("shard"), str) or "all_tasks" not in record:
        raise UserError(f"{folder} is not a shard, as `foretune adapt --shard K/N` writes them")
    if is_claimed(folder):
        raise UserError(f"{folder} is in use by another process: wait for it")
    return _Part(folder, Shard.parse(record["shard"]), record, _finished(folder, record))


def _finished(folder: Path, record: dict[str, Any]) -> dict[TaskDraw, SavedTask]:
    """The tasks in a folder of adapters.

    Raises:
        UserError: A task that was begun there is missing.
    """
    listed, rows = read_scores(folder / SCORES_FILE), record.get("rows", {})
    saved = {key: task for key, task in listed.items() if (folder / task.folder).is_dir()}
    finished = {
        task for (task, _), entry in saved.items() if entry.digest in (None, rows.get(task))
    }
    missing = sorted(rows.keys() - finished)
    if missing:
        raise UserError(
            f"{folder} is not finished, {len(missing)} of {len(rows)} tasks are missing "
            f"({missing[0]}{', …' if len(missing) > 1 else ''}): run its `foretune adapt` again"
        )
    return saved


def _checked(parts: Sequence[_Part]) -> Sequence[_Part]:
    """The parts, once they are all shards of the same adaptation.

    Raises:
        UserError: They are not.
    """
    first, by_number, by_task = parts[0], dict[int, Path](), dict[str, Path]()
    for part in parts:
        if part.shard.of != first.shard.of:
            raise UserError(
                f"{part.folder} is shard {part.shard}, {first.folder} is {first.shard}: merge the "
                "shards of one adaptation"
            )
        if part.shard.number in by_number:
            both = f"{by_number[part.shard.number]} and {part.folder}"
            raise UserError(f"{both} are both shard {part.shard}: name only one of them")
        by_number[part.shard.number] = part.folder
        same = {**part.record, "shard": None}, {**first.record, "shard": None, "rows": {}}
        advice = "merge the shards of one adaptation"
        check_same(part.folder, *same, than=f"{first.folder} with", advice=advice)
        for task, _ in part.saved:
            if by_task.setdefault(task, part.folder) != part.folder:
                raise UserError(f'task "{task}" is in {by_task[task]} and in {part.folder}')
    missing = [str(k) for k in range(1, first.shard.of + 1) if k not in by_number]
    if missing:
        raise UserError(
            f"of {first.shard.of} shards these are missing: {', '.join(missing[:10])}"
            f"{', …' if len(missing) > 10 else ''}; name the folders of all"
        )
    return parts


def _check_out(out: Path, folders: Sequence[Path]) -> None:
    """Checks that a folder may be made, or that tasks may be added to it.

    Raises:
        UserError: It is a shard, or holds something else than adapters.
    """
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"{out} is one of the shards: name another folder first, for all of them")
    if is_used(out) and (not holds_adapters(out) or foreign_files(out)):
        shown = ", ".join(foreign_files(out)[:3])
        raise UserError(
            f"{out} holds files that `foretune adapt` did not write"
            f"{f' ({shown})' if shown else ''}: choose another folder"
        )


def _joined(out: Path, record: dict[str, Any]) -> tuple[dict[str, Any], dict[TaskDraw, SavedTask]]:
    """The record of a folder that new tasks join, and the tasks that it has.

    Raises:
        UserError: They were adapted in another way, or not all are finished.
    """
    earlier = read_record(out / RUN_FILE, RUN)
    than, advice = "the shards with", "merge into another folder"
    check_same(out, earlier, record, advice, than=than, advice=advice)
    return earlier, _finished(out, earlier)


def _link(source: Path, target: Path) -> None:
    """Hard links to the files below a folder, or copies; not to its own records."""
    for file in all_files(source):
        name = file.relative_to(source)
        if name.name in RECORDS and source == file.parent:
            continue
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, place)
        except OSError:  # another file system, or one without links
            shutil.copyfile(file, place)
