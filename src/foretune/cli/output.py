"""Results on stdout, progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.processes import process_rank

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what was begun in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Empty the folder first.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as retrain.steps=100."),
]


def emit(value: Any) -> None:
    """A result as text: a line, or lines. Of several processes the first says it."""
    if process_rank() == 0:
        print(value)


def emit_json(value: Any) -> None:
    """A result for machines."""
    emit(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False, default=_plain))


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Sends what libraries and the user's model file print to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of text: the first to the left, numbers to the right.

    >>> print(table(["base", "score"], [["none", 0.5]]))
    base  score
    none    0.5
    """
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) or _numeral(row[i]) for row in rows)
        for i in range(len(header))
    ]
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    )
    return "\n".join(lines)


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """The table and the verdict of a comparison, for a terminal."""
    from foretune.evaluation.report import summary_rows
    from foretune.evaluation.wording import choice_sentences

    said = [comparison["verdict"]["sentence"], *choice_sentences(comparison["bases"])]
    return "\n\n".join([table(*summary_rows(comparison)), *said])


def _numeral(cell: object) -> bool:
    return str(cell)[:1].isdigit() or str(cell) in ("-", "")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"no JSON for {type(value).__name__}")
