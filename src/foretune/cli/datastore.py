"""`foretune datastore`: build, tune, evaluate and query a store of references for RTD."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import (
    AllowUnverified,
    DeviceOption,
    DTypeOption,
    Json,
    QuantizeOption,
    TrustRemoteCode,
    emit,
    emit_json,
    quiet_stdout,
    table,
)
from foretune.formats import shortened_text
from foretune.models.precision import held_in
from foretune.models.trusted_code import trusted_code
from foretune.run import MAX_SEED, check_device_name

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Build, tune, evaluate and query a store of references for RTD.",
)
Source = Annotated[str, typer.Option(help="Rows: a file, a folder or a dataset; see docs/data.md.")]
Task = Annotated[str | None, typer.Option(help="Use only rows of this task.")]
Split = Annotated[str | None, typer.Option(help="Use only rows of this split.")]
Store = Annotated[Path, typer.Argument(help="Folder of the store.")]


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or a PEFT folder.")],
    rows: Source = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="Folder to write the store to.")] = Path("store"),
    task: Task = None,
    split: Split = None,
    heads: Annotated[
        int, typer.Option(min=1, help="Number of slices of each state, looked up separately.")
    ] = 1,
    permute_options: Annotated[
        bool, typer.Option(help="Read rows with candidates once per rotation of these.")
    ] = True,
    key_type: Annotated[
        str, typer.Option(help="Type of the states: float32, float16 or bfloat16.")
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing store.")
    ] = False,
    dtype: DTypeOption = "float32",
    quantize: QuantizeOption = None,
    device: DeviceOption = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_unverified: AllowUnverified = False,
    json: Json = False,
) -> None:
    """Run a model on rows and store its states."""
    from foretune.run import check_one_of

    check_device_name("--device", device)
    check_one_of("--key-type", key_type, ("float32", "float16", "bfloat16"))
    with quiet_stdout(), trusted_code(trust_remote_code), held_in(dtype, quantize, device):
        from foretune.decoding.datastore_folders import build_folder

        result = build_folder(
            model,
            rows,
            out,
            task=task,
            split=split,
            heads=heads,
            permute_options=permute_options,
            key_type=key_type,
            overwrite=overwrite,
            allow_unverified=allow_unverified,
        )
    if json:
        emit_json(result)
        return
    labels = f", {len(result['labels'])} labels" if result["labels"] else ""
    emit(
        f"Store: {result['out']} ({result['entries']} entries of {result['rows']} rows{labels}, "
        f"{result['megabytes']:.1f} MB)"
    )


@app.command()
def tune(
    store: Store,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Slices per state (default: the store's).")
    ] = None,
    sample: Annotated[int, typer.Option(min=2, help="Number of entries to predict.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed of that sample.")] = 0,
    json: Json = False,
) -> None:
    """Choose neighbours, temperature and mix by leaving out one row of the store at a time."""
    with quiet_stdout():
        from foretune.decoding.datastore_folders import tune_folder

        tuned = tune_folder(store, heads=heads, sample=sample, seed=seed)
    if json:
        emit_json(tuned)
        return
    emit(
        f"neighbours {tuned['neighbours']}, temperature {tuned['temperature']:.4g}, "
        f"mix {tuned['mix']:g}, heads {tuned['heads']}"
    )
    names = {
        "model_alone": "the model alone",
        "with_counts": "with the store's token counts",
        "untuned": "with the store, not tuned",
        "best": "with the store, the best setting",
        "score": "with the store, as chosen",
    }
    cells = [[v, f"{tuned[k]:.3f}"] for k, v in names.items() if tuned.get(k) is not None]
    header = [f"left out, {tuned['entries']} entries", tuned["metric"]]
    emit(table(header, cells))
    emit("Chosen: the simplest setting within one standard error of the best.")
    if tuned["mix"] == 0:
        emit("The store does not help this model: its weight in the mixture is 0.")


@app.command("eval")
def evaluate(
    store: Store,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Fields of RTD such as mix=0.5 (foretune show rtd)."
        ),
    ] = None,
    rows: Source = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option(help="Model (default: the store's).")] = None,
    task: Task = None,
    split: Split = None,
    shots: Annotated[
        int, typer.Option(min=0, help="Rows of the store to put into the prompt.")
    ] = 8,
    lora_steps: Annotated[
        int, typer.Option(min=0, help="Steps in each of LoRA's three training runs; 0 skips LoRA.")
    ] = 200,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Random seed of shots and LoRA.")
    ] = 0,
    dtype: DTypeOption = "float32",
    quantize: QuantizeOption = None,
    device: DeviceOption = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_unverified: AllowUnverified = False,
    json: Json = False,
) -> None:
    """Score the store on held-out rows, beside baselines that use the store's rows."""
    from foretune.decoding.prompts import decode_method

    check_device_name("--device", device)
    decode_method("rtd", changes or [])
    with quiet_stdout(), trusted_code(trust_remote_code), held_in(dtype, quantize, device):
        from foretune.cli.progress import StderrConsole
        from foretune.decoding.datastore_folders import evaluate_folder

        result = evaluate_folder(
            store,
            rows,
            changes or [],
            model=model,
            task=task,
            split=split,
            shots=shots,
            lora_steps=lora_steps,
            seed=seed,
            allow_unverified=allow_unverified,
            console=StderrConsole(),
        )
    emit_json(result) if json else emit(evaluation_text(result))


