"""`foretune compare` and `report`: which base is better, and the page that says so."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import (
    Json,
    Overwrite,
    Resume,
    comparison_text,
    emit,
    emit_json,
    quiet_stdout,
)
from foretune.errors import UserError


def compare(
    bases: Annotated[
        list[str],
        typer.Argument(
            metavar="BASE... [KEY=VALUE]...",
            help="Folders of bases; settings of the adaptation, such as steps=100 lora.r=4.",
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Unseen tasks: a file, a folder, a dataset.")] = ...,  # type: ignore[assignment]
    shots: Annotated[str, typer.Option(help="Rows of each task, such as 1,5,all.")] = "1,5,20",
    seeds: Annotated[int, typer.Option(min=1, help="Draws of the shots.")] = 1,
    objective: Annotated[
        str | None, typer.Option(help="Kind of objective, for bases that do not say.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/compare"),
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Adapt bases to the same unseen tasks, say which is better."""
    folders = [Path(item) for item in bases if "=" not in item]
    changes = [item for item in bases if "=" in item]
    counts = parse_shots(shots)
    if not folders:
        raise UserError("compare needs at least one base's folder")
    with quiet_stdout():
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
    emit(f"\nReport: {out / 'report.html'}")


def report(
    folder: Annotated[Path, typer.Argument(help="A folder with a comparison.json.")],
    json: Json = False,
) -> None:
    """Build report.html again from comparison.json."""
    path = folder / "comparison.json"
    if not path.is_file():
        raise UserError(f"no comparison in {folder}: it holds no comparison.json")
    try:
        comparison = jsonlib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(comparison, dict) or comparison.get("format") != 1:
        raise UserError(f"{path} is no comparison of format 1")
    with quiet_stdout():
        from foretune.evaluation.report import write_report

        written = write_report(comparison, folder)
    emit_json({"report": str(written)}) if json else emit(f"Report: {written}")


def parse_shots(text: str) -> list[int | None]:
    """Numbers of rows from `1,5,all`; None stands for all.

    >>> parse_shots("1,5,all")
    [1, 5, None]
    """
    counts: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        if word != "all" and not (word.isdigit() and int(word) > 0):
            raise UserError(f'--shots wants numbers of rows such as 1,5,20 or all, got "{text}"')
        counts.append(None if word == "all" else int(word))
    return counts
