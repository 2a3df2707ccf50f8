"""Checkpoints: written atomically; the newest and the best are kept."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from foretune.errors import UserError
from foretune.files import CHECKPOINT, UNFINISHED, whole_folder
from foretune.formats import CHECKPOINT as FORMAT
from foretune.formats import read_json, read_tensors, stamped, unstamped
from foretune.training.process_group import Partition

STATE_FILE, STATE_WEIGHTS_FILE = "state.json", "state.safetensors"  # in a checkpoint's folder


@dataclass
class CheckpointStore:
    """Keeps the newest checkpoint and the best one, on disk or, without a folder, in memory.

    A checkpoint is written under another name, flushed to the disk and then renamed, so a folder
    named checkpoint-N is complete whatever happened while it was written.

    Args:
        folder: Folder of the checkpoints; None for memory, where only the best is kept and
            nothing can be resumed.
        partition: The slots of this process. A checkpoint on disk is the same for any number of
            processes; the first one writes it.
    """

    folder: Path | None
    partition: Partition | None = None
    _best: dict[str, Tensor] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Keeps this state; it is the best so far if `meta["best_step"] == step`."""
        is_best = meta.get("best_step") == step
        if self.folder is None:
            if is_best:
                self._best = {k: v.detach().cpu().clone() for k, v in tensors.items()}
            return
        if self.partition is None:
            self._write(self.folder, step, tensors, meta)
            return
        state, folder = self.partition.gather_state(tensors), self.folder
        self.partition.group.on_first_process(lambda: self._write(folder, step, state, meta))

    def _write(
        self, folder: Path, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]
    ) -> None:
        final = folder / f"checkpoint-{step}"
        with whole_folder(final) as part:
            contiguous = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            save_file(contiguous, part / STATE_WEIGHTS_FILE)
            record = stamped({"step": step, **meta}, FORMAT)
            (part / STATE_FILE).write_text(json.dumps(record, indent=1))
        for saved_step, path in self._checkpoints():
            if saved_step not in (step, meta.get("best_step")):
                shutil.rmtree(path)

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the metadata of the newest checkpoint; None without one."""
        newest = max((step for step, _ in self._checkpoints()), default=None)
        if self.partition is not None:
            newest = self.partition.group.on_first_process(lambda: newest)
        if newest is None:
            return None
        assert self.folder is not None
        return self._load(self.folder / f"checkpoint-{newest}")

    def best(self, step: int) -> dict[str, Tensor] | None:
        """The tensors of the best checkpoint, which is that of `step`."""
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

    def _checkpoints(self) -> list[tuple[int, Path]]:
        if self.folder is None or not self.folder.is_dir():
            return []
        matches = ((CHECKPOINT.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(m.group(1)), path) for m, path in matches if m)

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            record = read_json(path / STATE_FILE, dict[str, Any])
            tensors = read_tensors(path / STATE_WEIGHTS_FILE)
        except UserError as error:
            raise UserError(
                f"{path} is not a readable checkpoint ({error}); remove that folder to continue "
                "from an older one, or start again with --overwrite"
            ) from error
        meta = unstamped(path / STATE_FILE, record, FORMAT)
        return tensors if self.partition is None else self.partition.local_state(tensors), meta
