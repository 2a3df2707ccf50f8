"""Where results may be written: the one rule for `--out`, `--resume` and `--overwrite`.

A folder is claimed by one process, which holds a lock on its marker file; the system releases the
lock when the process ends, however it ends. `--overwrite` replaces only what foretune wrote, all of
which the marker file lists, and nothing that the command reads. The new result is written beside
the old one and takes its place when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from foretune.errors import UserError
from foretune.files import (
    INPUTS,
    PROGRESS_FILE,
    RECIPE,
    RUN_FILE,
    disk_errors,
    put_in_place,
    remove,
    replaced,
)
from foretune.manifest import (
    FORMAT,
    MARKER_FILE,
    UNFINISHED,
    all_files,
    append,
    foreign_files,
    lock,
    read_manifest,
    root_of,
)

# What a run writes before its first result: a folder of these holds nothing that could be lost.
EARLY = (RECIPE, INPUTS, RUN_FILE, MARKER_FILE, PROGRESS_FILE)
MARKS = (b"foretune", b'id="figure-title"')  # in every page, recipe and figure of ours
_held: set[Path] = set()  # the folders that this process has claimed


@contextlib.contextmanager
def output_folder(
    out: Path,
    kind: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    at_once: bool = False,
    reads: Sequence[Path | str] = (),
) -> Iterator[Path]:
    """Claims an output folder, and yields the folder to write to until the block ends.

    That is `out` itself, or a folder beside it that takes the place of `out` when the block ends
    without an error. An error before the first result leaves nothing behind. Inside a folder that
    this process has claimed, nothing is checked.

    Args:
        out: The output folder.
        kind: What it will hold, such as "run" or "fuse"; only the same kind may be replaced.
        resume: Continue what is in `out`, or what an interrupted overwriting left beside it.
        overwrite: Replace an earlier result.
        at_once: The result appears whole at the end, and cannot be resumed.
        reads: Files and folders that the command reads.

    Raises:
        UserError: `out` may not be written, continued or replaced.
    """
    out = Path(out)
    with disk_errors(out):
        real = _check_path(out)
        nested = real in _held or any(folder in _held for folder in real.parents)
        if nested:
            out.mkdir(parents=True, exist_ok=True)
    if nested:
        yield out
        return
    if resume and overwrite:
        raise UserError(
            "--resume keeps what is in the folder and --overwrite removes it: choose one"
        )
    target = out.resolve() if at_once or out.name in ("", "..") else out
    with contextlib.ExitStack() as locks:
        with disk_errors(out):
            beside = place_beside(target)
            _recover(target)
            # What another process is working on is locked before it is looked at.
            for place in (beside, target):
                if (place / MARKER_FILE).is_file():
                    locks.enter_context(_lock(place, out))
            used = is_used(out)
            interrupted = _is_interrupted(beside, kind, resume=resume, at_once=at_once)
            if used or (interrupted and not resume):
                _check_used(
                    out,
                    kind,
                    beside if interrupted else None,
                    reads,
                    resume=resume,
                    overwrite=overwrite,
                    at_once=at_once,
                )
            in_place = not (at_once or interrupted or (used and not resume))
            folder = target if in_place else beside
            continued = resume and (used or interrupted)
            created = _missing(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if folder.resolve() not in _held:
                locks.enter_context(_lock(folder, out))
                if is_used(out) != used:
                    raise UserError(f"another process has just written {out}: try again")
        with _kept_or_removed(folder, created, at_once=at_once, continued=continued):
            with disk_errors(out):
                _begin(folder, kind, continued=continued)
            yield folder
        if folder != target:
            with disk_errors(out):
                _check_unchanged(target, folder)
                present = {path.relative_to(folder).as_posix() for path in all_files(folder)}
                append(folder, sorted(present - {MARKER_FILE} - _files_of(folder)))
                put_in_place(folder, target)


def is_used(folder: Path) -> bool:
    """Whether a folder holds a result, or anything that foretune did not write."""
    if not folder.is_dir() or not any(path.name != MARKER_FILE for path in folder.iterdir()):
        return False
    if read_manifest(folder) is None:  # the user's, an earlier foretune's, or a part of a result
        return True
    return bool(foreign_files(folder)) or _holds_results(folder)


def claim_file(
    file: Path,
    *,
    overwrite: bool,
    reads: Sequence[Path | str] = (),
    marks: Sequence[bytes] = MARKS,
) -> None:
    """Checks that a result may be written as `file`; does not touch it.

    Args:
        file: The output file.
        overwrite: Whether the user asked to replace what is there.
        reads: Files and folders that the command reads.
        marks: A file that holds one of these was made by foretune.

    Raises:
        UserError: It is a folder or a link, or a file that may not be replaced.
    """
    with disk_errors(file):
        _check_name(file)
        if file.is_symlink():
            raise UserError(f"{file} is a symbolic link: name the file itself")
        if file.is_dir():
            raise UserError(f"{file} is a folder; name a file")
        if not file.exists():
            return
        if not overwrite:
            raise UserError(f"{file} exists: use --overwrite to replace it, or another name")
        check_not_read(file, reads)
        if not file.is_file() or not any(mark in file.read_bytes() for mark in marks):
            raise UserError(
                f"{file} was not made by foretune: --overwrite does not replace it; choose another "
                "name"
            )


def check_not_read(out: Path, reads: Sequence[Path | str]) -> None:
    """Checks that replacing `out` removes nothing that the command reads.

    Raises:
        UserError: An input is `out`, lies inside it or around it, or links to it.
    """
    real = out.resolve()
    for read in reads:
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            path = Path(read).expanduser()
            if not path.exists():
                continue  # the name of a model or a data set of the hub
            sources = [path, *(file for file in all_files(path) if file.is_symlink())]
            if any(_overlap(real, source.resolve()) for source in sources):
                raise UserError(
                    f"--overwrite would replace {read}, which the command reads: choose another "
                    "--out"
                )


def held() -> bool:
    """Whether this process has claimed a folder."""
    return bool(_held)


def _check_path(out: Path) -> Path:
    """The folder that `out` names, without links; the folder need not exist.

    Raises:
        UserError: It is a link to nothing, a link in a circle, or no folder.
        OSError: The path cannot be read for another reason.
    """
    _check_name(out)
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a symbolic link to nothing: remove it, or choose another --out")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out needs a folder")
    try:
        return out.resolve()
    except RuntimeError:  # a link that leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None


def _check_name(path: Path) -> None:
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} is not a path: it holds a null character")
    with contextlib.suppress(FileNotFoundError):
        path.lstat()  # unlike `exists`, it does not hide a name that is too long


def place_beside(target: Path) -> Path:
    """Where the new result is written until it takes the place of `target`.

    Raises:
        UserError: There is no such place, or a link is there.
    """
    beside = target.with_name(UNFINISHED + target.name) if target.name else target
    if beside.is_symlink() or beside == target:
        raise UserError(f"cannot write beside {target}: choose another --out")
    return beside


def _recover(target: Path) -> None:
    """Ends a replacement that a kill interrupted: the old result gets its name back, or goes."""
    aside = replaced(target)
    if (aside / MARKER_FILE).is_file() and not aside.is_symlink():
        with _lock(aside, target):
            if target.exists():
                remove(aside)
            else:
                aside.rename(target)


def _is_interrupted(beside: Path, kind: str, *, resume: bool, at_once: bool) -> bool:
    """Whether an interrupted overwriting left what is to be continued, or results.

    Before its first result there is nothing to lose, but `--resume` means it, not the older result.
    """
    manifest = read_manifest(beside)
    if manifest is None or not (resume or _holds_results(beside)):
        return False
    return not at_once or manifest.kind != kind


def _files_of(folder: Path) -> set[str]:
    manifest = read_manifest(folder)
    return set() if manifest is None else manifest.files


def _check_used(
    out: Path,
    kind: str,
    interrupted: Path | None,
    reads: Sequence[Path | str],
    *,
    resume: bool,
    overwrite: bool,
    at_once: bool,
) -> None:
    """Checks that a folder that is in use may be continued or replaced, as the user asked.

    Raises:
        UserError: It may not, or the user has not asked.
    """
    root = root_of(out)
    if root is not None and read_manifest(out) is None and not foreign_files(out):
        raise UserError(f"{out} is a part of the result in {root}: choose another folder")
    if not (resume or overwrite):
        place = out if interrupted is None else interrupted
        continuing = "" if at_once else "--resume to continue its run, "
        raise UserError(
            f"{place} is not empty: use {continuing}--overwrite to replace it, or another folder"
        )
    for place in (out, *([] if interrupted is None else [interrupted])):
        manifest = read_manifest(place)
        if manifest is not None and manifest.kind != kind:
            raise UserError(
                f"{place} holds the result of another command ({manifest.kind}): choose another "
                "folder"
            )
    if resume:
        if interrupted is None and not _is_a_run(out):
            raise UserError(f"{out} holds no run to resume: choose another folder")
        return
    if out.is_symlink():
        raise UserError(
            f"{out} is a symbolic link: --overwrite does not remove what it links to; name the "
            "folder itself"
        )
    current = Path.cwd().resolve()
    if out.resolve() in (current, *current.parents):
        raise UserError(f"{out} holds the current folder: --overwrite does not remove it")
    check_not_read(out, reads)
    _check_foreign(out)


def _check_foreign(out: Path) -> None:
    foreign = foreign_files(out) if out.is_dir() else []
    if foreign:
        shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise UserError(
            f"{out} holds files that foretune did not write, or that an earlier version did not "
            f"list ({shown}): --overwrite does not remove them; move them, or choose another folder"
        )


def _check_unchanged(out: Path, folder: Path) -> None:
    """Checks that nothing was added to the folder that is about to be replaced.

    Raises:
        UserError: Something was.
    """
    try:
        _check_foreign(out)
    except UserError as error:
        raise UserError(f"{error}. The new result is in {folder}") from None


def _holds_results(folder: Path) -> bool:
    """Whether foretune wrote more into the folder than the records of what begins there."""
    return read_manifest(folder) is not None and any(
        path.name not in EARLY for path in all_files(folder)
    )


def _is_a_run(folder: Path) -> bool:
    # Earlier versions left the marker file empty.
    return any((folder / name).is_file() for name in (MARKER_FILE, RUN_FILE, RECIPE))


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, from below."""
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    return missing


