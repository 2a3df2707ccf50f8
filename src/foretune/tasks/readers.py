"""Read rows from files, folders and HF datasets; each row knows where it came from."""

from __future__ import annotations

import dataclasses
import difflib
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from foretune.errors import UserError, did_you_mean
from foretune.printable import in_one_line
from foretune.tasks.data_folder import (
    SAVED_DATASET,
    DataFile,
    check_saved_dataset,
    data_files,
    has_dataset_card,
)
from foretune.tasks.example import ReadExample
from foretune.tasks.file_formats import (
    one_line,
    read_cells,
    rows_of_table,
    short,
    suffix_of,
)
from foretune.tasks.image_folder import image_files, image_rows
from foretune.tasks.split_names import LEFT_OUT, SplitNames
from foretune.tasks.uncounted import uncounted

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
HUB_ROW = re.compile(r"([\w.-]+/[\w.-]+)(:[\w.-]+)? \(.*\) row")  # where an example was read
CHUNK = 1000  # rows of a dataset that become Python objects at once


class Row(NamedTuple):
    """One row as it was read, and where it came from.

    Attributes:
        file: The file or dataset.
        unit: "line", "row" or "image".
        number: Number of the line or row, from 1.
        fields: The row's columns.
        split: The split that the file's or folder's name or the HF dataset says, if any.
    """

    file: str
    unit: str
    number: int
    fields: dict[str, Any]
    split: str | None = None

    @property
    def place(self) -> str:
        """Where the row came from, for messages: "a.jsonl line 3"."""
        return f"{self.file} {self.unit} {self.number}"


def hub_dataset(example: Any) -> str | None:
    """The id of the data set on the Hub that an example was read from; None for another source.

    >>> from foretune.tasks.example import ReadExample
    >>> hub_dataset(ReadExample({}, "org/name:en (train) row", 3)), hub_dataset({})
    ('org/name', None)
    """
    source = example.source if isinstance(example, ReadExample) else ""
    match = HUB_ROW.fullmatch(source)
    return None if match is None or Path(match[1]).exists() else match[1]


def read_rows(source: str, splits: SplitNames | None = None) -> Iterator[Row]:
    """Iterate over the rows of a file, of the data files in a folder, or of an HF dataset.

    Args:
        source: A path, or the name of a dataset.
        splits: The names of splits; None for the usual ones.

    Raises:
        UserError: There is no such source, or (while iterating) it cannot be read; the message
            names file and line.
    """
    splits = splits or SplitNames()
    path = Path(source)
    try:
        path = path.expanduser()
        mode = path.stat().st_mode if path.exists() else None
        link = path.readlink() if mode is None and path.is_symlink() else None
        if mode is not None and stat.S_ISDIR(mode):
            return _read_folder(path, splits)
    except (OSError, ValueError, RuntimeError) as error:  # no permission, too long, no such user
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{in_one_line(source)} cannot be read: {reason}") from error
    if link is not None:
        raise UserError(f"{source} is a link to {link}, which does not exist")
    if mode is None:
        if HUB_ID.fullmatch(source) and suffix_of(path) is None:
            return _read_dataset(source, splits)
        raise UserError(f"no such file or folder: {source}.{_near(source)}")
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{source} is a pipe or a device, which cannot be read: write the rows to a file"
        )
    return _read_file(DataFile(path))


def _read_folder(folder: Path, splits: SplitNames) -> Iterator[Row]:
    if any((folder / name).is_file() for name in SAVED_DATASET):
        check_saved_dataset(folder)
        return _read_dataset(str(folder), splits, saved_to_disk=True)
    if has_dataset_card(folder):
        return _read_dataset(str(folder), splits)
    images = image_files(folder)
    if images and not any(suffix_of(path) for path in folder.rglob("*") if path.is_file()):
        rows = enumerate(image_rows(folder, images, splits), start=1)
        return (Row(str(folder), "image", n, fields, split) for n, (split, fields) in rows)
    return (row for file in data_files(folder, splits) for row in _read_file(file))


def _read_file(file: DataFile) -> Iterator[Row]:
    """The rows of a file, with the columns that its folders name.

    Raises:
        UserError: The file cannot be read, or a row has another value in such a column.
    """
    name = str(file.path)
    for unit, number, fields in read_cells(file.path):
        for column, value in file.columns.items():
            if str(fields.get(column) or value) != value:
                raise UserError(
                    f"{name} {unit} {number}: {column} is {short(fields[column])}, "
                    f'but the folder says "{column}={value}"'
                )
            fields[column] = value
        yield Row(name, unit, number, fields, file.split)


def _read_dataset(source: str, splits: SplitNames, saved_to_disk: bool = False) -> Iterator[Row]:
    import datasets

    is_hub_id = HUB_ID.fullmatch(source) and not Path(source).is_dir()
    name, _, config = source.partition(":") if is_hub_id else (source, "", "")
    try:
        if saved_to_disk:
            loaded = datasets.load_from_disk(source)
        else:
            with uncounted():
                loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # any error of the library or the network becomes one line
        path = Path(source)
        missing = "" if path.is_dir() else f"; there is no file or folder {source} either"
        hint = _near(source) if path.parent.is_dir() else ""
        raise UserError(
            f'HF dataset "{source}" could not be loaded: {one_line(error)}{missing}.{hint}'
        ) from error
    tables = loaded if isinstance(loaded, dict) else {"train": loaded}
    if not any(map(len, tables.values())):
        raise UserError(f"{source} is empty: it needs at least one row")
    split_of = {name: splits.split_of(name, source) for name in tables}
    # `datasets` calls train what has no splits; its rows may name their own.
    has_splits = split_of != {"train": "train"}
    for name, table in tables.items():
        split = split_of[name] if has_splits else None
        for number, fields in enumerate([] if split == LEFT_OUT else _table_rows(table), start=1):
            yield Row(f"{source} ({name})", "row", number, fields, split)


def _table_rows(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, with class names instead of numbers."""
    import datasets

    labels = {}
    for key, feature in table.features.items():
        if isinstance(feature, datasets.ClassLabel):
            labels[key] = feature.names
        elif getattr(feature, "decode", False):
            # An image or a sound, which no objective reads: decoding it would cost time.
            table = table.cast_column(key, dataclasses.replace(feature, decode=False))
    for chunk in table.with_format("arrow").iter(CHUNK):
        for fields in rows_of_table(chunk):
            yield _named(fields, labels)


def _named(fields: dict[str, Any], labels: dict[str, list[str]]) -> dict[str, Any]:
    """The fields with class names instead of numbers; an unnamed number (-1) is not a label."""
    for key, names in labels.items():
        number = fields[key]
        has_name = isinstance(number, int) and 0 <= number < len(names)
        fields[key] = names[number] if has_name else None
    return fields


def _near(source: str) -> str:
    """A hint at files with similar names in the same folder."""
    path = Path(source).expanduser()
    if not path.parent.is_dir():
        return f" Its folder {path.parent} does not exist either."
    try:
        names = sorted(p.name for p in path.parent.iterdir())
    except OSError:  # a folder that may be entered, but not listed
        return ""
    if str(path.parent) == ".":
        names += ["land-bank", "land-bank-chats", "python-docs"]
    hint = did_you_mean(path.name, names)
    if not hint:
        stems = difflib.get_close_matches(path.name.split(".")[0], [n.split(".")[0] for n in names])
        near = [n for n in names if n.split(".")[0] in stems][:3]
        hint = f" In that folder: {', '.join(near)}." if near else ""
    return hint
