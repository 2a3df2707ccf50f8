"""A name says what it holds: none is a pronoun or a participle that any value could bear."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

VAGUE = {
    *("about", "every", "found", "given", "got", "kept", "known", "made", "one", "other", "own"),
    *("said", "some", "taken", "thing", "told", "wanted", "whole"),
}
ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "src").rglob("*.py"))


def names_bound_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of each variable, argument, attribute of self, function and class."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.ExceptHandler):
            yield node.name or "", node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname, node.lineno) for alias in node.names if alias.asname)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_no_name_is_vague(file):
    tree = ast.parse(file.read_text("utf-8"))
    vague = [f"{name} (line {line})" for name, line in names_bound_in(tree) if name in VAGUE]
    assert not vague, f"{file.name}: say what these hold: {', '.join(vague)}"
