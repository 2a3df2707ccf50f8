"""`foretune init`: a commented recipe to edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import Json, emit, emit_json
from foretune.errors import UserError

DEFAULT_FILE = "recipe.yaml"


def init(
    file: Annotated[Path, typer.Argument(help="File to write the recipe to.")] = Path(DEFAULT_FILE),
    template: Annotated[
        str, typer.Option(help="Template: choice, classification, causal-lm or arrays.")
    ] = "choice",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    json: Json = False,
) -> None:
    """Write a commented recipe to edit."""
    from foretune.recipes.templates import template_text

    text = template_text(template)
    _check_file(file, overwrite)
    file.parent.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() or c in "_.-" else "-" for c in file.stem)
    file.write_text(
        text.replace("name: my-run", f"name: {name}", 1).replace("THIS.yaml", str(file))
    )
    if json:
        emit_json({"recipe": str(file), "template": template})
        return
    emit(f"Wrote {file}. Set tasks.source, then: foretune plan {file}")


def _check_file(file: Path, overwrite: bool) -> None:
    if file.is_dir():
        raise UserError(f"{file} is a folder; name a file, such as {file / DEFAULT_FILE}")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists already; use --overwrite or another name")
