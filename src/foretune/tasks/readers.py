"""Read rows from files and HF datasets; each row knows where it came from.

Rows are read one at a time, so a source may be larger than memory; only `.json` lists and `.npz`
files are read at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import gzip
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from foretune.errors import UserError, did_you_mean

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".npz")
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
CHUNK = 1000  # rows of a columnar file that become Python objects at once
PARQUET_BUFFER = 2**20  # bytes; without a buffer a column of a row group is read at once


class Row(NamedTuple):
    """One row as it was read, and where it came from.

    Attributes:
        file: The file or dataset.
        unit: "line" or "row".
        number: Number of the line or row, from 1.
        fields: The row's columns.
        split: The split that the file's name or the HF dataset implies, if any; a split column in
            the row takes precedence.
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


def read_rows(source: str) -> Iterator[Row]:
    """Iterate over the rows of a file, of the data files in a folder, or of an HF dataset.

    In a folder with a `train` file, the names of files give the split of rows without a split
    column.

    Raises:
        UserError: There is no such source, or (while iterating) it cannot be read; the message
            names file and line.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        return _read_folder(path)
    if HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES):
        return _read_dataset(source)
    raise UserError(f"no such file or folder: {source}.{_near(source)}")


def _read_file(path: Path, split: str | None = None) -> Iterator[Row]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, int, dict[str, Any]]]]] = {
        ".jsonl": _json_lines,
        ".jsonl.gz": _json_lines,
        ".json": _json,
        ".parquet": _parquet,
        ".npz": _npz,
    }
    suffix = next((s for s in SUFFIXES if path.name.endswith(s)), None)
    if suffix is None:
        raise UserError(f"{path} is not a data file: its name must end in {', '.join(SUFFIXES)}")
    number, file = None, str(path)
    try:
        for unit, number, fields in readers[suffix](path):
            yield Row(file, unit, number, fields, split)
    except (OSError, EOFError) as error:  # a broken gzip raises one or the other
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if number is None:
        raise UserError(f"{path} is empty: it needs at least one row")


def _read_folder(folder: Path) -> Iterator[Row]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _read_dataset(str(folder), saved_to_disk=True)
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    if files:
        names = {p: p.name.split(".")[0] for p in files}
        has_train = "train" in names.values()
        split = {p: SPLIT_NAMES.get(name) if has_train else None for p, name in names.items()}
        return (row for p in files for row in _read_file(p, split[p]))
    library_suffixes = (".csv", ".tsv", ".arrow", ".parquet", ".jsonl")
    if any(p.suffix in library_suffixes for p in folder.rglob("*")):
        return _read_dataset(str(folder))
    names_shown = sorted(p.name for p in folder.iterdir())[:5]
    raise UserError(
        f"no data file in folder {folder}: it needs one that ends in {', '.join(SUFFIXES)}; "
        f"it holds {', '.join(names_shown) if names_shown else 'nothing'}"
    )


def _json_lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield "line", number, _parse(line.rstrip(), f"{path} line {number}")


def _json(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The objects of a JSON list; a `.json` file of JSON lines is read as such."""
    content = path.read_bytes()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(path)
        return
    for number, item in enumerate(_load(content, str(path)), start=1):
        yield "row", number, _an_object(item, f"{path} row {number}")


def _parse(content: bytes, place: str) -> dict[str, Any]:
    return _an_object(_load(content, place), place)


def _load(content: bytes, place: str) -> Any:
    try:
        # as the codec utf-8-sig, in a quarter of the time
        return json.loads(content.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: byte {error.object[error.start]:#04x} is not UTF-8: save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(
            f"{place}: malformed JSON: {error.msg} at character {error.colno}{line}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: malformed JSON: nested too deeply") from error


def _an_object(item: Any, place: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise UserError(
            f'{place}: a row must be a JSON object such as {{"task": …}}, got {_short(item)}'
        )
    return item


def _parquet(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER) as stored:
            rows = (fields for chunk in stored.iter_batches(CHUNK) for fields in chunk.to_pylist())
            for number, fields in enumerate(rows, start=1):
                yield "row", number, fields
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {one_line(error)}") from error


def _npz(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is not a readable .npz file of plain arrays: {one_line(error)}"
        ) from error
    lengths = {name: a.shape[0] if a.ndim else None for name, a in arrays.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        shapes = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise UserError(
            f"{path}: row i of each array belongs to example i, but lengths differ: {shapes}"
        )
    for i in range(next(iter(lengths.values()), 0) or 0):
        yield "row", i + 1, {name: _plain(a[i]) for name, a in arrays.items()}


def _plain(value: Any) -> Any:
    """A NumPy scalar as a Python value; arrays and text unchanged."""
    value = value.item() if getattr(value, "shape", None) == () else value
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _read_dataset(source: str, saved_to_disk: bool = False) -> Iterator[Row]:
    import datasets

    name, _, config = source.partition(":") if HUB_ID.fullmatch(source) else (source, "", "")
    try:
        if saved_to_disk:
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # any error of the library or the network becomes one line
        path = Path(source)
        missing = "" if path.is_dir() else f"; there is no file or folder {source} either"
        hint = _near(source) if path.parent.is_dir() else ""
        raise UserError(
            f'HF dataset "{source}" could not be loaded: {one_line(error)}{missing}.{hint}'
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    if not any(map(len, splits.values())):
        raise UserError(f"{source} is empty: it needs at least one row")
    for split, table in splits.items():
        for number, fields in enumerate(_table_rows(table), start=1):
            yield Row(f"{source} ({split})", "row", number, fields, split)


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
    for chunk in table.iter(CHUNK):
        for values in zip(*chunk.values(), strict=True):
            yield _named(dict(zip(chunk, values, strict=True)), labels)


def _named(fields: dict[str, Any], labels: dict[str, list[str]]) -> dict[str, Any]:
    """The fields with class names instead of numbers; an unnamed number (-1) is not a label."""
    for key, names in labels.items():
        number = fields[key]
        has_name = number is not None and 0 <= number < len(names)
        fields[key] = names[number] if has_name else None
    return fields


def _near(source: str) -> str:
    """A hint at files with similar names in the same folder."""
    path = Path(source).expanduser()
    if not path.parent.is_dir():
        return f" Its folder {path.parent} does not exist either."
    names = sorted(p.name for p in path.parent.iterdir())
    if str(path.parent) == ".":
        names.append("python-docs")
    hint = did_you_mean(path.name, names)
    if not hint:
        stems = difflib.get_close_matches(path.name.split(".")[0], [n.split(".")[0] for n in names])
        near = [n for n in names if n.split(".")[0] in stems][:3]
        hint = f" In that folder: {', '.join(near)}." if near else ""
    return hint


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "…"
