"""`foretune run`: all stages of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    table,
)

if TYPE_CHECKING:
    from foretune.theory.recipe import TheoryRecipe


def run(
    recipe: Annotated[str, typer.Argument(help="Packaged recipe (see foretune ls) or YAML file.")],
    changes: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder (default: the one in the recipe).")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Run a recipe: retrain, adapt, compare and report.

    Every method of the recipe retrains the base on the seen tasks. The bases are adapted to the
    unseen tasks, and the report compares their scores. An experiment recipe runs its experiment.
    """
    from foretune.theory.recipe import TheoryRecipe, load_any

    loaded = load_any(recipe, changes or [])
    if out is not None:
        loaded = loaded.model_copy(update={"out": str(out)})
    if isinstance(loaded, TheoryRecipe):
        _run_experiment(loaded, resume, overwrite, json)
        return
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.on_folders import adapt_command
        from foretune.recipes.runner import run_recipe

        comparison = run_recipe(loaded, resume=resume, overwrite=overwrite, console=StderrConsole())
    if json:
        emit_json({"out": str(loaded.folder), **comparison})
        return
    emit(comparison_text(comparison))
    emit(f"\nReport: {loaded.folder / 'report.html'}")
    emit(f"To adapt to new tasks in the same way: {adapt_command(loaded, comparison)}")


def _run_experiment(recipe: TheoryRecipe, resume: bool, overwrite: bool, json: bool) -> None:
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.theory.experiment import tables
        from foretune.theory.recipe import run_theory

        result = run_theory(recipe, resume=resume, overwrite=overwrite, console=StderrConsole())
    if json:
        emit_json({"out": str(recipe.folder), **result})
        return
    for panel, cells, finding in tables(result):
        emit(f"{panel.title}\n\n{table(cells.header, cells.rows)}\n\n{finding}\n")
    emit(f"Tables, figures and the paper's statements: {recipe.folder / 'README.md'}")
