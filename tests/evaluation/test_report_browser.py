"""The report in a browser: nothing overflows on a phone, and tables are sorted by their headers."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from tests.evaluation.test_report import FORTY, NASTY, RESULTS, comparison, searched

from foretune.evaluation.report import write_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="chromium or google-chrome is not installed")
PHONE = 390
OVERFLOWING = """
page.querySelectorAll("details").forEach((details) => { details.open = true; });
const width = page.defaultView.innerWidth;
return [...page.body.querySelectorAll("*")].filter((element) => {
  const { left, right, width: its } = element.getBoundingClientRect();
  return its > 0 && (right > width + 0.5 || left < -0.5);
}).map((element) => `${element.tagName} ${element.textContent.trim().slice(0, 40)}`);
"""
SORTED = """
const table = page.querySelector("table.sortable");
const first = () => table.tBodies[0].rows[0].cells[0].textContent;
const seen = [first()];
for (const column of [1, 0, 0, 2]) {
  const head = table.tHead.rows[0].cells[column];
  head.querySelector("button").click();
  const marked = [...table.tHead.querySelectorAll("[aria-sort]")];
  seen.push(first(), marked.length, head.getAttribute("aria-sort"));
}
return seen;
"""


def browse(pages: dict[str, str], script: str, folder: Path, width: int = PHONE) -> dict[str, Any]:
    """What a script returns of each page: the browser's smallest window is wider than a phone."""
    frames = "".join(
        f'<iframe title="{html.escape(name)}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
    )
    check = (
        "const answers = {};"
        "for (const frame of document.querySelectorAll('iframe')) answers[frame.title] = "
        f"((page) => {{{script}}})(frame.contentDocument);"
        "const shown = document.createElement('output');"
        "shown.textContent = encodeURIComponent(JSON.stringify(answers));"
        "document.body.replaceChildren(shown);"
    )
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f"<!doctype html><meta charset=utf-8><body>{frames}"
        f"<script>addEventListener('load', () => {{{check}}})</script>",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={folder / 'profile'}", wrapper.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shown = done.stdout.partition("<output>")[2].partition("</output>")[0]
    answers: dict[str, Any] = json.loads(unquote(shown))
    return answers


def page_of(record: dict[str, Any], folder: Path) -> str:
    return write_report(record, folder).read_text("utf-8")


def records() -> dict[str, dict[str, Any]]:
    """Reports of all kinds: few and many bases, long names, every optional section."""
    names = ("quickstart", "chat-quickstart", "claims-har", "evidence-land-bank")
    committed = {
        name: json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        for name in (*names, "spectrum-clinc150")
    }
    long_names = comparison(
        label=lambda name: f"{FORTY}{name}",
        task=lambda index: f"{'x' * 60}{NASTY}{index}",
        metric="log-likelihood per token",
    )
    return {**committed, "searched": searched(), "long names": long_names}


def test_no_element_overflows_on_a_phone(tmp_path: Path) -> None:
    pages = {name: page_of(record, tmp_path / name) for name, record in records().items()}
    assert browse(pages, OVERFLOWING, tmp_path) == {name: [] for name in pages}


def test_an_overflow_is_seen(tmp_path: Path) -> None:
    page = page_of(comparison(), tmp_path)
    wide = '<p style="width:371px">too wide</p></main>'  # beyond the margin of 20 pixels
    pages = {
        "a paragraph": page.replace("</main>", wide),
        "a table": page.replace(".stack", ".not-stacked"),
        "neither": page,
    }
    found = browse(pages, OVERFLOWING, tmp_path)
    assert found["a paragraph"] == ["P too wide"]
    assert any(line.startswith("TD ") for line in found["a table"])
    assert found["neither"] == []


def test_headers_sort_the_scores_of_all_tasks(tmp_path: Path) -> None:
    record = comparison(num_tasks=12)
    seen = browse({"page": page_of(record, tmp_path)}, SORTED, tmp_path, width=1000)["page"]
    by_difference, *clicks = seen
    assert clicks[0] != by_difference and clicks[1:3] == [1, "ascending"]
    assert clicks[3:9] == ["task 0", 1, "ascending", "task 11", 1, "descending"]
    highest = {}
    for row in record["scores"]:
        if (row["base"], row["shots"]) == ("peft-ml", 16):
            highest[row["task"]] = highest.get(row["task"], 0) + row["score"]
    assert clicks[9:] == [max(highest, key=lambda task: highest[task]), 1, "descending"]
