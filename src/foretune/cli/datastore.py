"""`foretune datastore`: build, tune and evaluate a store of references for RTD."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="A store of a model's last states and what followed them, for generate --method rtd.",
)
Rows = Annotated[str, typer.Option(help="A file, a folder, a dataset; see docs/data.md.")]
Task = Annotated[str | None, typer.Option(help="Only rows of this task.")]
Split = Annotated[str | None, typer.Option(help="Only rows of this split.")]
Store = Annotated[Path, typer.Argument(help="The store's folder.")]


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="A model folder, a hub id, or a PEFT folder.")],
    rows: Rows = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="The store's folder.")] = Path("store"),
    task: Task = None,
    split: Split = None,
    heads: Annotated[int, typer.Option(min=1, help="Slices of a state looked up apart.")] = 1,
    permute_options: Annotated[
        bool, typer.Option(help="Rows with candidates once for each rotation of them.")
    ] = True,
    key_type: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store.")] = False,
    json: Json = False,
) -> None:
    """Read rows with a model and keep its states."""
    from foretune.run import check_one_of

    check_one_of("--key-type", key_type, ("float32", "float16", "bfloat16"))
    with quiet_stdout():
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
    heads: Annotated[int | None, typer.Option(min=1, help="Slices; the store's.")] = None,
    sample: Annotated[int, typer.Option(min=2, help="Entries that are predicted.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Draws them.")] = 0,
    json: Json = False,
) -> None:
    """Choose neighbours, temperature and mix on the store, one row left out at a time."""
    with quiet_stdout():
        from foretune.decoding.datastore_folders import tune_folder

        found = tune_folder(store, heads=heads, sample=sample, seed=seed)
    if json:
        emit_json(found)
        return
    emit(
        f"neighbours {found['neighbours']}, temperature {found['temperature']:.4g}, "
        f"mix {found['mix']:g}, heads {found['heads']}"
    )
    said = [
        ["the model alone", found["model_alone"]],
        ["with the store's token counts", found["with_counts"]],
        ["with the store", found["log_likelihood"]],
    ]
    cells = [[name, f"{score:.3f}"] for name, score in said]
    emit(table([f"left out, {found['entries']} entries", "log-likelihood a token"], cells))
    if found["mix"] == 0:
        emit("The store is of no use to this model: nothing of it is mixed in.")


@app.command("eval")
def evaluate(
    store: Store,
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Fields of RTD (foretune show rtd), such as mix=0.5."
        ),
    ] = None,
    rows: Rows = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option(help="The store's own by default.")] = None,
    task: Task = None,
    split: Split = None,
    shots: Annotated[int, typer.Option(min=0, help="Store rows put into the prompt.")] = 8,
    lora_steps: Annotated[
        int, typer.Option(min=0, help="Batches of LoRA, in each of three trainings; 0 for none.")
    ] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Draws the shots, seeds LoRA.")] = 0,
    json: Json = False,
) -> None:
    """Score the store, and what else could be done with its rows, on other rows."""
    from foretune.decoding.prompts import decode_method

    decode_method("rtd", changes or [])
    with quiet_stdout():
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
            console=StderrConsole(),
        )
    emit_json(result) if json else emit(evaluation_text(result))


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
    what = "rows" if labelled else "tokens"
    said = f"{result['examples']} {what}, {result['entries']} entries in the store"
    return f"{table(header, rows)}\n{said}"
