"""Which files of a folder hold rows, and of which split: all of them are read, or none.

A folder is read as other tools write it: `train.jsonl` beside `test.csv`, shards such as
`data/train-00000-of-00002.parquet`, `validation/part-0.parquet`, `split=test/task=a/0.parquet`.
What is neither data nor known to hold no rows is refused, and so is what has two meanings.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from foretune.errors import UserError
from foretune.files import CARD_FILE
from foretune.tasks.file_formats import READERS, stem_of, suffix_of
from foretune.tasks.split_names import LEFT_OUT, SHARD, SplitNames

SAVED_DATASET = ("dataset_dict.json", "state.json")  # of a dataset or its splits, by `datasets`
WITHOUT_ROWS = (".md", ".rst", ".py", ".ipynb", ".sh", ".yaml", ".yml")
METADATA = {"dataset_infos.json", "dataset_info.json"}  # of the hub and of `datasets`
TEXTS = {"readme", "license", "licence", "notice", "citation", "changelog", "makefile"}
HIDDEN = (".", "~$")  # `~$train.xlsx`: an office program's lock of an open file
COPY = re.compile(r"^copy of | - copy( \(\d+\))?$| copy( \d+)?$| \(\d+\)$")  # as systems name them
CONTAINERS = {"data", "default"}  # folders whose name says nothing
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class DataFile:
    """A file of rows.

    Args:
        path: The file.
        split: The split of its rows, if its name or its folders say so.
        columns: Columns that its folders name, as in `task=a/part-0.parquet`.
    """

    path: Path
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


def data_files(folder: Path, splits: SplitNames) -> list[DataFile]:
    """The files of a folder that hold rows, in the order of their paths.

    Args:
        folder: The folder.
        splits: The names of splits.

    Raises:
        UserError: The folder holds no data, something that cannot be read, or files of which it
            is not clear to which split they belong.
    """
    entries = list(_walk(folder, folder, splits, DataFile(folder)))
    files = [entry for entry in entries if isinstance(entry, DataFile)]
    unread = [entry for entry in entries if isinstance(entry, str)]
    if unread and files:
        raise UserError(
            f"folder {folder} holds more than can be read: {_some(unread)}; convert or rename it, "
            f"move it away, or set source to one of {_some(_relative(files, folder))}"
        )
    if not files:
        names = unread or sorted(path.name for path in folder.iterdir())
        holds = _some(names) or "nothing"
        raise UserError(
            f"no data file in folder {folder}: it needs one that ends in {', '.join(READERS)}; "
            f"it holds {holds}"
        )
    _check_copies(files, folder)
    _check_shards(files, folder)
    _check_splits(files, folder, splits)
    return [file for file in files if file.split != LEFT_OUT]


def _walk(
    folder: Path, root: Path, splits: SplitNames, outer: DataFile
) -> Iterator[DataFile | str]:
    """The data files below a folder, and what else there is, named for a message.

    Args:
        folder: The folder.
        root: The folder that the user named.
        splits: The names of splits.
        outer: What the folders above say.

    Raises:
        UserError: Folders contradict one another, or cannot be read.
    """
    for path in sorted(folder.iterdir()):
        relative = str(path.relative_to(root))
        if path.name.startswith(HIDDEN) or path.name == "__pycache__":
            continue
        if path.is_dir():
            if folder.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{path} is a link to a folder that it is in: remove it")
            inner = _inside(path, splits, outer)
            if inner is not None:
                yield from _walk(path, root, splits, inner)
            elif any(not _holds_no_rows(p) for p in path.rglob("*") if not p.is_dir()):
                yield f"{relative}/ (a folder that names no split)"
        elif not path.exists():
            yield f"{relative} (a link to {path.readlink()}, which does not exist)"
        elif not path.is_file():
            yield f"{relative} (a pipe or a device)"
        elif _holds_no_rows(path):
            continue
        elif suffix_of(path) is None:
            yield relative
        else:
            named = splits.split_in(stem_of(path), str(path))
            yield DataFile(path, _same(outer.split, named, path), outer.columns)


def _inside(path: Path, splits: SplitNames, outer: DataFile) -> DataFile | None:
    """What a folder's name says of the files in it; None if it could mean anything."""
    key, is_partition, value = path.name.partition("=")
    key, value = unquote(key), unquote(value)
    if is_partition and key != "split":
        columns = {} if value == NULL_PARTITION else {key: value}
        return DataFile(path, outer.split, outer.columns | columns)
    if is_partition:
        named: str | None = splits.split_of(value, str(path))
    else:
        named = splits.split_in(stem_of(path), str(path))
        if named is None and path.name.casefold() not in CONTAINERS and suffix_of(path) is None:
            return None
    return DataFile(path, _same(outer.split, named, path), outer.columns)


