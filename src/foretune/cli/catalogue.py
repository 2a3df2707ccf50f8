"""`foretune ls`, `show` and `cite`: methods and recipes, their settings and their papers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from foretune.cli.output import Json, emit, emit_json, table
from foretune.errors import UserError, did_you_mean


def ls(
    what: Annotated[
        str | None,
        typer.Argument(help="What to list: methods, recipes (default: both), or adapters."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Argument(help="Of adapters: the folder that holds them.")
    ] = None,
    json: Json = False,
) -> None:
    """List methods and recipes, or the adapters in a folder."""
    if what == "adapters" or folder is not None:
        _list_adapters(what, folder, json)
        return
    listers = {"methods": _methods, "recipes": _recipes}
    _check_kind(what, [*listers, "adapters"])
    listings = {kind: lister() for kind, lister in listers.items() if what in (None, kind)}
    if json:
        emit_json(listings)
        return
    parts = []
    for rows in listings.values():
        header = list(rows[0])
        parts.append(table(header, [list(row.values()) for row in rows]))
    emit("\n\n".join(parts))


def show(
    name: Annotated[str, typer.Argument(help="Name of a method or a packaged recipe.")],
    json: Json = False,
) -> None:
    """Show a method's settings and paper, or a recipe's text."""
    from foretune.recipes.schema import packaged_recipes

    recipes = packaged_recipes()
    if name in recipes:
        emit_json({"name": name, "yaml": recipes[name]}) if json else emit(recipes[name].rstrip())
        return
    _check_method(name, recipes)
    described = _describe(name)
    if json:
        emit_json(described)
        return
    rows = [
        [key, repr(value), described["help"].get(key, "")]
        for key, value in described["fields"].items()
    ]
    emit(f"{name} ({described['verb']}): {described['summary']}")
    emit("\n" + table(["field", "default", "meaning"], rows) if rows else "\nIt has no settings.")
    if described["paper"]:
        paper = described["paper"]
        emit(f"\n{_authors(paper)}, {paper['title']}, {paper['year']}, arXiv:{paper['arxiv']}")


def cite(
    method: Annotated[str, typer.Argument(help="Name of a method.")],
    json: Json = False,
) -> None:
    """Print the BibTeX entry of a method's paper."""
    paper = _paper(method)
    entry = bibtex(paper)
    emit_json({"method": method, "paper": paper, "bibtex": entry}) if json else emit(entry)


def bibtex(paper: dict[str, Any]) -> str:
    """The BibTeX entry of a paper.

    Args:
        paper: title, authors and year, and perhaps venue and arxiv.
    """
    first = _authors(paper).split(", ")[0].split()
    word = next((w for w in re.findall(r"\w+", paper["title"].lower()) if len(w) > 3), "paper")
    key = re.sub(r"\W", "", first[-1].lower() if first else "") + f"{paper['year']}{word}"
    fields = {
        "title": f"{{{paper['title']}}}",
        "author": _authors(paper, " and "),
        "year": paper["year"],
    }
    if paper.get("venue"):
        fields["note"] = paper["venue"]
    if paper.get("arxiv"):
        fields |= {"eprint": paper["arxiv"], "archivePrefix": "arXiv"}
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@article{{{key},\n{lines}\n}}"


def _list_adapters(what: str | None, folder: Path | None, json: bool) -> None:
    """Prints the adapters of a folder.

    Raises:
        UserError: There is none, or something else is to be listed of a folder.
    """
    from foretune.recipes.adapter_list import listed_adapters

    if what != "adapters":
        raise UserError(f"{folder}: only adapters are listed of a folder: foretune ls adapters")
    if folder is None:
        raise UserError("which folder? foretune ls adapters FOLDER")
    rows = listed_adapters(folder)
    if json:
        emit_json({"adapters": rows})
        return
    header = ["task", "version", "rows", "score", "adapted", "base"]
    cells = [["-" if row[name] is None else row[name] for name in header] for row in rows]
    for cell in cells:
        cell[3] = cell[3] if isinstance(cell[3], str) else f"{cell[3]:.3f}"
    emit(table(header, cells))


def _check_kind(kind: str | None, kinds: list[str]) -> None:
    if kind is not None and kind not in kinds:
        hint = did_you_mean(kind, kinds)
        raise UserError(f'cannot list "{kind}"; choose {" or ".join(kinds)}.{hint}')


def _check_method(name: str, recipes: Iterable[str]) -> None:
    from foretune.methods import METHODS

    if name not in METHODS:
        hint = did_you_mean(name, [*METHODS, *recipes])
        raise UserError(f'no method or recipe "{name}"; `foretune ls` lists them.{hint}')


def _paper(method: str) -> dict[str, Any]:
    paper: dict[str, Any] | None = _class(method).paper
    if paper is None:
        raise UserError(f'method "{method}" has no paper to cite')
    return paper


def _methods() -> list[dict[str, str]]:
    from foretune.methods import METHODS

    classes = {name: _class(name) for name in METHODS}
    return [{"method": n, "verb": c.verb, "summary": _summary(c)} for n, c in classes.items()]


def _recipes() -> list[dict[str, str]]:
    from foretune.recipes.schema import packaged_recipes

    return [
        {"recipe": name, "summary": text.partition("\n")[0].lstrip("# ")}
        for name, text in packaged_recipes().items()
    ]


def _class(name: str) -> Any:
    from foretune.methods import method_class

    return method_class(name)


def _describe(name: str) -> dict[str, Any]:
    cls = _class(name)
    fields = {f.name: _default(f) for f in dataclasses.fields(cls)}
    return {
        "name": name,
        "verb": cls.verb,
        "summary": _summary(cls),
        "fields": fields,
        "help": _args(cls.__doc__ or ""),
        "paper": cls.paper,
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def _args(docstring: str) -> dict[str, str]:
    """The `Args:` of a Google-style docstring: each argument's meaning on one line."""
    _, _, section = docstring.partition("Args:\n")
    lines_of: dict[str, list[str]] = {}
    indent, name = None, ""
    for line in section.splitlines():
        if not line.strip():
            break
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        if depth < indent:
            break
        if depth == indent:
            name, _, line = line.strip().partition(":")
            lines_of[name] = []
        lines_of[name].append(line.strip())
    return {name: " ".join(lines) for name, lines in lines_of.items()}


def _authors(paper: dict[str, Any], joint: str = ", ") -> str:
    authors = paper["authors"]
    names = authors.split(" and ") if isinstance(authors, str) else authors
    return joint.join(names)
