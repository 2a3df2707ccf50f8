"""README is also the page on PyPI, where links into the repository must be whole addresses."""

from __future__ import annotations

import re

from promises.pages import FENCE, ROOT

TEXT = FENCE.sub("", (ROOT / "README.md").read_text("utf-8"))
DEFINITIONS = dict(re.findall(r"^\[([^\]]+)\]: (\S+)$", TEXT, re.MULTILINE))
BODY = re.sub(r"^\[[^\]]+\]: \S+$", "", TEXT, flags=re.MULTILINE)
PAGES = "https://github.com/foretune/foretune/blob/main/"
IMAGES = "https://raw.githubusercontent.com/foretune/foretune/main/"


def test_no_link_is_relative() -> None:
    links = [*re.findall(r"\]\(([^)\s]+)", BODY), *DEFINITIONS.values()]
    links += re.findall(r"(?:src|href)=[\"']?([^\"'\s>]+)", BODY)
    assert len(links) > 50
    assert [link for link in links if not link.startswith("https://")] == []


def test_images_are_files_themselves_and_pages_are_shown() -> None:
    images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", BODY)
    assert images and all(link.startswith(IMAGES) for link in images)
    assert all(link.startswith(PAGES) for link in DEFINITIONS.values())


def test_links_into_the_repository_lead_somewhere() -> None:
    for link in re.findall(rf"(?:{PAGES}|{IMAGES})[^)\s]+", TEXT):
        path, _, anchor = link.removeprefix(PAGES).removeprefix(IMAGES).partition("#")
        assert (ROOT / path).is_file(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_every_reference_is_defined_and_every_definition_is_used() -> None:
    named = re.findall(r"(?<!!)\[[^\]]+\]\[([^\]]+)\]", BODY)
    alone = re.findall(r"(?<![\]!])\[([^\]`]+)\](?![\[(])", re.sub(r"`[^`\n]+`", "", BODY))
    used = {label.lower() for label in (*named, *alone)}
    assert used == {label.lower() for label in DEFINITIONS}
