"""Checkpoints: written whole or not at all, the newest and the best are kept."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretune.errors import ForetuneError, UserError

NAME = re.compile(r"checkpoint-(\d+)")
PREFIX_OF_UNFINISHED = ".unfinished-"


@dataclass
class CheckpointStore:
    """Keeps the newest checkpoint and the best one, on disk or, without a folder, in memory.

    A checkpoint is written under another name, flushed to the disk and then renamed, so a folder
    named checkpoint-N is complete whatever happened while it was written.

    Args:
        folder: Where; None for memory, where only the best is kept and nothing can be resumed.
    """

    folder: Path | None
    _best: dict[str, Tensor] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Keeps this state; `meta["best_step"] == step` says that it is the best so far."""
        is_best = meta.get("best_step") == step
        if self.folder is None:
            if is_best:
                self._best = {k: v.detach().cpu().clone() for k, v in tensors.items()}
            return
        final = self.folder / f"checkpoint-{step}"
        with whole_folder(final) as part:
            contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            save_file(contiguous, part / "state.safetensors")
            (part / "state.json").write_text(json.dumps({"step": step, **meta}, indent=1))
        for other, path in self._found():
            if other not in (step, meta.get("best_step")):
                shutil.rmtree(path)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the meta data of the newest checkpoint, or None."""
        found = self._found()
        return None if not found else self._load(found[-1][1])

    def best(self, step: int) -> dict[str, Tensor] | None:
        """The tensors of the best checkpoint."""
        if self.folder is None:
            return self._best
        return self._load(self.folder / f"checkpoint-{step}")[0]

    def clear(self) -> None:
        """Removes all checkpoints, finished or not."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                if NAME.fullmatch(path.name):
                    shutil.rmtree(path)
                elif path.name.startswith(PREFIX_OF_UNFINISHED):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _found(self) -> list[tuple[int, Path]]:
        if self.folder is None or not self.folder.is_dir():
            return []
        matches = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(m.group(1)), path) for m, path in matches if m)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            meta = json.loads((path / "state.json").read_text())
            return load_file(path / "state.safetensors"), meta
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} is no readable checkpoint ({error}); remove that folder to continue from "
                "an older one, or start again with --overwrite"
            ) from error


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block has ended well, or not at all.

    Raises:
        ForetuneError: The disk is full; what was written so far is removed.
    """
    part = final.with_name(PREFIX_OF_UNFINISHED + final.name)
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
    part = path.with_name(PREFIX_OF_UNFINISHED + path.name)
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
            raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
        raise
    except Exception as error:
        # safetensors reports a failed write with an exception of its own.
        if "No space left" in str(error):
            raise ForetuneError(
                f"the disk is full: could not write {path}; free some space and run again with "
                "--resume, the last checkpoint is untouched"
            ) from error
        raise


def claim_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure that `folder` may be written to.

    Raises:
        UserError: Something is in it and neither `resume` nor `overwrite` was asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; --out needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        if not overwrite:
            raise UserError(
                f"{folder} is not empty; continue with --resume, replace it with --overwrite, or "
                "choose another --out"
            )
        _check_is_ours(folder)
        shutil.rmtree(folder)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _check_is_ours(folder: Path) -> None:
    ours = (
        *("run.json", "config.yaml", "adapters", "base", "bases"),
        *("comparison.json", "foretune.json", "scores.json"),
    )
    names = {path.name for path in folder.iterdir()}
    if names.isdisjoint(ours) and not any(NAME.fullmatch(n) for n in names):
        raise UserError(
            f"{folder} holds no foretune run ({', '.join(sorted(names)[:3])} …): --overwrite does "
            "not delete it; choose another --out"
        )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
