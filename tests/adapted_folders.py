"""Folders with a base, rows and the adapters that `adapt` makes of them, and stock readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft

import tiny_models
from command_line import call


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def texts(number: int) -> list[str]:
    rng = np.random.default_rng(number)
    return [" ".join(rng.choice(tiny_models.WORDS[3:], 2 + i % 4)) for i in range(number)]


def adapted(folder: Path, *settings: object) -> Path:
    """The folder of the adapters that `adapt` writes."""
    result = call("adapt", folder / "base", "--tasks", folder / "rows.jsonl", *settings)
    assert result.exit_code == 0, result.output
    return folder / "adapters"


def stock(auto: Any, folder: Path, adapter: Path) -> Any:
    """The base with one adapter, as stock libraries load them."""
    return peft.PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), adapter).eval()
