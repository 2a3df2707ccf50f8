"""What a run leaves for people to read, beside the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_report(folder: Path, comparison: dict[str, Any]) -> Path:
    """`report.html` from a comparison; needs no torch."""
    from foretune.evaluation.report import render

    path = folder / "report.html"
    path.write_text(render(comparison), encoding="utf-8")
    return path
