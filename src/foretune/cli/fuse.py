"""`foretune fuse`: fuse several fine-tuned models over one base into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import (
    AllowUnverified,
    Json,
    TrustRemoteCode,
    emit,
    emit_json,
    quiet_stdout,
    table,
)
from foretune.models.trusted_code import trusted_code


def fuse(
    method: Annotated[
        str,
        typer.Argument(
            help="smile, average, task-arithmetic or ties; auto: the best of them on --samples."
        ),
    ],
    base: Annotated[
        str,
        typer.Argument(
            help="The model that all were tuned from: a folder, a GGUF file, minilm or smollm2."
        ),
    ],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=FOLDER... [KEY=VALUE]...",
            help="Fine-tuned models or PEFT folders by name; method settings, such as k=64.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the fused model.")],
    samples: Annotated[
        Path | None,
        typer.Option(
            help="File of rows with task and text, and label for classifiers: a part makes the "
            "gate of gate=activations, the others measure every fusion. Drawn at random over "
            "labels; rows of a split test are left alone."
        ),
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Rows per task of --samples that make the gate, at most.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Seed by which rows of --samples are drawn.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier fused model in --out.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_unverified: AllowUnverified = False,
    json: Json = False,
) -> None:
    """Fuse fine-tuned models over one base, without training."""
    from foretune.fusion.folders import fuse_folders, parse_request, settings_of

    request = parse_request(method, arguments)
    with quiet_stdout(), trusted_code(trust_remote_code):
        from foretune.cli.progress import StderrConsole

        console = StderrConsole()
        result = fuse_folders(
            base,
            request,
            out,
            samples=samples,
            num_samples=num_samples,
            seed=seed,
            overwrite=overwrite,
            allow_unverified=allow_unverified,
            progress=lambda name: console.say(f"measuring {name}"),
        )
    if json:
        emit_json(result)
        return
    if "measured" in result:
        _emit_measured(result, chosen=request.method is None)
    name, settings = result["method"]["name"], settings_of(result["method"])
    emit(f"Fused {', '.join(result['names'])} by {name}{f' ({settings})' if settings else ''}")
    if "layers" in result:
        energy = f"{100 * result['energy_kept']:.1f} %"
        emit(f"{result['layers']} layers have experts, which keep {energy} of the changes' energy")
    percent = 100 * result["extra_parameters"] / result["base_parameters"]
    emit(f"{result['extra_parameters']:,} parameters more than the base, {percent:.1f} %")
    if result["own_heads"]:
        emit("Each task keeps its own head: choose one with set_task(NAME)")
    for note in result["notes"]:
        emit(f"Note: {note}")
    if "measured" not in result:
        emit(
            "Note: nothing was measured. Rows of each task tell whether these models are best "
            "routed or averaged: --samples FILE, and fuse auto takes the best"
        )
    emit(f"Model: {result['out']}")


def _emit_measured(result: dict[str, Any], *, chosen: bool) -> None:
    """The table of what was measured, and what follows from it."""
    from foretune.fusion.advice import advice, held_out_text, name_of, table_of

    measured = result["measured"]
    emit(held_out_text(measured))
    emit(table(*table_of(measured)))
    for line in advice(measured, None if chosen else name_of(result["method"])):
        emit(line)
    for note in measured["notes"]:
        emit(f"Note: {note}")
