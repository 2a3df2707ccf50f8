"""`foretune forecast`: pretrain, adapt and evaluate a trajectory forecaster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table
from foretune.run import MAX_SEED

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Pretrain, adapt and evaluate forecasters of trajectories.",
)
Scenes = Annotated[
    Path,
    typer.Option(
        help="Scenes: .npz, .parquet, tracks (.csv, .txt), or a folder of tracks or of Argoverse 2."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings, such as steps=500 learning_rate=1e-3."
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]


@app.command()
def pretrain(
    changes: Changes = None,
    scenes: Scenes = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder of the pretrained model.")] = (
        Path("forecast-mae")
    ),
    seed: Seed = 0,
    overwrite: Replace = False,
    json: Json = False,
) -> None:
    """Pretrain a Forecast-MAE to predict hidden histories, futures and lanes from visible ones."""
    from foretune.forecasting.folders import pretrain_settings

    settings = pretrain_settings(changes or [], seed)
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.forecasting.folders import pretrain_folder

        result = pretrain_folder(
            settings, scenes, out, overwrite=overwrite, console=StderrConsole()
        )
    if json:
        emit_json(result)
        return
    _emit_notes(result)
    num_tasks, loss = result["tasks"], result["validation_loss"]
    validation = "" if loss is None else f", validation loss {loss:.3f}"
    emit(
        f"Model: {result['out']} ({result['parameters']:,} parameters, {result['scenes']} scenes "
        f"of {num_tasks} task{'' if num_tasks == 1 else 's'}{validation})"
    )


@app.command()
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of a Forecast-MAE that its authors' code pretrained.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the pretrained model.")] = (
        Path("forecast-mae")
    ),
    num_heads: Annotated[
        int, typer.Option(min=1, help="Attention heads, which the file does not show.")
    ] = 8,
    overwrite: Replace = False,
    json: Json = False,
) -> None:
    """Convert a checkpoint of Forecast-MAE's authors to a pretrained model."""
    with quiet_stdout():
        from foretune.forecasting.folders import convert_checkpoint

        result = convert_checkpoint(checkpoint, out, num_heads=num_heads, overwrite=overwrite)
    emit_json(result) if json else emit(f"Model: {out} ({result['parameters']:,} parameters)")


@app.command()
def adapt(
    base: Annotated[Path, typer.Argument(help="Folder of the pretrained model.")],
    changes: Changes = None,
    scenes: Scenes = ...,  # type: ignore[assignment]
    out: Annotated[
        Path, typer.Option(help="Folder of the adapted forecasters, with one folder per task.")
    ] = Path("forecasters"),
    method: Annotated[
        str,
        typer.Option(help="forecast-peft, or full: fine-tune the whole encoder with an MLP head."),
    ] = "forecast-peft",
    shots: Annotated[
        int | None, typer.Option(min=1, help="Training scenes per task (default: all).")
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Judge a forecaster by the best of its K likeliest futures (default: of all); "
            "1 where a single forecast is used.",
        ),
    ] = None,
    seed: Seed = 0,
    overwrite: Replace = False,
    json: Json = False,
) -> None:
    """Adapt a pretrained model to each task, if it beats constant velocity on held-out scenes.

    Without steps=N, a task trains until its held-out scenes get no better.
    """
    from foretune.forecasting.folders import adapt_settings

    record, run = adapt_settings(method, changes or [], seed)
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.forecasting.folders import adapt_folder

        result = adapt_folder(
            base,
            record,
            run,
            scenes,
            out,
            shots=shots,
            best_of=best_of,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    rows = [
        [task, *(_metres(held[k]) for k in ("minFDE", "constant_velocity")), held["chosen"]]
        for task, held in result["held_out"].items()
    ]
    emit(table(["task, held-out scenes", "minFDE (m)", "constant velocity", "chosen"], rows))
    _emit_notes(result)
    emit(f"{result['out']}: {result['cost']['trainable_parameters']:,} trained parameters per task")


def _emit_notes(result: dict[str, Any]) -> None:
    for note in result["notes"]:
        emit(note)


def _metres(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


@app.command("eval")
def evaluate(
    model: Annotated[
        Path,
        typer.Argument(
            help="Folder written by forecast adapt, or of a single model that can forecast."
        ),
    ],
    scenes: Scenes = ...,  # type: ignore[assignment]
    split: Annotated[
        str, typer.Option(help="Split to evaluate on: train, validation or test.")
    ] = "test",
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the pretrained model, if it moved since adapting."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML page to write, with the table and pictures.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Number of scenes per task to draw on the page.")
    ] = 4,
    overwrite: Replace = False,
    json: Json = False,
) -> None:
    """Evaluate forecasts (minADE, minFDE, miss rate) against constant velocity; draw them."""
    from foretune.run import check_one_of

    check_one_of("--split", split, ("train", "validation", "test"))
    with quiet_stdout():
        from foretune.forecasting.evaluating import evaluate_folder

        result = evaluate_folder(
            model,
            scenes,
            split=split,
            base=base,
            page=out,
            pictures=pictures,
            overwrite=overwrite,
        )
    if json:
        emit_json(result)
        return
    rows = [{k: v for k, v in row.items() if k != "chosen"} for row in result["rows"]]
    cells = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    emit(table(list(rows[0]), cells))
    _emit_notes(result)
    if result["page"] is not None:
        emit(f"Pictures: {result['page']}")