@app.command()
def predict(
    store: Store,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Fields of RTD such as mix=0.5 (foretune show rtd)."
        ),
    ] = None,
    rows: Source = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option(help="Model (default: the store's).")] = None,
    task: Task = None,
    split: Split = None,
    references: Annotated[
        int, typer.Option(min=0, help="With --json: rows of the store to name behind each label.")
    ] = 3,
    dtype: DTypeOption = "float32",
    quantize: QuantizeOption = None,
    device: DeviceOption = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    allow_unverified: AllowUnverified = False,
    json: Json = False,
) -> None:
    """Label rows by a store of labels, and name the references behind each."""
    from foretune.decoding.prompts import decode_method

    check_device_name("--device", device)
    decode_method("rtd", changes or [])
    with quiet_stdout(), trusted_code(trust_remote_code), held_in(dtype, quantize, device):
        from foretune.decoding.datastore_folders import predict_folder

        result = predict_folder(
            store,
            rows,
            changes or [],
            model=model,
            task=task,
            split=split,
            shown=references,
            allow_unverified=allow_unverified,
        )
    if json:
        emit_json(result)
        return
    cells = [
        [row["label"], f"{row['probability']:.3f}", shortened_text(str(row["text"]), 60)]
        for row in result["results"]
    ]
    emit(table(["label", "probability", "text"], cells))


def evaluation_text(result: dict[str, Any]) -> str:
    """The table of `eval`, for a terminal."""
    labelled = result["metric"] == "accuracy"
    header = ["method", result["metric"], *(["+/-"] if labelled else []), "log-loss", "seconds"]
    rows = []
    for row in result["rows"]:
        error = [f"{row['standard_error']:.3f}"] if labelled else []
        score = "-" if row["score"] is None else f"{row['score']:.3f}"
        loss = "-" if row["log_loss"] is None else f"{row['log_loss']:.3f}"
        rows.append([row["method"], score, *error, loss, f"{row['seconds']:.1f}"])
    unit = "rows" if labelled else "tokens"
    footer = f"{result['examples']} {unit}, {result['entries']} entries in the store"
    unit = "" if labelled else " nats per token"
    ahead = [
        f"{row['method']} by {row['by']:.3f}{unit} (+/- {row['standard_error']:.3f})"
        for row in result["ahead"]
    ]
    verdict = f"Ahead of RTD: {', '.join(ahead)}." if ahead else "No baseline is ahead of RTD."
    return f"{table(header, rows)}\n{footer}\n{verdict}"
