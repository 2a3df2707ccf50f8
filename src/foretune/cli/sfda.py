"""`foretune sfda`: prepare a source model, adapt it without labels, score it before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table
from foretune.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Adapt a classifier of windows to a target without labels and without source data.",
)
Rows = Annotated[
    str, typer.Option(help="Windows: .npz, .jsonl, .parquet, or AdaTime's folder of .pt.")
]
Domain = Annotated[str | None, typer.Option(help="Of several domains in the rows, this one.")]
Seed = Annotated[int, typer.Option(min=0, help="Seeds weights and the order of the rows.")]


@app.command()
def prepare(
    model: Annotated[str, typer.Argument(help='"new", or the folder of a base.')],
    rows: Rows = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder of the prepared model.")] = Path("prepared"),
    domain: Domain = None,
    rank_factor: Annotated[int, typer.Option(min=1, help="C channels get rank C // this.")] = 4,
    layers: Annotated[str, typer.Option(help="convolutions, linear or all.")] = "all",
    steps: Annotated[
        int | None, typer.Option(min=0, help="Training first: 300 for new, else 0.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Training of the factors.")] = 3,
    learning_rate: Annotated[float, typer.Option(help="Of both.")] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 32,
    imputer: Annotated[bool, typer.Option("--imputer", help="Train what loss=mapu needs.")] = False,
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a prepared model in the folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Put a source model into Tucker form and train its factors on labelled rows."""
    from foretune.run import check_one_of, check_positive

    check_positive("--learning-rate", learning_rate)
    check_one_of("--layers", layers, ("all", "convolutions", "linear"))
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.source_free.folders import prepare_folder

        result = prepare_folder(
            model,
            rows,
            out,
            domain=domain,
            rank_factor=rank_factor,
            layers=layers,
            steps=steps,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            imputer=imputer,
            seed=seed,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    names = ("as it was", f"rank factor {rank_factor}")
    lines = [
        [name, f"{p:,}", f"{m:,}", "-" if a is None else f"{a:.3f}"]
        for name, p, m, a in zip(
            names, result["parameters"], result["macs"], result["accuracy"], strict=True
        )
    ]
    emit(table(["model", "parameters", "MACs", "source accuracy"], lines))
    emit(f"Prepared: {out} ({result['core']:,} numbers in the cores)")


@app.command()
def adapt(
    prepared: Annotated[Path, typer.Argument(help="The prepared model's folder.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings, such as loss=nrc steps=200 (foretune show subspace-sfda).",
        ),
    ] = None,
    rows: Rows = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder of what changed.")] = Path("adapted"),
    domain: Domain = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Of the rows; all.")] = None,
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapted state in the folder.")
    ] = False,
    json: Json = False,
) -> None:
    """Tune the cores on rows of a target; labels are not read."""
    with quiet_stdout():
        from foretune.cli.progress import StderrConsole
        from foretune.source_free.folders import adapt_folder

        result = adapt_folder(
            prepared,
            rows,
            out,
            changes or [],
            domain=domain,
            max_rows=max_rows,
            seed=seed,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    emit(
        f"Adapted: {out} ({result['rows']} rows of {result['domain']}; {result['tuned']:,} of "
        f"{result['parameters']:,} numbers tuned, {result['bytes'] / 1000:.1f} kB)"
    )


@app.command("eval")
def evaluate(
    adapted: Annotated[Path, typer.Argument(help="The adapted state's folder.")],
    rows: Rows = ...,  # type: ignore[assignment]
    base: Annotated[Path | None, typer.Option(help="Prepared model; the one it names.")] = None,
    domain: Domain = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    report: Annotated[Path | None, typer.Option(help="HTML file with a picture.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report.")] = False,
    json: Json = False,
) -> None:
    """Accuracy and F1 of each class, before and after adapting, on labelled rows."""
    if report is not None and report.exists() and not overwrite:
        raise UserError(f"{report} exists: --overwrite replaces it")
    with quiet_stdout():
        from foretune.source_free.folders import eval_folder

        result: dict[str, Any] = eval_folder(
            adapted, rows, base=base, domain=domain, split=split, report=report
        )
    if json:
        emit_json(result)
        return
    from foretune.source_free.shift import shift_rows

    head = ["class", "rows", "F1 before", "F1 after", "difference"]
    emit(table(head, shift_rows(result["before"], result["after"])))
    if report is not None:
        emit(f"Report: {report}")
