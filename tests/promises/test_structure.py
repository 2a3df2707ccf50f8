"""The import structure: no circle, not even for type checking; files that can be read at once.

Floors and wings are import-linter's contracts in pyproject.toml.
"""

from __future__ import annotations

from pathlib import Path

import grimp
import networkx
import pytest

SRC = Path(__file__).parents[2] / "src/foretune"
MOST_LINES = 450


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("foretune", cache_dir=None, exclude_type_checking_imports=False)
    imports = networkx.DiGraph(
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    )
    circles = [c for c in networkx.strongly_connected_components(imports) if len(c) > 1]
    assert circles == []
    assert imports.number_of_edges() > 500


@pytest.mark.parametrize("file", sorted(SRC.rglob("*.py")), ids=lambda f: str(f.relative_to(SRC)))
def test_no_file_is_long(file):
    assert len(file.read_text("utf-8").splitlines()) < MOST_LINES


WINGS = ("fusion", "pruning", "decoding", "forecasting", "source_free", "theory")
# What names a wing for the core: tables of entry points, and the command line above both.
TABLES = (
    "methods/__init__.py",
    "models/pretrained.py",
    "recipes/schema.py",
    "tasks/objectives/__init__.py",
)


def test_the_core_names_a_wing_in_tables_alone():
    """import-linter does not see what `importlib` imports by a string."""
    core = [
        file
        for file in SRC.rglob("*.py")
        if len(file.relative_to(SRC).parts) > 1
        and file.relative_to(SRC).parts[0] not in (*WINGS, "cli")
    ]
    named = {
        str(file.relative_to(SRC))
        for file in core
        if any(f"foretune.{wing}" in file.read_text("utf-8") for wing in WINGS)
    }
    assert named == set(TABLES)


def test_type_checkers_are_told_that_there_are_types():
    assert (SRC / "py.typed").is_file() and (SRC / "__init__.pyi").is_file()
