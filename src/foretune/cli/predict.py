"""`foretune predict`: answers of adapters to new rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.claims import claim_file
from foretune.cli.output import (
    AllowUnverified,
    DTypeOption,
    Json,
    QuantizeOption,
    TrustRemoteCode,
    emit,
    emit_json,
    quiet_stdout,
)
from foretune.models.precision import held_in
from foretune.models.trusted_code import trusted_code


def predict(
    base: Annotated[
        Path, typer.Argument(help="The base: a folder, a GGUF file, minilm or smollm2.")
    ],
    adapters: Annotated[
        Path,
        typer.Argument(
            help="An adapter, which answers all rows, or a folder of adapters: each row then names "
            "its task."
        ),
    ],
    rows: Annotated[Path, typer.Argument(help="File of rows without answers.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="How the rows are read, such as tasks.columns.body=text or "
            "tasks.task_column=customer.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output file: .jsonl, .csv, .tsv or .parquet (default: JSON lines)."),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="Kind of objective, for a base that does not record one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Largest length of an answer that is a text.")
    ] = 64,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output file of earlier predictions.")
    ] = False,
    dtype: DTypeOption = "float32",
    quantize: QuantizeOption = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_unverified: AllowUnverified = False,
    json: Json = False,
) -> None:
    """Predict labels, candidates or texts for new rows."""
    from foretune.recipes.on_folders import rows_source
    from foretune.recipes.questions import has_predictions
    from foretune.tasks.writers import check_suffix, json_line, plain, write_rows

    source = rows_source(str(rows), changes or [])
    if out is not None:
        check_suffix(out)
        marks = [b""] if overwrite and has_predictions(out) else []
        claim_file(out, overwrite=overwrite, reads=[base, adapters, rows], marks=marks)
    with quiet_stdout(), trusted_code(trust_remote_code), held_in(dtype, quantize):
        from foretune.cli.progress import StderrConsole
        from foretune.recipes.predict import predict_rows

        predicted = predict_rows(
            base,
            adapters,
            source,
            objective=objective,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            allow_unverified=allow_unverified,
            console=StderrConsole(),
        )
        if out is not None:
            write_rows(out, predicted)
    if json:
        emit_json({"rows": plain(predicted), "out": None if out is None else str(out)})
    elif out is not None:
        emit(f"Predictions: {out}")
    else:
        emit("\n".join(map(json_line, predicted)))
