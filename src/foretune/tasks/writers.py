"""Write rows as a file that `read_rows` reads: JSON lines, CSV, TSV or Parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.files import disk_errors, write_whole
from foretune.manifest import UNFINISHED

Rows = Sequence[Mapping[str, Any]]


def check_suffix(file: Path) -> None:
    """Checks that rows can be written as a file of this name.

    Raises:
        UserError: They cannot.
    """
    if file.suffix not in WRITERS:
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
    WRITERS[file.suffix](file, rows)


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON."""
    return json.dumps(row, ensure_ascii=False, default=_plain)


def _write_json_lines(file: Path, rows: Rows) -> None:
    write_whole(file, "".join(f"{json_line(row)}\n" for row in rows))


def _write_table(file: Path, rows: Rows) -> None:
    text = io.StringIO()
    delimiter = "\t" if file.suffix == ".tsv" else ","
    writer = csv.DictWriter(text, _columns(rows), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_whole(file, text.getvalue())


def _write_parquet(file: Path, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        name: [json.loads(json_line({"": row.get(name)}))[""] for row in rows]
        for name in _columns(rows)
    }
    try:
        table = pyarrow.table(columns)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
        raise UserError(
            f"{file}: a column holds values of several types, which Parquet does not take: write "
            ".jsonl"
        ) from error
    temporary = file.with_name(UNFINISHED + file.name)
    with disk_errors(file):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table, temporary)
            temporary.replace(file)
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
    return json.dumps(value, ensure_ascii=False, default=_plain) if is_nested else value


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return str(value)
