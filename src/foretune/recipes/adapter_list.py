"""`foretune ls adapters`: what a folder of adapters holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foretune.adapters.config_file import read_config
from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE, CONFIG_FILE, SCORES_FILE
from foretune.training.scores_file import SavedTask, read_scores


def listed_adapters(folder: Path) -> list[dict[str, Any]]:
    """The adapters in a folder, by the names of their tasks.

    Args:
        folder: A folder that `adapt` or `run` has written, or any that holds PEFT folders.

    Returns:
        For each adapter, and each model of a task, its task, folder, version, rows (number of
        training examples), score, when it was adapted, and the name of its base; None for what is
        not recorded.

    Raises:
        UserError: There is no such folder, or no adapter in it.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    folders = adapters_in(folder)
    saved = {task.folder: (key, task) for key, task in read_scores(folder / SCORES_FILE).items()}
    unknown = SavedTask(folder="", score=None, num_rows=0)
    rows = []
    for path in folders:
        (task, draw), record = saved.get(path.name, ((path.name, 0), unknown))
        is_adapter = (path / ADAPTER_CONFIG_FILE).is_file()
        base = read_config(path).get("base_model_name_or_path") if is_adapter else None
        rows.append(
            {
                "task": task if draw == 0 else f"{task} (draw {draw})",
                "folder": str(path),
                "version": record.version if path.name in saved else None,
                "rows": record.num_train,
                "score": record.score,
                "adapted": record.adapted,
                "base": base,
            }
        )
    return sorted(rows, key=lambda row: str(row["task"]))


def adapters_in(folder: Path) -> list[Path]:
    """The folders of the adapters, and of tasks' own models, in a folder.

    Raises:
        UserError: There is none.
    """
    folders = sorted(path for path in folder.iterdir() if is_adapter(path))
    if not folders:
        raise UserError(
            f"{folder} holds no adapters: neither PEFT's, which lora, head and basis write, nor "
            "models, which full writes"
        )
    return folders


def adapters_by_task(folder: Path) -> dict[str, Path]:
    """Task → the folder of its adapter, or of its own model.

    A task is known by its name where the folder records that, and by the name of its folder.

    Raises:
        UserError: There is none.
    """
    folders = {path.name: path for path in adapters_in(folder)}
    saved = read_scores(folder / SCORES_FILE)
    by_name = {
        task: folders[record.folder]
        for (task, draw), record in saved.items()
        if draw == 0 and record.folder in folders
    }
    return folders | by_name


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter, or a task's own model."""
    return any((folder / file).is_file() for file in (ADAPTER_CONFIG_FILE, CONFIG_FILE))
