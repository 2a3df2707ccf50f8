"""`foretune merge-shards`: one folder of adapters of those that `adapt --shard` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foretune.cli.output import Json, emit, emit_json, quiet_stdout


def merge_shards(
    out: Annotated[
        Path,
        typer.Argument(help="Output folder. New tasks join the adapters that are in it."),
    ],
    shards: Annotated[
        list[Path],
        typer.Argument(
            metavar="SHARD",
            help="Folders of all shards, as the shell expands adapters-*-of-8. They stay.",
        ),
    ],
    json: Json = False,
) -> None:
    """Merge the shards of an adaptation into one folder."""
    with quiet_stdout():
        from foretune.evaluation.wording import counted, listed
        from foretune.recipes.merge_shards import merge_shards

        result = merge_shards(out, shards)
    if json:
        emit_json(result)
        return
    added, there = result["added"], result["there"]
    emit(f"Merged {counted(result['shards'], 'shard')}: {counted(len(added), 'task')} added")
    if there:
        emit(f"Already there: {counted(len(there), 'task')} ({listed(there)})")
    if result["mean"] is not None:
        emit(f"Mean score: {result['mean']:.3f} ({counted(len(result['scores']), 'task')} scored)")
    emit(f"Adapters: {out}")
