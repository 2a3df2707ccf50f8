"""The version of each file that foretune writes and reads back, as a field "format" in it.

"foretune-run-2" is version 2 of the record of a run. The number goes up when an earlier foretune
would misread the file; a field that it can ignore needs no new number. A file without the field was
written before there was one and counts as version 1. `docs/formats.md` lists all formats.

Formats of the core are defined here, those of a wing beside the wing's writer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foretune.errors import UserError

FIELD = "format"
ADAPTER = "foretune-adapter-1"  # base_fingerprint.json
BASE = "foretune-base-1"  # foretune.json
CHECKPOINT = "foretune-checkpoint-1"  # checkpoint-N/state.json
CHOICE = "foretune-choice-1"  # choice.json, the trials of `auto`
COMPARISON = "foretune-comparison-1"  # comparison.json, repeats/seed-N.json
INPUTS = "foretune-inputs-1"  # inputs.json
MODULE = "foretune-module-1"  # foretune_module.json
RECIPE = "foretune-recipe-1"  # config.yaml
RUN = "foretune-run-1"  # run.json
SPARSE = "foretune-sparse-1"  # sparse_delta.safetensors
SPECTRUM = "foretune-spectrum-1"  # spectrum.json
STAGE = "foretune-stage-1"  # stage.json

_NAME = re.compile(r"(foretune-[a-z-]+)-(\d+)")


def stamped(record: Mapping[str, Any], current: str) -> dict[str, Any]:
    """The record with its format in front.

    >>> stamped({"finished": True}, RUN)
    {'format': 'foretune-run-1', 'finished': True}
    """
    return {FIELD: current, **{key: value for key, value in record.items() if key != FIELD}}


def unstamped(path: Path, record: Any, current: str) -> dict[str, Any]:
    """The record without its format, once that is checked.

    Raises:
        UserError: As `check_format`.
    """
    check_format(path, record, current)
    return {key: value for key, value in record.items() if key != FIELD}


def check_format(path: Path, record: Any, current: str) -> None:
    """Checks that this version of foretune can read a file.

    Args:
        path: The file, for the message.
        record: Its content; a format that is a bare number counts as that version.
        current: The format as it is written now.

    Raises:
        UserError: The content is not a mapping, its format is a different one, or a newer foretune
            wrote it.
    """
    kind, _, number = current.rpartition("-")
    if not isinstance(record, Mapping):
        raise UserError(f"{path} is not a file of format {current}: it holds no mapping")
    stored = record.get(FIELD, 1)
    if isinstance(stored, int) and not isinstance(stored, bool):
        stored = f"{kind}-{stored}"
    match = _NAME.fullmatch(str(stored))
    if match is None or match[1] != kind or int(match[2]) < 1:
        raise UserError(f"{path} is not a file of format {current}: its format is {stored!r}")
    if int(match[2]) > int(number):
        raise UserError(
            f"{path} was written by a newer foretune (format {stored}); this version reads up to "
            f"{current}: upgrade"
        )
