"""`foretune run`: all stages of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretune.cli.output import (
    Json,
    Overrides,
    Overwrite,
    Resume,
    advice_text,
    comparison_text,
    emit,
    emit_json,
    quiet_stdout,
    table,
)
from foretune.entry_points import entry_point
from foretune.errors import UserError
from foretune.files import CARD_FILE, REPORT_FILE

if TYPE_CHECKING:
    from foretune.recipes.schema import Experiment


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
    from foretune.recipes.schema import AFTER_A_RUN, Recipe, load_any

    loaded = load_any(recipe, changes or [])
    if out is not None:
        loaded = loaded.model_copy(update={"out": str(out)})
    if not isinstance(loaded, Recipe):
        _run_experiment(loaded, resume, overwrite, json)
        return
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.runner import run_recipe

        comparison = run_recipe(
            loaded, resume=resume, overwrite=overwrite, reads=[recipe], console=StderrConsole()
        )
        answers: list[dict[str, Any]] = []
        if loaded.answers:
            try:
                answers = entry_point(AFTER_A_RUN["answers"])(loaded, comparison, StderrConsole())
            except UserError as error:  # the results of the run stand
                StderrConsole().say(f"no answers: {error}")
    if json:
        shown = {"answers": answers} if loaded.answers else {}
        emit_json({"out": str(loaded.folder), **comparison, **shown})
        return
    emit(comparison_text(comparison))
    for answer in answers:
        emit(_answer_text(answer, loaded.model.name))
    emit(f"\nReport: {loaded.folder / REPORT_FILE}")
    emit(advice_text(comparison, loaded.folder))


def _answer_text(answer: dict[str, Any], model: str | None) -> str:
    """A question, and the answers to it."""
    rows = [
        [f"{answer['task']} was asked", answer["question"][-1]["content"]],
        ["and said", answer["reference"]],
        [f"{model} says", answer["before"]],
        [f"with the adapter of {answer['task']}", answer["adapted"]],
    ]
    width = max(len(label) for label, _ in rows)
    return "\n" + "\n".join(f"{label:{width}}  {' '.join(text.split())}" for label, text in rows)


def _run_experiment(experiment: Experiment, resume: bool, overwrite: bool, json: bool) -> None:
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole

        result = experiment.run(resume=resume, overwrite=overwrite, console=StderrConsole())
    if json:
        emit_json({"out": str(experiment.folder), **result})
        return
    for title, header, rows, finding in experiment.tables(result):
        emit(f"{title}\n\n{table(header, rows)}\n\n{finding}\n")
    emit(f"Tables, figures and the paper's statements: {experiment.folder / CARD_FILE}")
