"""Atomic writes of files and folders."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from foretune.errors import ForetuneError, UserError
from foretune.manifest import REPLACED, UNFINISHED, all_files, foreign_files, record_files, root_of

# Names of files that several modules write or read; a name used by one module is defined there.
RUN_FILE = "run.json"  # method, run and digests of what a folder was started with, then the outcome
BASE_FILE = "foretune.json"  # beside a retrained base: its method, objective and fingerprint
BASIS_FILE = "foretune_basis/basis.safetensors"  # beside a base: the basis of its adapters
METRICS_FILE = "metrics.jsonl"  # the history of a training run
PROGRESS_FILE = "progress.jsonl"  # what a run said and how far it was, for `foretune watch`
COMPARISON_FILE = "comparison.json"
REPORT_FILE = "report.html"
SCORES_TABLE = "scores.csv"  # all scores of a comparison
CARD_FILE = "README.md"
LABELS_FILE = "labels.json"  # beside an adapter: the labels of its head
FUSED_FILE = "fused.json"  # in the folder of a fused model
FUSED_BASE = "base"  # folder in it: the model beneath experts and heads
FUSED = {FUSED_FILE, FUSED_BASE}  # what a folder holds that only `load_fused` reads
TRAINED_ON_FILE = "trained_on.json"  # beside an adapter: its rows' digest, how it was trained
SPARSE_FILE = "sparse_delta.safetensors"  # the changes that SaRA makes for a task
# Names that transformers and peft give.
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"  # which of several files has a tensor
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RECIPE = "config.yaml"
INPUTS = "inputs.json"  # digests of the model and the examples of a recipe's run
SCORES_FILE = "scores.json"  # in a folder of adapters: the finished tasks, with their folders
VERSIONS = "versions"  # in a folder of adapters: those that were replaced, by task and version
PIPELINE_FILE = "model_index.json"  # of diffusers
MODULE_FILE = "foretune_module.json"  # beside the weights of a module that is not Hugging Face's

FLUSHES = 16  # files that are flushed at the same time

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EBUSY),
    *(errno.ENXIO, errno.ENODEV, errno.EXDEV, errno.EOPNOTSUPP),
)
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # Windows' names, with any extension


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `final` when the block ends without an error.

    Raises:
        ForetuneError: The disk is full; the temporary folder is removed.
        UserError: `final` holds files that foretune did not write, or may not be written.
    """
    with whole_folders([final]) as (part,):
        yield part


@contextlib.contextmanager
def whole_folders(finals: Sequence[Path]) -> Iterator[list[Path]]:
    """Yields a temporary folder for each of many folders of one parent, as `whole_folder`.

    Their files are flushed to the disk together, which takes a small part of the time that it takes
    to flush one after the other.

    Raises:
        ForetuneError: The disk is full; the temporary folders are removed.
        UserError: One of `finals` holds files that foretune did not write, or may not be written.
    """
    temporaries = [final.with_name(UNFINISHED + final.name) for final in finals]
    with contextlib.ExitStack() as stack:
        if finals:
            stack.enter_context(disk_errors(finals[0] if len(finals) == 1 else finals[0].parent))
        for final, temporary in zip(finals, temporaries, strict=True):
            _check_ours(final)
            remove(temporary)
        try:
            for temporary in temporaries:
                temporary.mkdir(parents=True)
            yield temporaries
            files = [
                final / path.relative_to(temporary)
                for final, temporary in zip(finals, temporaries, strict=True)
                for path in all_files(temporary)
            ]
            if finals:
                record_files(finals[0], files)
            _put_in_place(dict(zip(temporaries, finals, strict=True)))
        except BaseException:
            for temporary in temporaries:
                remove(temporary)
            raise


def put_in_place(folder: Path, final: Path) -> None:
    """Renames a finished folder to `final`; what was there is removed afterwards.

    A kill in between leaves the old folder under its own name or, beside the new one's, under that
    of `replaced`.
    """
    _put_in_place({folder: final})


