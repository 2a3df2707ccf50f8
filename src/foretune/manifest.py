"""The file `.foretune` of an output folder: which files foretune wrote there, and who writes now.

Its first line names the format and the kind of result, the others are one JSON value each: a string
is a file that foretune writes below the folder, or a folder that is all its own if it ends in a
slash; an object is the process that has claimed it. Lines are only appended, so that a kill can
tear the last one at most, which is then skipped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None  # type: ignore[assignment]

MARKER_FILE = ".foretune"
FORMAT = "foretune-folder-1"
# Folders and files under these names are ours: not whole yet, or just replaced by a new one.
UNFINISHED, REPLACED = ".unfinished-", ".replaced-"
# A folder inside that of a result: one of several attempts, the best of which becomes the result.
TRIAL = ".trial-"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EIO)


@dataclass
class Manifest:
    """The content of a marker file.

    Args:
        kind: What wrote the folder, such as "run" or "fuse".
        files: Paths of its files, relative to the folder, with slashes. One that ends in a slash
            stands for all files below it.
        owner: Process and host that claimed the folder last.
    """

    kind: str
    files: set[str] = field(default_factory=set)
    owner: dict[str, Any] = field(default_factory=dict)


_read: dict[Path, tuple[tuple[int, ...], Manifest]] = {}  # by marker file, with what it was


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None without one, as in a folder of an earlier foretune."""
    marker = folder / MARKER_FILE
    try:
        state = _state(marker)
        if marker in _read and _read[marker][0] == state:
            return _read[marker][1]
        header, *lines = marker.read_text("utf-8").splitlines()
        first = json.loads(header)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(first, dict) or first.get("format") != FORMAT:
        return None
    manifest = Manifest(str(first.get("kind")))
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            _add(manifest, json.loads(line))
    _read[marker] = (state, manifest)
    return manifest


def append(folder: Path, values: Sequence[Any]) -> None:
    """Adds lines to the marker file of a folder."""
    marker, manifest = folder / MARKER_FILE, read_manifest(folder)
    text = "".join(f"\n{json.dumps(value)}" for value in values)
    size = marker.stat().st_size + len(text)  # JSON is ASCII
    with marker.open("a", encoding="utf-8") as file:
        file.write(text)
    if manifest is not None and marker.stat().st_size == size:
        for value in values:
            _add(manifest, value)
        _read[marker] = (_state(marker), manifest)


def _add(manifest: Manifest, value: Any) -> None:
    if isinstance(value, str):
        manifest.files.add(value)
    elif isinstance(value, dict):
        manifest.owner = value


def _state(marker: Path) -> tuple[int, ...]:
    stat = marker.lstat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def lock(descriptor: int, *, shared: bool = False) -> str | None:
    """Locks a marker file until it is closed; returns why not where files cannot be locked.

    Args:
        descriptor: The open file.
        shared: Allow other shared locks.

    Raises:
        OSError: Another process holds a lock.
    """
    if fcntl is None:
        return None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return error.strerror
        raise
    return None


def is_claimed(folder: Path) -> bool:
    """Whether a process holds the lock of a folder: this one, or another on this machine."""
    try:
        with (folder / MARKER_FILE).open("rb") as marker:
            lock(marker.fileno(), shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def root_of(path: Path) -> Path | None:
    """The nearest folder above `path` that lists its files; None outside of such a folder."""
    for folder in path.absolute().parents:
        if read_manifest(folder) is not None:
            return folder
    return None


def record_files(path: Path, files: Iterable[Path]) -> None:
    """Lists files, which are about to be written at `path` or below, in the manifest above it."""
    root = root_of(path)
    manifest = None if root is None else read_manifest(root)
    if root is None or manifest is None:
        return
    names = [file.absolute().relative_to(root).as_posix() for file in files]
    new = [name for name in names if name not in manifest.files]
    if new:
        append(root, new)


def record_folder(path: Path) -> None:
    """Lists a folder that others write to as foretune's, in the manifest above it."""
    root = root_of(path)
    if root is not None:
        name = f"{path.absolute().relative_to(root).as_posix()}/"
        manifest = read_manifest(root)
        if manifest is not None and name not in manifest.files:
            append(root, [name])


def foreign_files(path: Path) -> list[str]:
    """The files and links at `path` or below it that no manifest lists, relative to its folder."""
    start = path.absolute()
    root = start if read_manifest(start) is not None else root_of(start)
    manifest = None if root is None else read_manifest(root)
    listed = {MARKER_FILE} if manifest is None else {MARKER_FILE, *manifest.files}
    folders = tuple(name for name in listed if name.endswith("/"))
    foreign = []
    for file in all_files(start) if start.is_dir() else [start]:
        name = file.relative_to(root or (start if start.is_dir() else start.parent)).as_posix()
        is_listed = name in listed or name.startswith(folders) or _is_ours(name)
        if file.is_symlink() or not is_listed:
            foreign.append(file.relative_to(start).as_posix() if file != start else file.name)
    return sorted(foreign)


def all_files(folder: Path) -> Iterator[Path]:
    """The files of a folder at any depth, and links, which are not followed."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        yield from (Path(place, name) for name in (*files, *links))


def final_path(path: Path | str) -> str:
    """Where a file or folder will lie when the folder that it is in has its name.

    >>> final_path("./runs/.unfinished-a/base"), final_path("./runs/a/.trial-2/base")
    ('./runs/a/base', './runs/a/base')
    """
    without_trial = re.sub(rf"([/\\\\]){re.escape(TRIAL)}[^/\\\\]*(?=[/\\\\]|$)", "", str(path))
    return re.sub(rf"(^|[/\\\\]){re.escape(UNFINISHED)}", r"\1", without_trial)


def _is_ours(name: str) -> bool:
    return any(part.startswith((UNFINISHED, REPLACED, TRIAL)) for part in name.split("/"))
