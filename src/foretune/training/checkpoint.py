"""Checkpoints: written whole or not at all, the newest and the best are kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foretune.errors import UserError
from foretune.files import CHECKPOINT, UNFINISHED, whole_folder
from foretune.formats import CHECKPOINT as FORMAT
from foretune.formats import stamped, unstamped
from foretune.training.process_group import Partition

STATE_FILE, STATE_WEIGHTS_FILE = "state.json", "state.safetensors"  # in a checkpoint's folder


@dataclass
class CheckpointStore:
    """Keeps the newest checkpoint and the best one, on disk or, without a folder, in memory.

    A checkpoint is written under another name, flushed to the disk and then renamed, so a folder
    named checkpoint-N is complete whatever happened while it was written.

    Args:
        folder: Where; None for memory, where only the best is kept and nothing can be resumed.
        partition: What this process has of it. A checkpoint on disk is the same for any number of
            processes; the first of them writes it.
    """

    folder: Path | None
    partition: Partition | None = None
    _best: dict[str, Tensor] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Keeps this state; `meta["best_step"] == step` says that it is the best so far."""
        is_best = meta.get("best_step") == step
        if self.folder is None:
            if is_best:
                self._best = {k: v.detach().cpu().clone() for k, v in tensors.items()}
            return
        if self.partition is None:
            self._write(self.folder, step, tensors, meta)
            return
        whole, folder = self.partition.whole(tensors), self.folder
        self.partition.group.first(lambda: self._write(folder, step, whole, meta))

    def _write(
        self, folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> None:
        final = folder / f"checkpoint-{step}"
        with whole_folder(final) as part:
            contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            save_file(contiguous, part / STATE_WEIGHTS_FILE)
            (part / STATE_FILE).write_text(
                json.dumps(stamped({"step": step, **meta}, FORMAT), indent=1)
            )
        for other, path in self._found():
            if other not in (step, meta.get("best_step")):
                shutil.rmtree(path)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the meta data of the newest checkpoint, or None."""
        newest = max((step for step, _ in self._found()), default=None)
        if self.partition is not None:
            newest = self.partition.group.first(lambda: newest)
        if newest is None:
            return None
        assert self.folder is not None
        return self._load(self.folder / f"checkpoint-{newest}")

    def best(self, step: int) -> dict[str, Tensor] | None:
        """The tensors of the best checkpoint."""
        if self.folder is None:
            return self._best
        return self._load(self.folder / f"checkpoint-{step}")[0]

    def clear(self) -> None:
        """Removes all checkpoints, finished or not."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                if CHECKPOINT.fullmatch(path.name):
                    shutil.rmtree(path)
                elif path.name.startswith(UNFINISHED):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _found(self) -> list[tuple[int, Path]]:
        if self.folder is None or not self.folder.is_dir():
            return []
        matches = ((CHECKPOINT.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(m.group(1)), path) for m, path in matches if m)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            record = path / STATE_FILE
            meta = unstamped(record, json.loads(record.read_text()), FORMAT)
            tensors = load_file(path / STATE_WEIGHTS_FILE)
            return tensors if self.partition is None else self.partition.part(tensors), meta
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{path} is no readable checkpoint ({error}); remove that folder to continue from "
                "an older one, or start again with --overwrite"
            ) from error
