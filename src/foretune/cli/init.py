"""`foretune init`: a commented recipe to edit."""

from __future__ import annotations

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
        str,
        typer.Option(
            help="Template: choice, classification, causal-lm, chat, preference or arrays."
        ),
    ] = "choice",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe to edit."""
    from foretune.recipes.templates import template_text

    text = template_text(template)
    claim_file(file, overwrite=overwrite)
    name = "".join(c if c.isalnum() or c in "_.-" else "-" for c in file.stem)
    write_whole(
        file, text.replace("name: my-run", f"name: {name}", 1).replace("THIS.yaml", str(file))
    )
    if json:
        emit_json({"recipe": str(file), "template": template})
        return
    emit(f"Wrote {file}. Set tasks.source, then: foretune plan {file}")