def _put_in_place(finals: Mapping[Path, Path]) -> None:
    """Renames finished folders to what they map to, as `put_in_place`."""
    _flush_all([path for folder in finals for path in folder.rglob("*")])
    for folder, final in finals.items():
        aside = replaced(final)
        remove(aside)
        if final.exists():
            final.rename(aside)
        try:
            folder.rename(final)
        except BaseException:
            if aside.exists():
                aside.rename(final)
            raise
    for parent in {final.parent for final in finals.values()}:
        _flush(parent)
    for final in finals.values():
        remove(replaced(final))


def replaced(final: Path) -> Path:
    """Where the earlier folder of this name is kept while a new one takes its place."""
    return final.with_name(REPLACED + final.name)


def remove(path: Path) -> None:
    """Removes a file or folder of ours, if there is one.

    Raises:
        UserError: It is a symbolic link.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which foretune does not remove: remove it")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically: it holds the old text or the new one, never a part of it.

    Raises:
        ForetuneError: The disk is full.
        UserError: `path` may not be written, or foretune did not write the file that is there.
    """
    temporary = path.with_name(UNFINISHED + path.name)
    with disk_errors(path):
        _check_ours(path)
        remove(temporary)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            record_files(path, [path])
            with temporary.open("x", encoding="utf-8") as file:
                file.write(text)
            _flush(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _check_ours(path: Path) -> None:
    """Checks that what is at `path` may be replaced: not a link, nor a file that is not listed.

    Raises:
        UserError: It may not.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which foretune does not replace: remove it")
    foreign = [] if not path.exists() or root_of(path) is None else foreign_files(path)
    if foreign:
        raise UserError(
            f"{path} is in the way: foretune did not write {', '.join(foreign[:3])}; move it"
        )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the errors of a full or read-only disk and of a bad path into one line.

    Raises:
        ForetuneError: The disk is full.
        UserError: `path` may not be written to.
        OSError: Any other failure, as it was.
    """
    full = (
        f"the disk is full: could not write {path}; free some space and run again with --resume, "
        "the last checkpoint is untouched"
    )
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ForetuneError(full) from error
        if error.errno in REFUSED:
            raise UserError(
                f"cannot write {str(path)[:200]}: {error.strerror}; choose another place"
            ) from error
        raise
    except Exception as error:
        # safetensors reports a failed write with an exception of its own.
        if "No space left" in str(error) or "File too large" in str(error):
            raise ForetuneError(full) from error
        raise


def check_file_name(what: str, name: str) -> None:
    """Checks that a name can be that of a folder, on any file system.

    Raises:
        UserError: It cannot; the message begins with `what`.
    """
    reason = None
    if not name or name != name.strip() or name.endswith("."):
        reason = "it is empty, or begins or ends with a space or a full stop"
    elif name.startswith(".") or DEVICES.fullmatch(name.casefold()):
        reason = "it begins with a full stop, or is a device of Windows"
    elif any(c in '/\\:*?"<>|' or unicodedata.category(c) in ("Cc", "Cs") for c in name):
        reason = 'it has a control character or one of / \\ : * ? " < > |'
    elif len(name.encode()) > 100:
        reason = f"it has {len(name.encode())} bytes, and 100 is the limit"
    if reason is not None:
        raise UserError(f"{what} {name[:50]!r} cannot be the name of a folder: {reason}")


def check_file_names(what: str, names: Iterable[str]) -> None:
    """Checks that names can be those of folders side by side, on any file system.

    Raises:
        UserError: One cannot, or two are the same where case or Unicode form do not count.
    """
    used: dict[str, str] = {}
    for name in names:
        check_file_name(what, name)
        key = same_on_disk(name)
        if key in used:
            raise UserError(
                f"{what} {name!r} and {used[key]!r} are one folder on some file systems"
            )
        used[key] = name


def same_on_disk(name: str) -> str:
    r"""A form of a name that is equal for names which some file systems do not tell apart.

    >>> same_on_disk("Caf\u00e9") == same_on_disk("cafe\u0301")
    True
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _flush_all(paths: Sequence[Path]) -> None:
    """Flushes files and folders at the same time: the disk then writes many of them at once."""
    if len(paths) <= FLUSHES:
        for path in paths:
            _flush(path)
        return
    with ThreadPoolExecutor(FLUSHES) as threads:
        for _ in threads.map(_flush, paths):  # raises what one of them raises
            pass


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
