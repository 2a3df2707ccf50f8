"""Files and folders that are written whole or not at all, and folders that may be written to."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from foretune.errors import ForetuneError, UserError

# Names of files that several modules write or read; a name of one module stands in that module.
RUN_FILE = "run.json"  # method, run and digests of what a folder was begun with, then the outcome
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
INPUTS = "inputs.json"  # digests of the model and the rows of a recipe's run
MODULE_FILE = "foretune_module.json"  # beside the weights of a module that is not Hugging Face's
MARK = ".foretune"  # in every folder that a run has claimed


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block has ended well, or not at all.

    Raises:
        ForetuneError: The disk is full; what was written so far is removed.
    """
    part = final.with_name(UNFINISHED + final.name)
    shutil.rmtree(part, ignore_errors=True)
    with disk_errors(final):
        try:
            part.mkdir(parents=True)
            yield part
            for path in part.rglob("*"):
                _flush(path)
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            _flush(final.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that it is either the old one or the new one, never half of it."""
    part = path.with_name(UNFINISHED + path.name)
    with disk_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            _flush(part)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the errors of a full or closed disk into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ForetuneError(
                f"the disk is full: could not write {path}; free some space and run again with "
                "--resume, the last checkpoint is untouched"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another --out"
            ) from error
        raise
    except Exception as error:
        # safetensors reports a failed write with an exception of its own.
        if "No space left" in str(error):
            raise ForetuneError(
                f"the disk is full: could not write {path}; free some space and run again with "
                "--resume, the last checkpoint is untouched"
            ) from error
        raise


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Makes sure that `folder` may be claimed; nothing is done to it yet.

    Returns:
        Whether something is in it.

    Raises:
        UserError: Something is in it and neither `resume` nor `overwrite` was asked for, or both
            were, or `overwrite` would delete what no run of foretune's has claimed.
    """
    if resume and overwrite:
        raise UserError("--resume keeps what is in the folder, --overwrite removes it: choose one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder")
    # These alone were left by a run that failed before its first result: nothing is lost.
    early = (RECIPE, INPUTS, MARK)
    used = folder.is_dir() and any(path.name not in early for path in folder.iterdir())
    if used and not (resume or overwrite):
        raise UserError(
            f"{folder} is not empty: --resume continues what was begun there, --overwrite removes "
            "it, another folder leaves it alone"
        )
    if used and overwrite:
        here = Path.cwd().resolve()
        if folder.resolve() in (here, *here.parents):
            raise UserError(f"{folder} holds the current folder: --overwrite does not remove it")
        if not (folder / MARK).is_file():
            names = sorted(path.name for path in folder.iterdir())
            raise UserError(
                f"{folder} was not made by a run of foretune's (it holds {', '.join(names[:3])}, "
                f"… and no {MARK}): --overwrite does not remove it; choose another folder"
            )
    return used


def claim_folder(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Makes sure that `folder` exists and may be written to.

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
            (folder / MARK).touch()
    return used and resume


def claim_model_folder(folder: Path, mark: str, *, overwrite: bool) -> None:
    """Makes sure that a model may be written as `folder`, which nothing is done to yet.

    Args:
        folder: Where.
        mark: The file by which a folder of the same kind is known, which `overwrite` may replace.
        overwrite: Whether the user said so.

    Raises:
        UserError: A file is there, or a folder with something in it that may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"{folder} is not empty: --overwrite replaces it if {mark} is in it, another folder "
            "leaves it alone"
        )
    if not (folder / mark).is_file():
        raise UserError(
            f"{folder} holds no {mark}, so foretune did not write it: --overwrite does not remove "
            "it; choose another folder"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
