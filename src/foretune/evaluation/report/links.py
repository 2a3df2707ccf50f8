"""What a report explains and links to: methods, files of the run, pages of the documentation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from foretune.entry_points import entry_point
from foretune.evaluation.report.view import View
from foretune.files import CARD_FILE, COMPARISON_FILE, RECIPE, SCORES_TABLE
from foretune.manifest import final_path

DOCS = "https://github.com/foretune/foretune/blob/main/docs/"
PAGES = {
    "What the verdict means": "start.md#what-the-verdict-means",
    "How it is measured": "evidence.md",
    "Which method, and how many tasks and rows": "choose.md",
    "How to serve the result": "serve.md",
    "What the files hold": "formats.md#a-run",
}
FILES = {
    COMPARISON_FILE: "every score, interval and cost",
    SCORES_TABLE: "every score, as a table",
    RECIPE: "the recipe with all defaults written out",
    CARD_FILE: "the model card",
    "figures": "the figures of this page as SVG files",
}


def methods(view: View) -> list[dict[str, Any]]:
    """Each method that made or adapted a base: its label, a sentence, its page, and its bases."""
    classes = entry_point("foretune.methods:METHODS")
    adapt = view.comparison["adapt"]
    ways = adapt.get("methods") or [adapt["method"]]
    explained = []
    for name in dict.fromkeys([*view.methods.values(), *ways]):
        if name not in classes:
            continue  # a base with a name of the user's
        record_class: Any = entry_point(classes[name])
        labels = [view.labels[base] for base in view.names if view.methods[base] == name]
        explained.append(
            {
                "label": record_class.label,
                "verb": record_class.verb,
                "summary": (record_class.__doc__ or "").strip().partition("\n")[0],
                "page": f"{DOCS}methods/{name}.md",
                "bases": [] if labels == [record_class.label] else labels,
            }
        )
    return explained


def pages() -> list[tuple[str, str]]:
    """(title, address) of the pages of the documentation that help to read a report."""
    return [(title, DOCS + page) for title, page in PAGES.items()]


def files(folder: Path) -> list[tuple[str, str, str]]:
    """(relative address, name, what it holds) of each file that belongs to the report.

    Args:
        folder: That of the comparison.
    """
    written = {SCORES_TABLE, "figures"}  # with the page
    return [
        (quote(name), name, holds)
        for name, holds in FILES.items()
        if name in written or (folder / name).exists()
    ]


def results(view: View, folder: Path) -> list[tuple[str, str, str]]:
    """The same of the bases that were compared, and of the adapters on them."""
    listed = []
    for base in view.bases:
        adapters = Path("adapters", base["name"])
        if base.get("path") and (path := _base_path(str(base["path"]), folder)) is not None:
            listed.append((quote(path), path, f"the base of {base['label']}"))
        if (folder / adapters).is_dir():
            name = adapters.as_posix()
            listed.append((quote(name), name, f"adapters on {base['label']}, one per unseen task"))
    return listed


def _base_path(path: str, folder: Path) -> str | None:
    """A base's folder as seen from that of the comparison; None where there is none."""
    if (folder / path).is_dir() and not Path(path).is_absolute():
        return Path(path).as_posix()
    if Path(path).is_dir():
        return Path(os.path.relpath(path, final_path(folder))).as_posix()
    return None
