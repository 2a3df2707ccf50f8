"""`foretune fuse`: several fine-tuned models over one base become one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import Json, Overwrite, emit, emit_json, quiet_stdout


def fuse(
    method: Annotated[str, typer.Argument(help="smile, average, task-arithmetic or ties.")],
    base: Annotated[str, typer.Argument(help="What all were tuned from: a folder, or minilm.")],
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=FOLDER... [KEY=VALUE]...",
            help="Fine-tuned models and PEFT folders; settings of the method, such as k=64.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the fused model.")],
    samples: Annotated[
        Path | None, typer.Option(help="Rows with task and text, for gate=activations.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Texts of each task.")] = 16,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Fuse fine-tuned models over one base into one, without training."""
    from foretune.fusion.folders import fuse_folders, parse_request, settings_of

    request = parse_request(method, given)
    with quiet_stdout():
        result = fuse_folders(
            base, request, out, samples=samples, num_samples=num_samples, overwrite=overwrite
        )
    if json:
        emit_json(result)
        return
    settings = settings_of(result["method"])
    emit(f"Fused {', '.join(result['names'])} by {method}{f' ({settings})' if settings else ''}")
    if "layers" in result:
        kept = f"{100 * result['energy_kept']:.1f} %"
        emit(f"{result['layers']} layers have experts, which keep {kept} of the changes' energy")
    more = 100 * result["extra_parameters"] / result["base_parameters"]
    emit(f"{result['extra_parameters']:,} parameters more than the base, {more:.1f} %")
    if result["own_heads"]:
        emit("Each task keeps its head: set_task(NAME) chooses it")
    for note in result["notes"]:
        emit(f"Note: {note}")
    emit(f"Model: {result['out']}")
