"""Docs that list what the code has, list all of it."""

from __future__ import annotations

import dataclasses
import re

import pytest

import foretune
from foretune.methods import METHODS, method_class
from foretune.recipes.blocks import (
    AdaptBlock,
    ModelBlock,
    RetrainBlock,
    SpectrumBlock,
    TasksBlock,
)
from foretune.recipes.objective_blocks import OBJECTIVES
from foretune.recipes.schema import Recipe
from foretune.recipes.yaml_io import parse_yaml
from promises.pages import ROOT, first_column, inline

DOCS = ROOT / "docs"
BLOCKS = {
    "Top level": [Recipe],
    "model": [ModelBlock],
    "tasks": [TasksBlock],
    "objective": list(OBJECTIVES.values()),
    "retrain": [RetrainBlock],
    "spectrum": [SpectrumBlock],
}


@pytest.mark.parametrize("name", METHODS)
def test_page_of_a_method_names_its_fields_and_no_others(name: str) -> None:
    page = DOCS / "methods" / f"{name}.md"
    fields = {field.name for field in dataclasses.fields(method_class(name))}
    assert first_column(page) == fields
    walked = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)  # but for its code
    assert len(walked.splitlines()) < 60


@pytest.mark.parametrize("name", METHODS)
def test_page_of_a_method_shows_the_defaults(name: str) -> None:
    text = (DOCS / "methods" / f"{name}.md").read_text("utf-8")
    rows = {
        line.split("|")[1].strip(" `"): line.split("|")[2]
        for line in text.splitlines()
        if line.count("|") > 3
    }
    for field, value in method_class(name)().to_dict().items():
        if field == "name":
            continue
        assert parse_yaml(rows[field].strip(" `"), field) == value


@pytest.mark.parametrize("name", METHODS)
def test_page_of_a_method_cites_its_paper(name: str) -> None:
    paper = method_class(name).paper
    text = (DOCS / "methods" / f"{name}.md").read_text("utf-8")
    assert "**Cite.**" in text
    assert paper is None or f"arXiv:{paper['arxiv']}" in text


def test_there_is_no_page_without_a_method() -> None:
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == set(METHODS)


@pytest.mark.parametrize("section", BLOCKS)
def test_recipes_page_names_every_key_and_no_others(section: str) -> None:
    keys = {key for block in BLOCKS[section] for key in block.model_fields}
    assert first_column(DOCS / "recipes.md", section) == keys


def test_recipes_page_names_every_key_of_adapt() -> None:
    own = set(AdaptBlock.model_fields)
    shared = set(RetrainBlock.model_fields) - {"methods"}
    assert first_column(DOCS / "recipes.md", "adapt") == own - shared
    text = (DOCS / "recipes.md").read_text("utf-8").partition("\n## adapt\n")[2]
    assert all(f"`{key}`" in text for key in own)


@pytest.mark.parametrize("name", foretune.__all__)
def test_public_name_is_documented(name: str) -> None:
    words = {code.partition("(")[0] for code in inline(DOCS / "reference.md")}
    assert name in words
    value = getattr(foretune, name)
    assert name == "__version__" or (value.__doc__ or "").strip()
