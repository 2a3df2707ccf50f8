"""The lines of Python that load a base of a run with an adapter on it, as its folder has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from foretune.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, LABELS_FILE, TOKENIZER_CONFIG_FILE
from foretune.models.loading_code import loading_code


def load_lines(base: Mapping[str, Any], folder: Path) -> list[str]:
    """Python that loads the base with the first adapter on it; it runs inside `folder`.

    Where the files are no longer there, the lines name the folders in which a run writes them.

    Args:
        base: A base of `comparison.json` that has a path.
        folder: The folder of the comparison.
    """
    where = _from(folder, str(base["path"]))
    adapters = PurePath("adapters") / base["name"]
    if not (folder / where).is_dir():
        adapter = (adapters / "TASK").as_posix()
        return loading_code(base["model_class"], where, adapter, base["num_labels"])
    tokenizer = where if (folder / where / TOKENIZER_CONFIG_FILE).is_file() else None
    tasks = sorted((folder / adapters).glob(f"*/{ADAPTER_CONFIG_FILE}"))
    models = sorted((folder / adapters).glob(f"*/{CONFIG_FILE}"))  # where all weights were trained
    if not tasks and not models:
        return loading_code(base["model_class"], where, tokenizer=tokenizer)
    task = [*tasks, *models][0].parent.relative_to(folder).as_posix()
    labels = f"{task}/{LABELS_FILE}" if (folder / task / LABELS_FILE).is_file() else None
    if not tasks:
        return loading_code(base["model_class"], task, tokenizer=tokenizer, labels=labels)
    return loading_code(
        base["model_class"], where, task, base["num_labels"], tokenizer=tokenizer, labels=labels
    )


def _from(folder: Path, path: str) -> str:
    """A base's path as seen from the folder of the comparison."""
    inside = (folder / path).is_dir() or Path(path).is_absolute() or not Path(path).is_dir()
    return path if inside else Path(os.path.relpath(path, folder)).as_posix()
