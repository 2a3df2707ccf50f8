"""`foretune compare` and `report`: compare bases on unseen tasks, and rebuild the report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from annotated_types import MinLen
from typing_extensions import TypedDict

from foretune.cli.output import (
    DTypeOption,
    Json,
    Overwrite,
    QuantizeOption,
    Resume,
    TrustRemoteCode,
    advice_text,
    comparison_text,
    emit,
    emit_json,
    quiet_stdout,
)
from foretune.errors import UserError
from foretune.files import COMPARISON_FILE, REPORT_FILE
from foretune.formats import COMPARISON, damage_named, read_json, shortened, stamped
from foretune.models.precision import held_in
from foretune.models.trusted_code import trusted_code


def compare(
    bases: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE... [KEY=VALUE]...",
            help="Folders of bases, and settings of the adaptation such as steps=100 lora.r=4.",
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Unseen tasks: a file, a folder or a dataset.")] = ...,  # type: ignore[assignment]
    shots: Annotated[
        str, typer.Option(help="Training examples per task, such as 1,5,all.")
    ] = "1,5,20",
    seeds: Annotated[int, typer.Option(min=1, help="Number of random draws of the shots.")] = 1,
    objective: Annotated[
        str | None, typer.Option(help="Kind of objective, for bases that do not record one.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/compare"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    dtype: DTypeOption = "float32",
    quantize: QuantizeOption = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Adapt bases to the same unseen tasks and compare scores."""
    counts = parse_shots(shots)
    changes, folders = _changes_and_folders(bases)
    with quiet_stdout(), trusted_code(trust_remote_code), held_in(dtype, quantize):
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.on_folders import compare_folders

        comparison = compare_folders(
            folders,
            tasks,
            out,
            changes,
            shots=counts,
            draws=seeds,
            objective=objective,
            resume=resume,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json({"out": str(out), **comparison})
        return
    emit(comparison_text(comparison))
    emit(f"\nReport: {out / REPORT_FILE}")
    emit(advice_text(comparison, out))


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with a comparison.json.")],
    json: Json = False,
) -> None:
    """Rebuild report.html from comparison.json."""
    path = folder / COMPARISON_FILE
    comparison = read_comparison(path)
    with quiet_stdout(loads_torch=False), damage_named(path):
        from foretune.evaluation.report import write_report

        written = write_report(comparison, folder)
    emit_json({"report": str(written)}) if json else emit(f"Report: {written}")


def parse_shots(text: str) -> list[int | None]:
    """Numbers of shots from `1,5,all`; None stands for all.

    Raises:
        UserError: A part is neither a number above 0 nor "all", or two are equal.

    >>> parse_shots("1,5,all")
    [1, 5, None]
    """
    counts: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        if word != "all" and not re.fullmatch("[1-9][0-9]{0,8}", word):
            raise UserError(
                "--shots must be numbers from 1 to 999999999 or all, such as 1,5,all; got "
                f"{shortened(text)}"
            )
        counts.append(None if word == "all" else int(word))
    if len({*counts}) < len(counts):
        raise UserError(f"--shots must be numbers that differ, got {shortened(text)}")
    return counts


def _changes_and_folders(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """(settings, folders of bases) of the command line.

    Raises:
        UserError: No folder is given.
    """
    from foretune.recipes.overrides import split_arguments

    changes, folders = split_arguments(arguments)
    if not folders:
        raise UserError("compare needs the folder of at least one base")
    return changes, [Path(folder) for folder in folders]


class _Comparison(TypedDict):
    """The parts of a comparison that a report needs; others are kept."""

    __pydantic_config__ = {"extra": "allow"}  # type: ignore[misc]  # noqa: RUF012

    metric: dict[str, Any]
    adapt: dict[str, Any]
    bases: Annotated[list[dict[str, Any]], MinLen(1)]
    scores: Annotated[list[dict[str, Any]], MinLen(1)]
    means: Annotated[list[dict[str, Any]], MinLen(1)]
    pairs: list[dict[str, Any]]
    verdict: dict[str, Any]


def read_comparison(path: Path) -> dict[str, Any]:
    """The content of a `comparison.json`.

    Raises:
        UserError: There is none, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"no comparison in {path.parent}: it holds no {COMPARISON_FILE}")
    return stamped(read_json(path, _Comparison, COMPARISON), COMPARISON)