def _same(outer: str | None, named: str | None, path: Path) -> str | None:
    if outer is not None and named is not None and outer != named:
        raise UserError(f"{path} names two splits, {outer} and {named}: rename or move it")
    return outer or named


def _holds_no_rows(path: Path) -> bool:
    name = path.name.casefold()
    return (
        name in METADATA
        or name.endswith(WITHOUT_ROWS)
        or name.startswith(HIDDEN)
        # Spark marks its files with an underscore
        or (suffix_of(path) is None and (name.startswith("_") or name.split(".")[0] in TEXTS))
    )


def _check_copies(files: Iterable[DataFile], folder: Path) -> None:
    """Check that no two files differ only in format, or as a copy's name does from the original's.

    Raises:
        UserError: Two do.
    """
    by_name: dict[tuple[Path, str], Path] = {}
    for file in files:
        name = COPY.sub("", stem_of(file.path).casefold())
        first = by_name.setdefault((file.path.parent, name), file.path)
        if first != file.path:
            names = " and ".join(str(p.relative_to(folder)) for p in (first, file.path))
            raise UserError(
                f"folder {folder}: {names} may be the same rows twice: keep one, or rename one"
            )


def _check_shards(files: Iterable[DataFile], folder: Path) -> None:
    """Check that of files such as `train-00000-of-00002.parquet` none is missing.

    Raises:
        UserError: One is.
    """
    shards: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        stem = stem_of(file.path)
        if match := SHARD.search(stem):
            name = stem[: match.start()]
            shards[file.path.parent, name, int(match[2])].add(int(match[1]))
    for (parent, name, count), numbers in shards.items():
        if len(numbers) < count:
            place = (parent / name).relative_to(folder)
            raise UserError(
                f"folder {folder} has {len(numbers)} of the {count} files {place}-…-of-{count:05}: "
                "get the others, or rename those that are to be read"
            )


def _check_splits(files: list[DataFile], folder: Path, splits: SplitNames) -> None:
    """Check that either all files name a split or none does.

    Raises:
        UserError: Only some do, or all rows are left out.
    """
    named = [file for file in files if file.split is not None]
    unnamed = [file for file in files if file.split is None]
    if named and unnamed:
        stem = stem_of(unnamed[0].path)
        raise UserError(
            f"folder {folder}: {_some(_relative(named, folder))} name a split, "
            f"{_some(_relative(unnamed, folder))} none: {splits.way_on(stem)}"
        )
    if all(file.split == LEFT_OUT for file in files):
        raise UserError(f"folder {folder}: all of its files are left out by splits")


def _relative(files: Iterable[DataFile], folder: Path) -> list[str]:
    return [str(file.path.relative_to(folder)) for file in files]


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_saved_dataset(folder: Path) -> None:
    """Check that beside a dataset saved by `datasets` there are no other files of rows.

    Raises:
        UserError: There are.
    """
    others = [
        path.name
        for path in sorted(folder.iterdir())
        if suffix_of(path) not in (None, ".arrow")
        and path.name not in (*SAVED_DATASET, *METADATA)
        and not path.name.startswith(".")
    ]
    if others:
        raise UserError(
            f"folder {folder} is a dataset saved by `datasets`, but holds other files too: "
            f"{_some(others)}; move them away"
        )


def has_dataset_card(folder: Path) -> bool:
    """Whether the folder's README.md says which files belong to which split, as on the HF hub.

    Raises:
        UserError: It names files outside the folder.
    """
    import yaml

    card = folder / CARD_FILE
    try:
        text = card.read_text("utf-8", "replace") if card.is_file() else ""
        _, _, header = text.partition("---\n") if text.startswith("---\n") else ("", "", "")
        metadata = yaml.safe_load(header.partition("\n---")[0])
        configs = metadata["configs"]
        patterns = [str(config["data_files"]) for config in configs]
    except (OSError, yaml.YAMLError, RecursionError, TypeError, KeyError, ValueError):
        return False  # no such card
    for pattern in patterns:
        if "://" in pattern or ".." in pattern or "'/" in pattern or pattern.startswith("/"):
            raise UserError(f"{card} names files outside {folder}: {pattern[:60]}")
    return bool(patterns)
