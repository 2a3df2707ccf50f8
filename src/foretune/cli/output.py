"""What commands print: results on stdout; and the options that several commands share."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.models.precision import DType, Quantize
from foretune.printable import printable, printable_json
from foretune.processes import process_rank

NARROW = 80  # columns of a narrow terminal, and where there is none
SENTENCE = 40  # columns from which on a cell is wrapped

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in the output folder.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")
]
AllowUnverified = Annotated[
    bool,
    typer.Option(
        "--allow-unverified",
        help="Take adapters that do not record their base, as those that PEFT wrote.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Changes to the recipe, such as retrain.steps=100."
    ),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with a model or is named beside it."
    ),
]
DTypeOption = Annotated[
    DType,
    typer.Option("--dtype", help="Dtype of the model's weights and of what is computed with them."),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        "--quantize",
        help="Hold the model's linear layers in 4 bits (nf4) or 8 bits (int8) while adapters are "
        "trained or used; needs bitsandbytes.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, mps.")
]


def emit(value: Any) -> None:
    """Prints a result; of several processes only the first prints."""
    if process_rank() == 0:
        print(printable(str(value)))


def emit_json(value: Any) -> None:
    """Prints a result as JSON."""
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=1, ensure_ascii=ascii_only, allow_nan=False, default=_plain)
    if process_rank() == 0:
        print(printable_json(text))


@contextlib.contextmanager
def quiet_stdout(*, loads_torch: bool = True) -> Iterator[None]:
    """Sends what libraries and the user's code print to stderr: stdout is for results.

    Args:
        loads_torch: Whether what follows loads PyTorch, which is then said.
    """
    if loads_torch and "torch" not in sys.modules and process_rank() == 0:
        print("loading PyTorch", file=sys.stderr, flush=True)  # which takes seconds
    with contextlib.redirect_stdout(sys.stderr):
        yield


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned columns of text, numeric columns to the right.

    Where they are wider than the terminal, or 80 columns, headers and columns of sentences are
    wrapped, and what is still too wide follows below, after the first column once more.

    >>> print(table(["base", "score"], [["none", 0.5]]))
    base  score
    none    0.5
    """
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    columns = range(len(header))
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) or _numeral(row[i]) for row in rows)
        for i in columns
    ]
    terminal = max(NARROW, shutil.get_terminal_size().columns)
    widths = [max(_length(row[i]) for row in cells) for i in columns]
    if _width(widths) > terminal:
        words = [max(map(_length, title.split()), default=0) for title in cells[0]]
        widths = [max([words[i], *(_length(row[i]) for row in cells[1:])]) for i in columns]
        for i in sorted(columns, key=widths.__getitem__, reverse=True):
            if widths[i] > SENTENCE:
                rest = _width(widths) - widths[i]
                widths[i] = max(min(widths[i], terminal - rest), SENTENCE)
    blocks, block = [], [0]
    for i in columns[1:]:
        if len(block) > 1 and _width([widths[j] for j in [*block, i]]) > terminal:
            blocks.append(block)
            block = [0]
        block.append(i)
    return "\n\n".join(
        "\n".join(line for row in cells for line in _wrapped(row, block, widths, numeric))
        for block in [*blocks, block]
    )


def _length(text: str) -> int:
    """Columns of a terminal that a text takes: two for a Chinese character, none for an accent."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _wrapped(
    row: Sequence[str], block: Sequence[int], widths: Sequence[int], numeric: Sequence[bool]
) -> Iterator[str]:
    """The lines of some columns of a row, each cell wrapped to the width of its column."""
    columns = [
        textwrap.wrap(row[i], widths[i], break_long_words=False, break_on_hyphens=False)
        if _length(row[i]) > widths[i]
        else [row[i]]
        for i in block
    ]
    for cells in itertools.zip_longest(*columns, fillvalue=""):
        aligned = []
        for i, cell in zip(block, cells, strict=True):
            blanks = " " * (widths[i] - _length(cell))
            aligned.append(blanks + cell if numeric[i] else cell + blanks)
        yield "  ".join(aligned).rstrip()


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """The table, the verdict and the choices of a comparison as text."""
    from foretune.evaluation.forgetting_text import forgetting_rows, forgetting_sentences
    from foretune.evaluation.report import summary_rows
    from foretune.evaluation.wording import choice_sentences, edge_sentences

    bases = comparison["bases"]
    sentences = [comparison["verdict"]["sentence"], *choice_sentences(bases)]
    sentences += edge_sentences(bases)
    forgetting = comparison.get("forgetting")
    if forgetting is not None:
        labels = {base["name"]: base["label"] for base in comparison["bases"]}
        for measure in forgetting["measures"]:
            header, *rows = forgetting_rows(measure, labels)
            sentences.append(table(header, rows))
        sentences.append("\n".join(forgetting_sentences(forgetting["measures"], labels)))
    return "\n\n".join([table(*summary_rows(comparison)), *sentences])


def advice_text(comparison: Mapping[str, Any], folder: Path) -> str:
    """What to do with the result of a comparison, as its report says it."""
    from foretune.evaluation.report.advice import advice

    return "\n".join(f"\n{step.text}" for step in advice(comparison, folder))


def _numeral(cell: object) -> bool:
    return str(cell)[:1].isdigit() or str(cell) in ("-", "")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
