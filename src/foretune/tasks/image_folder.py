"""Folders of images with a folder for each class, as torchvision's `ImageFolder` reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foretune.errors import UserError
from foretune.tasks.split_names import LEFT_OUT, SplitNames

SUFFIXES = (*(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"),)
HIDDEN = "."


def image_files(folder: Path) -> list[Path]:
    """The images of a folder and of those in it, in the order of their paths."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.casefold() in SUFFIXES
        and not any(part.startswith(HIDDEN) for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def image_rows(
    folder: Path, files: list[Path], splits: SplitNames
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """(split, row) of each image: its file and size, the class, and the task.

    The folder that an image lies in is its class. Of the folders above, one with the name of a
    split is that; the others are the task, or else the name of the whole folder is.

    Args:
        folder: FOLDER of FOLDER/CLASS/1.jpg, FOLDER/train/CLASS/1.jpg or FOLDER/TASK/CLASS/1.jpg.
        files: Its images.
        splits: The names of splits.

    Raises:
        UserError: An image lies in no folder of a class, or in one of two splits.
    """
    for file in files:
        *above, label = file.relative_to(folder).parts[:-1] or ("",)
        if not label or (not above and splits.split_in(label, str(file)) is not None):
            raise UserError(
                f"{file} lies in no folder of a class: sort images as {folder}/CLASS/{file.name} "
                f"or {folder}/train/CLASS/{file.name}"
            )
        named = {part: splits.split_in(part, str(file)) for part in above}
        of_splits = {split for split in named.values() if split is not None}
        if len(of_splits) > 1:
            raise UserError(
                f"{file} lies in folders of two splits, {' and '.join(sorted(of_splits))}"
            )
        split = next(iter(of_splits), None)
        if split == LEFT_OUT:
            continue
        task = "/".join(part for part in above if named[part] is None) or folder.resolve().name
        yield (
            split,
            {"task": task, "image": str(file), "bytes": file.stat().st_size, "label": label},
        )