def _begin(folder: Path, kind: str, *, continued: bool) -> None:
    """Empties a folder of what an earlier attempt left, and starts its list of files."""
    marker = folder / MARKER_FILE
    if not continued:
        for path in folder.iterdir():
            if path != marker:
                remove(path)
        marker.write_text(json.dumps({"format": FORMAT, "kind": kind}), encoding="utf-8")
    append(folder, [{"pid": os.getpid(), "host": platform.node()}])


@contextlib.contextmanager
def _kept_or_removed(
    folder: Path, created: list[Path], *, at_once: bool, continued: bool
) -> Iterator[None]:
    """Removes a new folder again if the block ends with an error before the first result."""
    try:
        yield
    except BaseException:
        _held.discard(folder.resolve())  # what follows is not to be interrupted
        if not continued and (at_once or not _holds_results(folder)):
            with contextlib.suppress(OSError):
                for path in sorted(folder.iterdir(), key=lambda path: path.name == MARKER_FILE):
                    if at_once or not foreign_files(path):
                        remove(path)
                for path in created:
                    path.rmdir()
        raise


@contextlib.contextmanager
def _lock(folder: Path, out: Path) -> Iterator[None]:
    """Holds the lock of a folder's marker file.

    Raises:
        UserError: Another process holds it.
    """
    real = folder.resolve()
    with disk_errors(out):
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(folder / MARKER_FILE, flags, 0o666)
    try:
        try:
            failure = lock(descriptor)
        except OSError:
            raise UserError(_owner(folder, out)) from None
        if failure is not None:
            warnings.warn(
                f"{out} cannot be locked ({failure}): make sure that no other process writes to it",
                stacklevel=2,
            )
        _check_still_there(descriptor, folder, out)
        _held.add(real)
        yield
    finally:
        _held.discard(real)
        os.close(descriptor)


def _check_still_there(descriptor: int, folder: Path, out: Path) -> None:
    """Checks that the marker file was not removed between opening and locking it.

    Raises:
        UserError: It was.
    """
    marker = folder / MARKER_FILE
    if not marker.exists() or marker.stat().st_ino != os.fstat(descriptor).st_ino:
        raise UserError(f"another process has just used {out}: try again")


def _owner(folder: Path, out: Path) -> str:
    manifest = read_manifest(folder)
    owner = {} if manifest is None else manifest.owner
    return (
        f"{out} is in use by process {owner.get('pid', 'unknown')} on "
        f"{owner.get('host', 'an unknown host')}: wait for it, or choose another folder"
    )


def _overlap(first: Path, second: Path) -> bool:
    return first == second or first in second.parents or second in first.parents
