"""What must hold for the repository as a whole."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import foretune
from foretune.methods.peft_ml import PAPER
from foretune.recipes.schema import load_any, load_recipe, packaged_recipes
from foretune.recipes.templates import TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = re.compile(
    r"\.git|\.venv[-\w]*|runs|build|dist|site|\w*_*cache_*|\.\w+_cache|\.hypothesis|.*\.egg-info"
)
TEXT = {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".j2", ".css", ""}
# Spelt in halves, or this file would be the first to be found.
FORBIDDEN = re.compile("/wo" + "rk/|iss" + "ue #|/ro" + "ot/", re.IGNORECASE)


def texts() -> list[Path]:
    found: list[Path] = []
    for folder, below, files in os.walk(ROOT):
        below[:] = [name for name in below if not SKIPPED.fullmatch(name)]
        kept = [name for name in files if not SKIPPED.fullmatch(name)]  # .git of a worktree
        found += [Path(folder) / name for name in kept if Path(name).suffix in TEXT]
    return found


def test_no_file_mentions_a_machine() -> None:
    assert len(texts()) > 100
    bad = [path for path in texts() if FORBIDDEN.search(path.read_text("utf-8", "ignore"))]
    assert bad == []


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    command = [sys.executable, "-m", "foretune.cli", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown == f"foretune {project['version']}\n"
    assert foretune.__version__ == project["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == project["version"]
    # The newest version of the changelog, below what is not released yet.
    log = (ROOT / "CHANGELOG.md").read_text("utf-8")
    [(version, date), *_] = re.findall(r"^## (?!Unreleased$)(\S+)(?: - (\S+))?$", log, re.MULTILINE)
    assert version == project["version"]
    assert date == str(citation["date-released"])
    assert datetime.date.fromisoformat(date)


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipe_parses(name: str) -> None:
    needs_data = "\ntasks:" in packaged_recipes()[name]
    assert load_any(name, ["tasks.source=data.jsonl"] if needs_data else []).name == name


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_parses_as_it_is(name: str) -> None:
    load_recipe(ROOT / "src/foretune/recipes/templates" / f"{name}.yaml")


def test_every_yaml_file_is_a_recipe_or_a_template() -> None:
    names = {path.stem for path in (ROOT / "src").rglob("*.yaml")}
    assert names == {*packaged_recipes(), *TEMPLATES}


def test_licence_is_the_one_that_is_declared() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def test_citation_names_the_authors_and_the_licence_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["repository-code"] == project["urls"]["Repository"]
    [paper] = citation["references"]
    authors = " and ".join(f"{a['given-names']} {a['family-names']}" for a in paper["authors"])
    assert (paper["title"], authors) == (PAPER["title"], PAPER["authors"])
    assert paper["identifiers"][0]["value"] == f"arXiv:{PAPER['arxiv']}"


def test_hooks_run_what_the_makefile_runs() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    commands: list[str] = []
    for target in ("lint", "types", "imports"):
        [lines] = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
        commands += [line.strip().replace("$(BIN)", ".venv/bin") for line in lines.splitlines()]
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert local["repo"] == "local"
    hooks = {hook["id"]: hook for hook in local["hooks"]}
    assert all(hook["language"] == "system" for hook in hooks.values())
    assert hooks.pop("whitespace")["entry"] == "git diff --cached --check"
    assert [hook["entry"] for hook in hooks.values()] == commands


def test_every_format_is_documented_and_no_other() -> None:
    named = re.compile(r"foretune-[a-z-]+-\d+\b")
    source = "".join(p.read_text("utf-8") for p in (ROOT / "src/foretune").rglob("*.py"))
    assigned = set(re.findall(r'^[A-Z_, ]+ = .*?"(foretune-[a-z-]+-\d+)"', source, re.MULTILINE))
    page = (ROOT / "docs/formats.md").read_text("utf-8")
    documented = set(named.findall(page)) - {"foretune-run-2"}  # an example
    assert documented == assigned and len(assigned) > 15
