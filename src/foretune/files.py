"""Atomic writes of files and folders, and the checks of where results may be written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from foretune.errors import ForetuneError, UserError

# Names of files that several modules write or read; a name used by one module is defined there.
RUN_FILE = "run.json"  # method, run and digests of what a folder was started with, then the outcome
BASE_FILE = "foretune.json"  # beside a retrained base: its method, objective and fingerprint
METRICS_FILE = "metrics.jsonl"  # the history of a training run
COMPARISON_FILE = "comparison.json"
REPORT_FILE = "report.html"
CARD_FILE = "README.md"
LABELS_FILE = "labels.json"  # beside an adapter: the labels of its head
# Names that transformers and peft give.
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
UNFINISHED = ".unfinished-"
RECIPE = "config.yaml"
INPUTS = "inputs.json"  # digests of the model and the examples of a recipe's run
MODULE_FILE = "foretune_module.json"  # beside the weights of a module that is not Hugging Face's
MARKER_FILE = ".foretune"  # in every folder that a run has claimed


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `final` when the block ends without an error.

    Raises:
        ForetuneError: The disk is full; the temporary folder is removed.
    """
    temporary = final.with_name(UNFINISHED + final.name)
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(final):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                _flush(path)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _flush(final.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file atomically: it holds the old text or the new one, never a part of it."""
    temporary = path.with_name(UNFINISHED + path.name)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            _flush(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the errors of a full or read-only disk into one line that says what to do.

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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ForetuneError(full) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another --out"
            ) from error
        raise
    except Exception as error:
        # safetensors reports a failed write with an exception of its own.
        if "No space left" in str(error):
            raise ForetuneError(full) from error
        raise


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Checks that a run may claim `folder`; does not touch it.

    Returns:
        Whether the folder is in use: it holds more than what a run writes before its first result.

    Raises:
        UserError: The folder is in use and neither `resume` nor `overwrite` is set, or both are
            set, or `overwrite` would delete a folder that foretune has not claimed.
    """
    if resume and overwrite:
        raise UserError(
            "--resume keeps what is in the folder and --overwrite removes it: choose one"
        )
    _check_not_a_file(folder)
    # A run that failed before its first result leaves only these: nothing would be lost.
    early = (RECIPE, INPUTS, MARKER_FILE)
    used = folder.is_dir() and any(path.name not in early for path in folder.iterdir())
    if used and not (resume or overwrite):
        raise UserError(
            f"{folder} is not empty: use --resume to continue its run, --overwrite to replace it, "
            "or another folder"
        )
    if used and overwrite:
        current = Path.cwd().resolve()
        if folder.resolve() in (current, *current.parents):
            raise UserError(f"{folder} holds the current folder: --overwrite does not remove it")
        if not (folder / MARKER_FILE).is_file():
            names = sorted(path.name for path in folder.iterdir())
            raise UserError(
                f"{folder} was not made by a foretune run (it holds {', '.join(names[:3])}, "
                f"… and no {MARKER_FILE}): --overwrite does not remove it; choose another folder"
            )
    return used


def claim_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Creates `folder` for a run, emptied if `overwrite` is set, with the marker file in it.

    Returns:
        Whether it holds a run to be continued.

    Raises:
        UserError: As `check_folder`.
    """
    used = check_folder(folder, resume=resume, overwrite=overwrite)
    with disk_errors(folder):
        if used and overwrite:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not used or overwrite:
            (folder / MARKER_FILE).touch()
    return used and resume


def claim_model_folder(folder: Path, marker_file: str, *, overwrite: bool) -> None:
    """Checks that a model, or a store, may be written as `folder`; does not touch it.

    Args:
        folder: The output folder.
        marker_file: Name of the file that every folder of this kind holds; `overwrite` replaces
            only a folder that holds it.
        overwrite: Whether the user asked to replace what is there.

    Raises:
        UserError: It is a file, or a folder that is not empty and may not be replaced.
    """
    _check_not_a_file(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{folder} is not empty: use --overwrite to replace it (if it holds {marker_file}), "
            "or another folder"
        )
    if not (folder / marker_file).is_file():
        raise UserError(
            f"{folder} holds no {marker_file}, so foretune did not write it: --overwrite does not "
            "remove it; choose another folder"
        )


def claim_file(file: Path, *, overwrite: bool) -> None:
    """Checks that a result may be written as `file`; does not touch it.

    Raises:
        UserError: It is a folder, or a file that may not be replaced.
    """
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists: use --overwrite to replace it, or another name")


def _check_not_a_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
