"""`foretune init`: a commented recipe to edit."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from foretune.claims import claim_file
from foretune.cli.output import Json, emit, emit_json
from foretune.files import write_whole

DEFAULT_FILE = "recipe.yaml"


def init(
    file: Annotated[Path, typer.Argument(help="File to write the recipe to.")] = Path(DEFAULT_FILE),
    template: Annotated[
        str | None,
        typer.Option(
            help="Template: choice, classification, causal-lm, chat, preference or arrays "
            "(default: the one that fits --data, or choice)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Your rows: a file, a folder or a dataset. Template, columns, and numbers that "
            "fit them are filled in."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe to edit."""
    from foretune.recipes.templates import template_text

    text = template_text(template or "choice")
    claim_file(file, overwrite=overwrite)
    reading = None
    if data is not None:
        from foretune.recipes.data_reading import fill, read_data

        reading = read_data(data, template)
        text = fill(template_text(reading.template), data, reading)
    name = "".join(c if c.isalnum() or c in "_.-" else "-" for c in file.stem)
    write_whole(
        file, text.replace("name: my-run", f"name: {name}", 1).replace("THIS.yaml", str(file))
    )
    if json:
        fields = {} if reading is None else asdict(reading)
        emit_json({"recipe": str(file), "template": template or "choice", **fields})
        return
    if reading is None:
        emit(f"Wrote {file}. Set tasks.source, then: foretune plan {file}")
        return
    renamed = "".join(f", {old} as {new}" for old, new in reading.columns.items())
    emit(
        f"{data}: {reading.num_tasks} tasks by {reading.task_column}, {reading.rows_per_task:g} "
        f"rows each (median){renamed}. Template {reading.template}, tasks.unseen "
        f"{reading.unseen}, adapt.shots {', '.join(map(str, reading.shots))}"
    )
    emit(f"Wrote {file}. Next: foretune plan {file}")
