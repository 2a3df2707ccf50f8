"""Read the rows of one file: JSON lines, JSON, CSV, TSV, Parquet, Arrow, `.npz`.

Rows are read one at a time, so a file may be larger than memory; only `.json` lists and `.npz`
files are read at once. A cell that cannot be decoded is `Unreadable`, which matters only to those
who read its column.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from foretune.errors import UserError
from foretune.printable import in_one_line

CHUNK = 1000  # rows of a columnar file that become Python objects at once
PARQUET_BUFFER = 2**20  # bytes; without a buffer a column of a row group is read at once
MOST_NESTED = 100  # levels; far below what the standard library's recursive functions can follow

Cells = Iterator[tuple[str, int, dict[str, Any]]]  # "line" or "row", its number, its columns


@dataclass(frozen=True)
class Unreadable:
    """A cell that could not be decoded.

    Args:
        reason: Why not, for a message.
    """

    reason: str

    def __str__(self) -> str:
        return self.reason


def suffix_of(path: Path) -> str | None:
    """The one of `READERS` in which the file's name ends, in whatever case."""
    name = path.name.casefold()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def stem_of(path: Path) -> str:
    """The name of a file without the suffix of `READERS`."""
    return path.name[: -len(suffix_of(path) or "") or None]


def read_cells(path: Path) -> Cells:
    """("line" or "row", its number from 1, its columns) of each row of a file.

    Raises:
        UserError: The file cannot be read; the message names it, and the line if there is one.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise UserError(f"{path} is not a data file: its name must end in {', '.join(READERS)}")
    empty = True
    try:
        for cells in READERS[suffix](path):
            empty = False
            yield cells
    except (OSError, EOFError, zlib.error) as error:  # a broken gzip raises any of the three
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if empty:
        raise UserError(f"{path} is empty: it needs at least one row")


def _open(path: Path) -> BinaryIO:
    packed = path.suffix.casefold() == ".gz"
    return cast(BinaryIO, gzip.open(path)) if packed else path.open("rb")


def _json_lines(path: Path) -> Cells:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                place = f"{path} line {number}"
                fields = _an_object(_load(line.rstrip(), place), place)
                nested = line.count(b"[") + line.count(b"{") > MOST_NESTED
                yield "line", number, _shallow(fields) if nested else fields


def _json(path: Path) -> Cells:
    """The objects of a JSON list; a `.json` file of JSON lines is read as such."""
    with _open(path) as stream:
        content = stream.read()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(path)
        return
    for number, item in enumerate(_load(content, str(path)), start=1):
        yield "row", number, _shallow(_an_object(item, f"{path} row {number}"))


def _load(content: bytes, place: str) -> Any:
    try:
        # as the codec utf-8-sig, in a quarter of the time
        text = content.decode().removeprefix("\ufeff")
        try:
            return DECODER.decode(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python converts
            return PATIENT_DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: {_not_utf8(error)}: save it as UTF-8") from error
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(
            f"{place}: malformed JSON: {error.msg} at character {error.colno}{line}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: malformed JSON: nested too deeply") from error


def _json_object(pairs: list[tuple[str, Any]]) -> Any:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    ((key, count),) = Counter(key for key, _ in pairs).most_common(1)
    return Unreadable(f"the key {short(key)} occurs {count} times")


def _json_integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError:
        return Unreadable(f"an integer of {len(digits.lstrip('-'))} digits")


DECODER = json.JSONDecoder(object_pairs_hook=_json_object)
PATIENT_DECODER = json.JSONDecoder(object_pairs_hook=_json_object, parse_int=_json_integer)


def _an_object(item: Any, place: str) -> dict[str, Any]:
    if isinstance(item, Unreadable):
        raise UserError(f"{place}: {item.reason}")
    if not isinstance(item, dict):
        raise UserError(
            f'{place}: a row must be a JSON object such as {{"task": …}}, got {short(item)}'
        )
    return item


def _shallow(fields: dict[str, Any]) -> dict[str, Any]:
    """The columns, but those that are nested too deeply as `Unreadable`."""
    for name, cell in fields.items():
        level = [cell]
        for _ in range(MOST_NESTED):
            level = [
                item
                for value in level
                if isinstance(value, (list, dict))
                for item in (value.values() if isinstance(value, dict) else value)
            ]
        if level:
            fields[name] = Unreadable(f"nested more than {MOST_NESTED} levels deep")
    return fields


def _separated(path: Path) -> Cells:
    """The rows of a CSV or TSV file; cells are text, and empty ones are left out.

    Raises:
        UserError: The file is not one, or a record is malformed; the message names the line.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses documents of more than 131,072 characters
    delimiter, kind = ("\t", "TSV") if ".tsv" in path.name.casefold()[-7:] else (",", "CSV")
    with _open(path) as stream:
        # Undecodable bytes become lone surrogates, so that only their own cells are lost.
        text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header, begin, end = None, 1, 0  # lines: a quoted cell may hold several
        try:
            for cells in reader:
                begin, end = end + 1, reader.line_num
                if not any(cells):
                    continue
                if header is None:
                    header = _header(cells, path, begin)
                elif len(cells) == len(header):
                    yield "line", begin, _csv_row(header, cells)
                else:
                    raise UserError(
                        f"{path} line {begin}: {len(cells)} cells, but the header has "
                        f'{len(header)}: put a cell that holds the delimiter "in quotes"'
                    )
        except csv.Error as error:
            place = f"{path} line {end + 1}"
            raise UserError(f"{place}: malformed {kind}: {one_line(error)}") from error


