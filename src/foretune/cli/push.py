"""`foretune push`: a run, a base or adapters to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout, table


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A finished run (its best base is pushed), a base, an adapter, or a folder of "
            "adapters."
        ),
    ],
    repo: Annotated[str, typer.Option(help="The repository, as OWNER/NAME.")] = ...,  # type: ignore[assignment]
    private: Annotated[
        bool, typer.Option("--private", help="Only its members see the repository.")
    ] = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="License of what is pushed, such as apache-2.0 (default: none is stated)."
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="What it was made from, as OWNER/NAME on the Hub (default: what is recorded)."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the files and the model card, and upload nothing."),
    ] = False,
    json: Json = False,
) -> None:
    """Upload a run's best base, a base or adapters to the Hub."""
    with quiet_stdout():
        from foretune.evaluation.wording import counted
        from foretune.recipes.push import push

        result = push(
            folder,
            repo,
            private=private,
            license=license,
            base_model=base_model,
            dry_run=dry_run,
        )
    if json:
        emit_json(result)
        return
    sizes = result["files"]
    if dry_run:
        emit(table(["file", "bytes"], [[name, size] for name, size in sizes.items()]))
        emit(f"\n{result['card']}")
    if result["left_out"]:
        emit(f"Left out: {', '.join(result['left_out'])}")
    for note in result["notes"]:
        emit(f"Note: {note}")
    size = f"{counted(len(sizes), 'file')}, {sum(sizes.values()) / 1e6:.1f} MB"
    emit(f"Would upload {size}" if dry_run else f"Uploaded {size}: {result['url']}")
