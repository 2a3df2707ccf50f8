"""`foretune retrain` and `adapt`: the two halves of a run, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import (
    Json,
    Overrides,
    Overwrite,
    Resume,
    emit,
    emit_json,
    quiet_stdout,
    table,
)


def retrain(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (foretune ls) or a YAML file.")],
    changes: Overrides = None,
    method: Annotated[
        str, typer.Option(help="One of the recipe's methods, or another that retrains, as it is.")
    ] = "peft-ml",
    out: Annotated[Path | None, typer.Option(help="Folder; runs/METHOD by default.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Retrain with one method; the base is in OUT/base."""
    from foretune.recipes.schema import load_recipe

    loaded = load_recipe(recipe, changes or [])
    folder = out if out is not None else Path("runs") / method
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.runner import retrain_one

        result = retrain_one(
            loaded, method, folder, resume=resume, overwrite=overwrite, console=StderrConsole()
        )
    if json:
        emit_json(result)
        return
    score = result["validation_score"]
    known = "" if score is None else f" (mean validation score {score:.4f})"
    emit(f"Base: {result['base']}{known}")


def adapt(
    base: Annotated[Path, typer.Argument(help="A base's folder.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings, such as steps=100 lora.r=4 tasks.num_candidates=10.",
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="New tasks: a file, a folder, a dataset.")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder; one adapter folder a task.")] = Path(
        "adapters"
    ),
    shots: Annotated[int | None, typer.Option(min=1, help="Rows of each task; all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds shots and adapters.")] = 0,
    objective: Annotated[
        str | None, typer.Option(help="Kind of objective, for a base that does not say.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Adapt a base to new tasks; one PEFT folder for each."""
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.on_folders import adapt_folder

        result = adapt_folder(
            base,
            tasks,
            out,
            changes or [],
            objective=objective,
            shots=shots,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    rows = [[task, f"{score:.3f}"] for task, score in result["scores"].items()]
    if rows:
        emit(table(["task", result["metric"]], [*rows, ["mean", f"{result['mean']:.3f}"]]))
    else:
        emit("No task has test rows: nothing was scored.")
    emit(f"Adapters: {out}")
    if result["num_labels"] is not None:
        emit("A task has more labels than the base's head has outputs, so load them like this:")
        emit("\n".join(result["code"]))
