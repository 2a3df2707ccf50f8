"""What README and docs say: commands parse, code compiles, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from foretune.cli import app
from foretune.recipes.schema import load_any, packaged_recipes
from promises.pages import FENCE, PAGES, ROOT, blocks, inline, name_of, shell_lines

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CALLS = [(name_of(page), line) for page in PAGES for line in shell_lines(page, "foretune")]


@pytest.mark.parametrize(("page", "line"), CALLS)
def test_command_of_a_page_parses(page: str, line: str) -> None:
    _, command, *args = shlex.split(line)
    assert command in COMMANDS, page
    COMMANDS[command].make_context(command, args)


@pytest.mark.parametrize(("page", "line"), [c for c in CALLS if " run " in c[1]])
def test_settings_of_a_command_are_known_to_its_recipe(page: str, line: str) -> None:
    _, _, recipe, *args = shlex.split(line)
    if recipe not in packaged_recipes():
        recipe = str(ROOT / "src/foretune/recipes/templates/classification.yaml")
    load_any(recipe, [arg for arg in args if "=" in arg])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_inline_commands_exist(page: Path) -> None:
    for code in inline(page):
        words = code.split()
        if words[0] == "foretune" and len(words) > 1 and not words[1].isupper():
            assert words[1] in COMMANDS, code
            if words[1] in ("run", "show") and len(words) > 2 and "." not in words[2]:
                COMMANDS[words[1]].make_context(words[1], [w for w in words[2:] if w != "…"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    calls = [*shell_lines(page, "make"), *(code for code in inline(page) if code[:5] == "make ")]
    assert {shlex.split(call, comments=True)[1] for call in calls} <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, name_of(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", other.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_rows_in_pages_are_json_objects(page: Path) -> None:
    import json

    lines = [line for body in blocks(page, "") for line in body.splitlines()]
    for line in lines:
        if line.strip().startswith('{"task"'):
            assert "task" in json.JSONDecoder().raw_decode(line.strip())[0]
