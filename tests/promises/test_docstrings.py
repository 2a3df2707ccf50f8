"""Public functions on tensors state shapes; the docstring linter checks that all have a text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "src").rglob("*.py"))
TENSOR = re.compile(r"\b(Tensor|ndarray)\b")
SHAPE = re.compile(r"\([^()\s]*[\w…·]+,[^()]*\)|\bscalar\b|\bshape", re.IGNORECASE)


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(name, function, docstrings that hold for it: its own and its class's)."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            about_class = ast.get_docstring(node) or ""
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                    own = ast.get_docstring(part) or ""
                    yield f"{node.name}.{part.name}", part, f"{own}\n{about_class}"


def is_override(function: ast.FunctionDef) -> bool:
    """Whether the docstring is that of the method which this one overrides."""
    return any(ast.unparse(d).rpartition(".")[2] == "override" for d in function.decorator_list)


def handles_tensors(function: ast.FunctionDef) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [a.annotation for a in arguments] + [function.returns]
    bare = ("Tensor", "ndarray", "np.ndarray", "torch.Tensor", "Tensor | None")
    return any(a is not None and ast.unparse(a) in bare for a in annotations)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_public_functions_on_tensors_state_shapes(file):
    silent = [
        name
        for name, function, text in public_functions(ast.parse(file.read_text("utf-8")))
        if handles_tensors(function) and not is_override(function) and not SHAPE.search(text)
    ]
    assert not silent, f"{file.name}: no shape in the docstring of {', '.join(silent)}"