def _header(cells: list[str], path: Path, line: int) -> list[str]:
    place = f"{path} line {line}"
    names = [cell.strip() for cell in cells]
    for name in names:
        if isinstance(cell := _csv_cell(name), Unreadable):
            raise UserError(f"{place}: the header: {cell.reason}")
    if names[0].casefold().startswith("sep="):
        raise UserError(f"{place}: a line for Excel ({in_one_line(names[0])}…): remove it")
    _check_unique([name for name in names if name], path)
    if len(names) == 1 and any(c in names[0] for c in ",;\t|"):
        raise UserError(
            f'{place}: the header has a single column, "{in_one_line(names[0])}": '
            "separate columns by commas in a .csv file, by tabs in a .tsv file"
        )
    return names


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any]:
    """The row's columns that have a name and a cell."""
    return {
        name: _csv_cell(cell) for name, cell in zip(header, cells, strict=True) if name and cell
    }


def _csv_cell(cell: str) -> str | Unreadable:
    try:
        if not cell.isascii():
            cell.encode()
    except UnicodeEncodeError as error:  # a byte that `surrogateescape` has kept
        byte = ord(cell[error.start]) - 0xDC00
        return Unreadable(f"byte {byte:#04x} is not UTF-8: save the file as UTF-8")
    return cell


def _parquet(path: Path) -> Cells:
    def batches() -> Iterator[Any]:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER) as stored:
            _check_unique(stored.schema_arrow.names, path)
            yield from stored.iter_batches(CHUNK)

    return _columnar(batches(), f"{path} is not a readable Parquet file")


def _arrow(path: Path) -> Cells:
    def batches() -> Iterator[Any]:
        import pyarrow.ipc

        with path.open("rb") as stream:
            is_file = stream.read(6) == b"ARROW1"
            stream.seek(0)
            opened = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
            _check_unique(opened.schema.names, path)
            if is_file:
                yield from map(opened.get_batch, range(opened.num_record_batches))
            else:
                yield from opened

    return _columnar(batches(), f"{path} is not a readable Arrow file")


def _columnar(batches: Iterator[Any], fault: str) -> Cells:
    """The rows of Arrow batches.

    Raises:
        UserError: Arrow cannot read them; the message begins with `fault`.
        OSError: The file cannot be read.
    """
    number = 0
    try:
        for batch in batches:
            for start in range(0, batch.num_rows, CHUNK):
                for fields in rows_of_table(batch.slice(start, CHUNK)):
                    number += 1
                    yield "row", number, fields
    except (UserError, OSError):
        raise
    except Exception as error:  # Arrow raises errors of all kinds over damaged files
        after = f" after row {number}" if number else ""
        raise UserError(f"{fault}{after}: {one_line(error)}") from error


def rows_of_table(table: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `pyarrow.RecordBatch` or `pyarrow.Table` as Python objects."""
    names, columns = table.column_names, [_cells_of(column) for column in table.columns]
    for cells in zip(*columns, strict=True):
        yield dict(zip(names, cells, strict=True))


def _cells_of(column: Any) -> list[Any]:
    """The cells of an Arrow column; a damaged one that were not validated may abort the process."""
    try:
        column.validate(full=True)
        cells: list[Any] = column.to_pylist()
    except Exception:  # one of the cells; which, is seen cell by cell
        cells = [_cell_of(column.slice(i, 1)) for i in range(len(column))]
    return cells


def _cell_of(column: Any) -> Any:
    import pyarrow

    try:
        column.validate(full=True)
        return column.to_pylist()[0]
    except Exception as error:  # such as a date before the year 1
        is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        if not (is_text and "UTF8" in str(error)):
            return Unreadable(one_line(error))
    try:
        return bytes(column[0].as_buffer()).decode()
    except UnicodeDecodeError as error:
        return Unreadable(_not_utf8(error))


def _npz(path: Path) -> Cells:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as stored:
            _check_unique(stored.files, path)
            arrays = {name: stored[name] for name in stored.files}
        lengths = {name: a.shape[0] if a.ndim else None for name, a in arrays.items()}
    except (UserError, OSError):
        raise
    except Exception as error:  # NumPy and zipfile raise errors of all kinds over damaged files
        raise UserError(
            f"{path} is not a readable .npz file of plain arrays: {one_line(error)}"
        ) from error
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
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        return Unreadable(_not_utf8(error))


def _check_unique(names: Sequence[str], path: Path) -> None:
    """Check that no two columns have the same name.

    Raises:
        UserError: Two do.
    """
    name, count = Counter(names).most_common(1)[0] if names else ("", 1)
    if count > 1:
        raise UserError(
            f'{path} has {count} columns "{in_one_line(name)}": rename or remove all but one'
        )


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} is not UTF-8"


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return in_one_line(lines[0]) if lines else type(error).__name__


def short(value: Any) -> str:
    """The beginning of a value as JSON, for a message."""
    text = in_one_line(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else text[:57] + "…"


READERS: dict[str, Callable[[Path], Cells]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".ndjson": _json_lines,
    ".ndjson.gz": _json_lines,
    ".json": _json,
    ".json.gz": _json,
    ".csv": _separated,
    ".csv.gz": _separated,
    ".tsv": _separated,
    ".tsv.gz": _separated,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".npz": _npz,
}


def check_unicode(text: str, where: str) -> None:
    """Check that a text can be written as UTF-8, which no tokenizer or file can do without.

    Args:
        text: The text.
        where: What and where it is, for the message.

    Raises:
        UserError: It holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise UserError(
            f"{where}: character {error.start + 1} is half of a surrogate pair ({half}), which is "
            "no text: write the whole character"
        ) from error
