"""What MkDocs does not do itself, while the site is built.

Pages come from outside docs/ (the changelog, the guide for contributors), from the docstrings (the
public names, in the sections of reference.md) and from the command line's help. Links to files
that are not pages of the site lead to the repository. The methods' pages are listed by verb.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import typer.cli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import foretune
from foretune.cli import app
from foretune.methods import methods_of

ROOT = Path(__file__).resolve().parents[1]
NAMES = set(foretune.__all__) - {"__version__"}
REFERENCE = "reference.md"
VERBS = {
    "retrain": "Retraining",
    "adapt": "Adapting",
    "fuse": "Fusing",
    "prune": "Pruning",
    "decode": "Decoding",
}
OUTSIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"^[ ]*```.*?^[ ]*```|`[^`\n]+`|(?<=\]\()[^)\s]+(?=\))", re.DOTALL | re.MULTILINE)
SECTION = re.compile(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"`(\w+)[^`]*`")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the methods in the navigation, in the order of their table."""
    for entry in config.nav or ():
        if "Methods" in entry:
            entry["Methods"] = [
                {title: [{name: f"methods/{name}.md"} for name in methods_of(verb)]}
                for verb, title in VERBS.items()
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not files of docs/."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    pages = {"cli.md": command_line(), **python_api((ROOT / "docs" / REFERENCE).read_text("utf-8"))}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns each link to a file into one to its page, or to the repository if it has none."""
    if page.file.abs_src_path is None:  # generated from code: no links to files
        return markdown
    folder = Path(page.file.abs_src_path).parent
    pages = {file.abs_src_path: file.src_uri for file in files if file.abs_src_path}

    def link(match: re.Match[str]) -> str:
        target, hash_, anchor = match[0].partition("#")
        if not target or match[0].startswith(("`", " ", "http:", "https:", "mailto:")):
            return match[0]
        path = (folder / target).resolve()
        if str(path) in pages:
            start = Path(page.file.src_uri).parent
            return os.path.relpath(pages[str(path)], start) + hash_ + anchor
        if not path.exists():
            return match[0]  # MkDocs refuses it, by its page
        kind = "tree" if path.is_dir() else "blob"
        return f"{config.extra['repository']}/{kind}/main/{path.relative_to(ROOT)}{hash_}{anchor}"

    markdown = LINK.sub(link, markdown)
    return NAME.sub(to_docstring, markdown) if page.file.src_uri == REFERENCE else markdown


def to_docstring(match: re.Match[str]) -> str:
    """A public name in code, linked to its docstring."""
    return f"[{match[0]}][foretune.{match[1]}]" if match[1] in NAMES else match[0]


def python_api(reference: str) -> dict[str, str]:
    """A page for each section of reference.md, with the docstrings of the names it lists.

    A row of a table lists the names of its first column, a paragraph all of its names.
    """
    pages = {}
    for title, text in SECTION.findall(reference):
        lines = [line.split("|")[1] if line[:1] == "|" else line for line in text.split("\n")]
        names = dict.fromkeys(name for line in lines for name in NAME.findall(line))
        blocks = [f"::: foretune.{name}" for name in names if name in NAMES]
        file = f"api/{title.lower().replace(' ', '-')}.md"
        pages[file] = "\n\n".join([f"# {title}", *blocks, ""])
    return pages


def command_line() -> str:
    """The help of every command, as Markdown."""
    command: Any = typer.main.get_command(app)
    uncut(command)
    context = command.make_context("foretune", [], resilient_parsing=True)
    return typer.cli.get_docs_for_click(
        obj=command, ctx=context, name="foretune", title="Command line"
    )


def uncut(command: Any) -> None:
    """Lists of commands show the whole first line of each, which typer would cut."""
    for below in getattr(command, "commands", {}).values():
        below.short_help = re.split(r"(?<=\.)\s", below.help)[0]
        uncut(below)
