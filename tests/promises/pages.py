"""The pages of the repository, and what stands in their code blocks."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)
FENCE = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of that language ("" for none) on a page."""
    return [body for found, body in FENCE.findall(page.read_text("utf-8")) if found == language]


def shell_lines(page: Path, program: str) -> list[str]:
    """The lines of plain code blocks that call that program, comments left aside."""
    lines = [line.strip() for body in blocks(page, "") for line in body.splitlines()]
    called = [line.partition("  #")[0].strip() for line in lines if line.startswith(f"{program} ")]
    return [part.strip() for line in called for part in line.split("&&") if program in part]


def inline(page: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text("utf-8")))


def first_column(page: Path, heading: str | None = None) -> set[str]:
    """The code words in the first column of a page's tables, of one section or of all."""
    text = page.read_text("utf-8")
    if heading is not None:
        text = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], flags=re.MULTILINE)[0]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {word for cell in cells for word in re.findall(r"`([\w-]+)[^`]*`", cell)}
