"""`foretune forecast`: pretrain, adapt and evaluate a forecaster of trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Forecasts of trajectories: a Forecast-MAE, adapted to new scenes by Forecast-PEFT.",
)
Scenes = Annotated[
    Path, typer.Option(help="Scenes: .npz, .parquet, tracks (.txt), a folder of them, Argoverse 2.")
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings, such as steps=500 learning_rate=1e-3."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


@app.command()
def pretrain(
    changes: Changes = None,
    scenes: Scenes = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The model's folder.")] = Path("forecast-mae"),
    seed: Seed = 0,
    overwrite: Replace = False,
    json: Json = False,
) -> None:
    """Pretrain a Forecast-MAE: hidden histories, futures and lanes are predicted from the rest."""
    from foretune.forecasting.folders import pretraining

    asked = pretraining(changes or [], seed)
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.forecasting.folders import pretrain_folder

        result = pretrain_folder(asked, scenes, out, overwrite=overwrite, console=StderrConsole())
    if json:
        emit_json(result)
        return
    loss = result["validation_loss"]
    known = "" if loss is None else f", validation loss {loss:.3f}"
    emit(
        f"Model: {result['out']} ({result['parameters']:,} parameters, {result['scenes']} scenes "
        f"of {result['tasks']} tasks{known})"
    )


@app.command()
def adapt(
    base: Annotated[Path, typer.Argument(help="A pretrained model's folder.")],
    changes: Changes = None,
    scenes: Scenes = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder; one folder a task.")] = Path("forecasters"),
    method: Annotated[str, typer.Option(help="forecast-peft, or full: an MLP head.")] = (
        "forecast-peft"
    ),
    shots: Annotated[int | None, typer.Option(min=1, help="Scenes of each task; all.")] = None,
    seed: Seed = 0,
    overwrite: Replace = False,
    json: Json = False,
) -> None:
    """Adapt a pretrained model to each task of the scenes."""
    from foretune.forecasting.folders import adapting

    record, run = adapting(method, changes or [], seed)
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
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    rows = [[task, f"{score:.2f}"] for task, score in result["minFDE"].items()]
    if rows:
        emit(table(["task", "minFDE (m)"], rows))
    emit(f"{result['out']}: {result['cost']['trainable_parameters']:,} parameters of each task")


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="A folder of adapt, or a model that forecasts.")],
    scenes: Scenes = ...,  # type: ignore[assignment]
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    base: Annotated[Path | None, typer.Option(help="The pretrained model, if it moved.")] = None,
    out: Annotated[Path | None, typer.Option(help="An HTML page with pictures.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Scenes of each task on it.")] = 4,
    overwrite: Replace = False,
    json: Json = False,
) -> None:
    """Measure forecasts (minADE, minFDE, miss rate) beside constant velocity; draw them."""
    from foretune.run import check_one_of

    check_one_of("--split", split, ("train", "validation", "test"))
    with quiet_stdout():
        from foretune.forecasting.folders import evaluate_folder

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
    rows = result["rows"]
    cells = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    emit(table(list(rows[0]), cells))
    if result["page"] is not None:
        emit(f"Pictures: {result['page']}")
