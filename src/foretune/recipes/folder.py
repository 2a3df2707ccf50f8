"""The folder of a run: refused when something is in it, unless the user says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

from foretune.errors import UserError
from foretune.recipes.yaml_io import parse_yaml

CONFIG = "config.yaml"
OURS = (CONFIG, "run.json", "comparison.json", "bases", "base", "scores.json")
MOVABLE = ("out", "device")  # what may change between a run and its continuation


def prepare_folder(
    folder: Path, *, resume: bool, overwrite: bool, config: str | None = None
) -> Path:
    """Makes the folder ready to be written to.

    Args:
        folder: Where the results go.
        resume: Keep what is in it.
        overwrite: Remove what is in it.
        config: The resolved recipe, which a resumed run must share; written into the folder.

    Raises:
        UserError: Something is in it and neither was asked for, both were, or the folder was begun
            with another recipe.
    """
    if resume and overwrite:
        raise UserError("--resume keeps what is in the folder, --overwrite removes it: choose one")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    # A recipe alone was left by a run that failed before it began: nothing is lost.
    used = folder.is_dir() and any(path.name != CONFIG for path in folder.iterdir())
    if used and not (resume or overwrite):
        raise UserError(
            f"{folder} is not empty: --resume continues what was begun there, --overwrite removes "
            "it, another folder leaves it alone"
        )
    if used and overwrite:
        _remove(folder)
    if used and resume and config is not None:
        _check_same(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None and not (used and resume):
        (folder / CONFIG).write_text(config, encoding="utf-8")
    return folder


def _remove(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    if names.isdisjoint(OURS) and not any(name.startswith("checkpoint-") for name in names):
        raise UserError(
            f"{folder} holds no foretune run ({', '.join(sorted(names)[:3])}, …): --overwrite does "
            "not remove it; choose another folder"
        )
    shutil.rmtree(folder)


def _check_same(folder: Path, config: str) -> None:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no run to resume (no {CONFIG}); use --overwrite")
    begun = _flat(parse_yaml(path.read_text("utf-8"), str(path)))
    wanted = _flat(parse_yaml(config, "the recipe"))
    for key in dict.fromkeys([*begun, *wanted]):
        if key not in MOVABLE and begun.get(key) != wanted.get(key):
            raise UserError(
                f"{folder} was begun with {key}={begun.get(key)!r}, the recipe now says "
                f"{wanted.get(key)!r}: resume with the same recipe, or use --overwrite"
            )


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, below in value.items():
        flat |= _flat(below, f"{prefix}.{key}" if prefix else str(key))
    return flat
