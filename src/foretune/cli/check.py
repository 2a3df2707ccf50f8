"""`foretune check`: are adapters applied, each to its base and each in its own way?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from foretune.cli.output import Json, TrustRemoteCode, emit, emit_json, quiet_stdout, table
from foretune.models.trusted_code import trusted_code


def check(
    base: Annotated[
        Path, typer.Argument(help="The base: a folder, a GGUF file, minilm or smollm2.")
    ],
    adapters: Annotated[
        list[Path], typer.Argument(help="PEFT folders, or folders that hold them.")
    ],
    rows: Annotated[
        Path | None,
        typer.Option(help="File of rows to try the adapters on (default: a sentence)."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Check that adapters belong to a base and are applied.

    Exit code 1 if one is at fault.
    """
    from foretune.evaluation.wording import counted

    with quiet_stdout(), trusted_code(trust_remote_code):
        from foretune.recipes.check import check_adapters

        result = check_adapters(base, adapters, rows)
    if json:
        emit_json(result)
    else:
        emit(
            table(
                ["", "adapter", "effect", "PEFT − foretune"], [_row(a) for a in result["adapters"]]
            )
        )
        for adapter in result["adapters"]:
            for fault in adapter["faults"]:
                emit(f"{adapter['adapter']}: {fault}")
            for note in adapter["notes"]:
                emit(f"Note: {adapter['adapter']}: {note}")
        bad = sum(bool(adapter["faults"]) for adapter in result["adapters"])
        emit(f"{counted(len(result['adapters']), 'adapter')}, {bad or 'none'} at fault.")
    if not result["ok"]:
        _fail()


def _fail() -> NoReturn:
    raise typer.Exit(1)


def _row(adapter: dict[str, object]) -> list[str]:
    numbers = [adapter["effect"], adapter["difference"]]
    shown = ["" if number is None else f"{number:.2g}" for number in numbers]
    return ["fault" if adapter["faults"] else "ok", str(adapter["adapter"]), *shown]
