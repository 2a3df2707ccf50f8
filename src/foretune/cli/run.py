"""`foretune run`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import (
    Json,
    Overrides,
    Overwrite,
    Resume,
    comparison_text,
    emit,
    emit_json,
    quiet_stdout,
)


def run(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (foretune ls) or a YAML file.")],
    changes: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder; the recipe's own by default.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Retrain, adapt to unseen tasks, compare, report."""
    from foretune.recipes.schema import load_recipe

    loaded = load_recipe(recipe, changes or [])
    if out is not None:
        loaded = loaded.model_copy(update={"out": str(out)})
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.runner import run_recipe

        comparison = run_recipe(loaded, resume=resume, overwrite=overwrite, console=StderrConsole())
    if json:
        emit_json({"out": str(loaded.folder), **comparison})
        return
    emit(comparison_text(comparison))
    emit(f"\nReport: {loaded.folder / 'report.html'}")
