"""`foretune sfda`: prepare a source model, adapt it without labels, score it before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.claims import claim_file
from foretune.cli.output import Json, TrustRemoteCode, emit, emit_json, quiet_stdout, table
from foretune.models.trusted_code import trusted_code
from foretune.run import MAX_SEED

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Adapt a sensor classifier to an unlabelled target. Only the preparation needs "
    "source data.",
)
Rows = Annotated[
    str,
    typer.Option(
        help="Windows: a .npz, .jsonl or .parquet file, or an AdaTime folder of .pt files."
    ),
]
Domain = Annotated[str | None, typer.Option(help="Domain to use if the windows come from several.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]


@app.command()
def prepare(
    model: Annotated[str, typer.Argument(help='"new" for a new CNN, or the folder of a base.')],
    rows: Rows = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("prepared"),
    domain: Domain = None,
    rank_factor: Annotated[
        int, typer.Option(min=1, help="Rank reduction: C channels get rank C // RANK_FACTOR.")
    ] = 4,
    layers: Annotated[
        str, typer.Option(help="Layers to factorise: convolutions, linear or all.")
    ] = "all",
    steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Training steps before factorising (default: 300 for a new CNN, else 0)."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Training epochs after factorising.")] = 3,
    learning_rate: Annotated[
        float, typer.Option(help="Learning rate of both training stages.")
    ] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per batch.")] = 32,
    imputer: Annotated[
        bool, typer.Option("--imputer", help="Also train the imputer that loss=mapu needs.")
    ] = False,
    kernel_size: Annotated[
        int | None, typer.Option(min=1, help="new: kernel size of the first layer (default: 5).")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="new: stride of the first layer (default: 1).")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="new: channels of the first layer (default: 64).")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Samples per second, to notice targets at another rate.")
    ] = None,
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a prepared model in the output folder.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Factorise a source model and train it on labelled windows."""
    from foretune.run import check_one_of, check_positive

    check_positive("--learning-rate", learning_rate)
    check_one_of("--layers", layers, ("all", "convolutions", "linear"))
    options = {"kernel_size": kernel_size, "stride": stride, "mid": width}
    sizes = {name: value for name, value in options.items() if value is not None}
    with quiet_stdout(), trusted_code(trust_remote_code):
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
            sizes=sizes,
            rate=rate,
            seed=seed,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    names = ("original", f"rank factor {rank_factor}")
    lines = [
        [name, f"{p:,}", f"{m:,}", "-" if a is None else f"{a:.3f}"]
        for name, p, m, a in zip(
            names, result["parameters"], result["macs"], result["accuracy"], strict=True
        )
    ]
    emit(table(["model", "parameters", "MACs", "source accuracy"], lines))
    emit(f"Prepared: {out} ({result['core']:,} parameters in the cores)")


@app.command()
def adapt(
    prepared: Annotated[Path, typer.Argument(help="Folder of the prepared model.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings, such as loss=nrc steps=200 (see foretune show subspace-sfda).",
        ),
    ] = None,
    rows: Rows = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("adapted"),
    domain: Domain = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Use at most this many windows (default: all).")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Samples per second of these windows.")] = None,
    resample: Annotated[
        bool,
        typer.Option("--resample", help="Bring windows of another sampling rate to the source's."),
    ] = False,
    seed: Seed = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapted state in the output folder.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Tune the cores on windows of a target; labels are not read."""
    with quiet_stdout(), trusted_code(trust_remote_code):
        from foretune.cli.progress import StderrConsole
        from foretune.source_free.folders import adapt_folder

        result = adapt_folder(
            prepared,
            rows,
            out,
            changes or [],
            domain=domain,
            max_rows=max_rows,
            rate=rate,
            resample=resample,
            seed=seed,
            overwrite=overwrite,
            console=StderrConsole(),
        )
    if json:
        emit_json(result)
        return
    stretch = result["stretched"]
    resampled = "" if stretch == 1 else f", resampled to {stretch:.3g} times as many steps"
    emit(
        f"Adapted: {out} ({result['rows']} windows of {result['domain']}{resampled}; "
        f"{result['tuned']:,} of {result['parameters']:,} parameters tuned, "
        f"{result['bytes'] / 1000:.1f} kB)"
    )


@app.command("eval")
def evaluate(
    adapted: Annotated[Path, typer.Argument(help="Folder of the adapted state.")],
    rows: Rows = ...,  # type: ignore[assignment]
    base: Annotated[
        Path | None,
        typer.Option(help="Folder of the prepared model (default: the one recorded in ADAPTED)."),
    ] = None,
    domain: Domain = None,
    split: Annotated[str, typer.Option(help="Split to score: train, validation or test.")] = "test",
    report: Annotated[
        Path | None, typer.Option(help="HTML file to write a figure and a table to.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing report.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Score labelled windows before and after adapting, per class."""
    _check_report(report, overwrite, [adapted, rows, *([] if base is None else [base])])
    with quiet_stdout(), trusted_code(trust_remote_code):
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


def _check_report(report: Path | None, overwrite: bool, reads: list[Path | str]) -> None:
    if report is not None:
        claim_file(report, overwrite=overwrite, reads=reads)
