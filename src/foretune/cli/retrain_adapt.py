"""`foretune retrain` and `adapt`: the two stages of a run, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import (
    DTypeOption,
    Json,
    Overrides,
    Overwrite,
    QuantizeOption,
    Resume,
    TrustRemoteCode,
    emit,
    emit_json,
    quiet_stdout,
    table,
)
from foretune.errors import UserError
from foretune.models.precision import held_in
from foretune.models.trusted_code import trusted_code
from foretune.run import MAX_SEED


def retrain(
    recipe: Annotated[str, typer.Argument(help="Packaged recipe (see foretune ls) or YAML file.")],
    changes: Overrides = None,
    method: Annotated[
        str,
        typer.Option(
            help="Method: one of the recipe's, or any other retrain method with its defaults."
        ),
    ] = "peft-ml",
    out: Annotated[Path | None, typer.Option(help="Output folder (default: runs/METHOD).")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Retrain with one method and save the base as OUT/base."""
    from foretune.recipes.schema import load_recipe

    loaded = load_recipe(recipe, changes or [])
    folder = out if out is not None else Path("runs") / method
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.runner import retrain_one

        result = retrain_one(
            loaded,
            method,
            folder,
            resume=resume,
            overwrite=overwrite,
            reads=[recipe],
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    score = result["validation_score"]
    scored = "" if score is None else f" (mean validation score {score:.4f})"
    emit(f"Base: {result['base']}{scored}")


def adapt(
    base: Annotated[Path, typer.Argument(help="Folder of the base.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings of the adaptation, such as steps=100 lora.r=4 tasks.num_candidates=10. "
            "Without one that says how, the base is adapted as held-out tasks chose.",
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(help="New tasks: a file, a folder or a dataset.")] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path,
        typer.Option(
            help="Output folder; it gets one subfolder per task. New tasks join those in it."
        ),
    ] = Path("adapters"),
    shots: Annotated[
        int | None, typer.Option(min=1, help="Training examples per task (default: all).")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Random seed of the shots and the adapters.")
    ] = 0,
    objective: Annotated[
        str | None, typer.Option(help="Kind of objective, for a base that does not record one.")
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="Name of the base in adapter_config.json (default: its folder)."),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Adapt tasks again whose rows have changed; their earlier adapters are kept in "
            "the subfolder versions.",
        ),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Adapt only every N-th task by name, from the K-th on, in the folder OUT-K-of-N: "
            "one of N jobs that need no communication. merge-shards joins their folders.",
        ),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dtype: DTypeOption = "float32",
    quantize: QuantizeOption = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Adapt a base to new tasks and save one adapter per task."""
    from foretune.tasks.shard import Shard

    _check_one_of(replace, overwrite)
    part = None if shard is None else Shard.parse(shard)
    with quiet_stdout(), trusted_code(trust_remote_code), held_in(dtype, quantize):
        from foretune.cli.progress import StderrConsole
        from foretune.evaluation.wording import counted, listed, setting_phrase
        from foretune.recipes.on_folders import adapt_folder

        result = adapt_folder(
            base,
            tasks,
            out,
            changes or [],
            objective=objective,
            base_name=base_name,
            shots=shots,
            seed=seed,
            replace=replace,
            shard=part,
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
    elif not result["num_train"]:
        emit(f"Shard {shard} has no task: there are fewer tasks than shards.")
    else:
        emit("No task has test examples, so nothing was scored.")
    unscored = [task for task in result["num_train"] if task not in result["scores"]]
    if rows and unscored:
        emit(f"Not scored, without test examples: {', '.join(unscored)}")
    for row in result["adapting"]:
        emit(f"Adapted {setting_phrase(row)}: {counted(len(row['tasks']), 'task')}")
    for tasks_of, what in (
        ("there", "Already there, not adapted again"),
        ("replaced", "Adapted again"),
    ):
        names = result[tasks_of]
        if names:
            emit(f"{what}: {counted(len(names), 'task')} ({listed(names)})")
    for line in result["drawn"]:
        emit(f"Adapted on {line}")
    emit(f"Adapters: {result['out']}")
    if result["num_labels"] is not None and result["code"]:
        emit("The adapters have a head that the base lacks, or a wider one; load them like this:")
        emit("\n".join(result["code"]))


def _check_one_of(replace: bool, overwrite: bool) -> None:
    """Checks that an option keeps earlier adapters, or one removes them.

    Raises:
        UserError: Both are given.
    """
    if replace and overwrite:
        raise UserError("--replace keeps the other tasks and --overwrite removes them: choose one")
