"""Write rows as a file that `read_rows` reads: JSON lines, CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.files import disk_errors, write_whole
from foretune.manifest import UNFINISHED
from foretune.printable import in_one_line

Rows = Sequence[Mapping[str, Any]]
ARRAYS = (np.ndarray, np.generic)


def check_suffix(file: Path) -> None:
    """Checks that rows can be written as a file of this name.

    Raises:
        UserError: They cannot.
    """
    if file.suffix.lower() not in WRITERS:
        raise UserError(f"{file}: rows are written as {', '.join(WRITERS)}; choose one of these")


def write_rows(file: Path, rows: Rows) -> None:
    """Writes rows to a file, whole or not at all; it is replaced if it exists.

    In a CSV or TSV file lists and mappings are JSON, and a missing field is empty.

    Args:
        file: The file; its name says the format.
        rows: The rows, one or more; they may have different columns.

    Raises:
        UserError: The name says no format, or Parquet takes no column of values so different.
    """
    check_suffix(file)
    WRITERS[file.suffix.lower()](file, rows)


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """The value as JSON has it: arrays are lists, NaN and infinity null, all else is a text."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _write_json_lines(file: Path, rows: Rows) -> None:
    write_whole(file, "".join(f"{json_line(row)}\n" for row in rows))


def _write_table(file: Path, rows: Rows) -> None:
    text = io.StringIO()
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    names = _columns(rows)
    # A lone carriage return is not quoted by itself, and would end the line.
    bare = any("\r" in str(cell) for row in cells for cell in row.values()) or "\r" in "".join(
        names
    )
    writer = csv.DictWriter(
        text,
        names,
        delimiter="\t" if file.suffix.lower() == ".tsv" else ",",
        lineterminator="\n",
        quoting=csv.QUOTE_ALL if bare else csv.QUOTE_MINIMAL,
    )
    writer.writeheader()
    writer.writerows(cells)
    write_whole(file, text.getvalue())


def _write_parquet(file: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {}
    temporary = file.with_name(UNFINISHED + file.name)
    name = ""
    try:
        for name in _columns(rows):
            values = [row.get(name) for row in rows]
            columns[name] = pyarrow.array(
                [v.tolist() if isinstance(v, ARRAYS) else v for v in values]
            )
        name = ", ".join(columns)
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
            temporary.replace(file)
    except (pyarrow.ArrowException, OverflowError, TypeError) as error:
        raise UserError(
            f"{file}: Parquet does not take the values of {in_one_line(name)}: write .jsonl"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    ".jsonl": _write_json_lines,
    ".csv": _write_table,
    ".tsv": _write_table,
    ".parquet": _write_parquet,
}


def _columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any) -> Any:
    is_nested = isinstance(value, (list, dict, np.ndarray))
    return json.dumps(plain(value), ensure_ascii=False) if is_nested else value
