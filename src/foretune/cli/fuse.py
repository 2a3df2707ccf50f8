"""`foretune fuse`: fuse several fine-tuned models over one base into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import (
    AllowUnverified,
    Json,
    TrustRemoteCode,
    emit,
    emit_json,
    quiet_stdout,
)
from foretune.models.trusted_code import trusted_code


def fuse(
    method: Annotated[str, typer.Argument(help="smile, average, task-arithmetic or ties.")],
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
        Path | None, typer.Option(help="File of rows with task and text, for gate=activations.")
    ] = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Texts per task read from --samples.")
    ] = 16,
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
        result = fuse_folders(
            base,
            request,
            out,
            samples=samples,
            num_samples=num_samples,
            overwrite=overwrite,
            allow_unverified=allow_unverified,
        )
    if json:
        emit_json(result)
        return
    settings = settings_of(result["method"])
    emit(f"Fused {', '.join(result['names'])} by {method}{f' ({settings})' if settings else ''}")
    if "layers" in result:
        energy = f"{100 * result['energy_kept']:.1f} %"
        emit(f"{result['layers']} layers have experts, which keep {energy} of the changes' energy")
    percent = 100 * result["extra_parameters"] / result["base_parameters"]
    emit(f"{result['extra_parameters']:,} parameters more than the base, {percent:.1f} %")
    if result["own_heads"]:
        emit("Each task keeps its own head: choose one with set_task(NAME)")
    for note in result["notes"]:
        emit(f"Note: {note}")
    emit(f"Model: {result['out']}")
