"""`foretune compare` and `report`: compare bases on unseen tasks, and rebuild the report."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import (
    Json,
    Overwrite,
    Resume,
    TrustRemoteCode,
    comparison_text,
    emit,
    emit_json,
    quiet_stdout,
)
from foretune.errors import UserError
from foretune.files import COMPARISON_FILE, REPORT_FILE
from foretune.formats import COMPARISON, check_format
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
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Adapt bases to the same unseen tasks and compare their scores."""
    counts = parse_shots(shots)
    changes, folders = _changes_and_folders(bases)
    with quiet_stdout(), trusted_code(trust_remote_code):
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


def report(
    folder: Annotated[Path, typer.Argument(help="Folder with a comparison.json.")],
    json: Json = False,
) -> None:
    """Rebuild report.html from comparison.json."""
    comparison = _read_comparison(folder)
    with quiet_stdout():
        from foretune.evaluation.report import write_report

        written = write_report(comparison, folder)
    emit_json({"report": str(written)}) if json else emit(f"Report: {written}")


def parse_shots(text: str) -> list[int | None]:
    """Numbers of shots from `1,5,all`; None stands for all.

    Raises:
        UserError: A part is neither a number above 0 nor "all".

    >>> parse_shots("1,5,all")
    [1, 5, None]
    """
    counts: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        if word != "all" and not (word.isdigit() and int(word) > 0):
            raise UserError(
                f'--shots must be numbers above 0 or all, such as 1,5,all; got "{text}"'
            )
        counts.append(None if word == "all" else int(word))
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


def _read_comparison(folder: Path) -> dict[str, Any]:
    path = folder / COMPARISON_FILE
    if not path.is_file():
        raise UserError(f"no comparison in {folder}: it holds no {COMPARISON_FILE}")
    try:
        comparison = jsonlib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(comparison, dict) or not {"bases", "metric"} <= comparison.keys():
        raise UserError(f"{path} is not a comparison by foretune")
    check_format(path, comparison, COMPARISON)
    return comparison
