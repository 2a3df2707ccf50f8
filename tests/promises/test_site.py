"""The site: it is built strictly and without a network, and holds every public name and command."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import foretune
from foretune.cli import app
from promises.pages import ROOT


class Page(HTMLParser):
    """What a page of the site loads, links to and has as anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(values.get("href", ""))
        if tag == "a":
            self.links.append(values.get("href", ""))
        self.anchors.append(values.get("id", ""))


def built(folder: Path, **changes: Any) -> Path:
    """The site, built as `make site` does, in another folder."""
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder / "site"), **changes))
    return folder / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("site"))


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 60
    loads = {load for page in pages for load in Page(page).loads}
    assert [load for load in loads if re.match(r"(\w+:)?//", load)] == []
    sheets = "".join(sheet.read_text("utf-8") for sheet in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)[\"' ]*(?:https?:)?//[^)\"']+", sheets) == []


def test_every_page_of_docs_is_in_the_site(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    assert all((site / page.with_suffix(".html")).is_file() for page in pages)
    assert (site / "changelog.html").is_file() and not (site / "hooks.py").exists()


def test_every_public_name_has_one_place_in_the_reference(site: Path) -> None:
    anchors = Counter(a for page in (site / "api").glob("*.html") for a in Page(page).anchors)
    for name in foretune.__all__:
        assert anchors[f"foretune.{name}"] == (name != "__version__"), name
    assert "api/verbs.html#foretune.retrain" in Page(site / "reference.html").links


def test_every_command_and_option_is_in_the_reference(site: Path) -> None:
    text = (site / "cli.html").read_text("utf-8")
    root: Any = typer.main.get_command(app)
    assert all(f'id="foretune-{name}"' in text for name in root.commands)
    options = {o for c in root.commands.values() for p in c.params for o in p.opts if o[0] == "-"}
    assert all(f"<code>{option}" in text for option in options)
    lists = re.findall(r"<li>(.*?)</li>", text, re.DOTALL)
    assert not any(item.rstrip().endswith("...") for item in lists)  # as typer cuts them


def test_links_to_files_outside_of_docs_lead_to_the_repository(site: Path) -> None:
    repository = "https://github.com/foretune/foretune/blob/main"
    links = {
        name: Page(site / f"{name}.html").links for name in ("conflict", "formats", "howto/chats")
    }
    assert f"{repository}/benchmarks/evidence/tower.yaml" in links["conflict"]
    assert "changelog.html" in links["formats"]
    assert "../tutorial-chat.html" in links["howto/chats"]
    changes = Page(site / "changelog.html").links
    assert "chat.html#what-it-was-worth" in changes
    assert not any(".md" in link for link in changes if not link.startswith("https:"))


@pytest.mark.parametrize("link", ["missing.md", "start.md#missing", "../missing.py"])
def test_a_link_that_leads_nowhere_is_refused(link: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Home\n[there]({link})\n")
    (tmp_path / "docs/start.md").write_text("# Start\n")
    changes = {"docs_dir": str(tmp_path / "docs"), "nav": None, "plugins": [], "extra_css": []}
    with pytest.raises(Abort):
        built(tmp_path, **changes)
