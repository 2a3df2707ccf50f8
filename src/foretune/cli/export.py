"""`foretune export`: a merged model, LoRA files for llama.cpp, or ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from foretune.cli.output import Json, TrustRemoteCode, emit, emit_json, quiet_stdout
from foretune.models.trusted_code import trusted_code


def export(
    base: Annotated[
        Path, typer.Argument(help="The base: a folder, a GGUF file, minilm or smollm2.")
    ],
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            help="PEFT folders, or folders that hold them; none writes the base as ONNX."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = ...,  # type: ignore[assignment]
    format: Annotated[
        Literal["merged", "gguf", "onnx"],
        typer.Option(
            help="merged: one model folder; gguf: a LoRA file for llama.cpp each; onnx: an encoder "
            "or classifier each."
        ),
    ] = "merged",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Write adapters merged, for llama.cpp, or as ONNX."""
    with quiet_stdout(), trusted_code(trust_remote_code):
        from foretune.recipes.export import export_adapters

        result = export_adapters(base, adapters or [], out, format, overwrite=overwrite)
    if json:
        emit_json(result)
        return
    for file in result["files"]:
        emit(file)
    for note in result["notes"]:
        emit(f"Note: {note}")
