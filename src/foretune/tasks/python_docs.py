"""A task collection that needs no download: the documentation of installed Python modules.

One module or package is one task. An example is a function, class or method: its name and
arguments are the context, the first sentence of its docstring is the response. Sources are read
with `ast`; nothing is imported. The data depends on the installed versions, so scores are
comparable on one machine only.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Any

from foretune.errors import UserError
from foretune.tasks.seeds import seed_for

# Packages that foretune's dependencies bring along; those not installed are skipped.
PACKAGES = (
    *("PIL", "accelerate", "aiohttp", "anyio", "click", "datasets", "dateutil", "dill"),
    *("filelock", "fontTools", "fsspec", "httpx", "httpx2", "huggingface_hub", "jinja2"),
    *("joblib", "markdown_it", "matplotlib", "mpmath", "networkx", "numpy", "packaging"),
    *("pandas", "peft", "psutil", "pyarrow", "pydantic", "pygments", "pyparsing", "regex"),
    *("requests", "rich", "safetensors", "scipy", "setuptools", "sympy", "tokenizers", "torch"),
    *("tqdm", "transformers", "typer", "typing_extensions", "urllib3", "yaml"),
)
# Removed from newer Pythons, or hardly documented.
SKIPPED_MODULES = ("antigravity", "distutils", "idlelib", "lib2to3", "test", "this")
MAX_FILES = 100  # per package, those nearest to its top
MAX_NAMES = 400  # per module, drawn with the seed
ENOUGH_NAMES = 400  # once reached, no further file is parsed
MIN_NAMES = 60  # a module with fewer is skipped
MAX_CONTEXT = 100  # characters
SKIPPED_PARTS = re.compile(r"(tests?|testing|test_.*|.*_test|conftest|_?vendor(ed)?|externals)$")
SIGNATURE = re.compile(r"^[\w.]+\s?\([^)]*\)\s*(->\s*[\w.\[\], ]+?)?\s*(--|[-:]|->|$)\s*")
NO_PROSE = (">>>", "::", "==", "..", "@", "$", "\\", "{", "|")
MARKUP = (
    (re.compile(r":[a-z:]+:`~?([^`<]+?)\s*(<[^`]*>)?`"), r"\1"),  # :class:`~torch.Tensor`
    (re.compile(r"\[`~?([^`]+)`\](\([^)]*\))?"), r"\1"),  # [`~Trainer`](…)
    (re.compile(r"`+([^`]+)`+_?"), r"\1"),  # ``x`` and `x`_
    (re.compile(r"\*{1,2}(\w[^*]*)\*{1,2}"), r"\1"),  # *args* and **bold**
)
SECTION = re.compile(r"\s+(Args?|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):.*")
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)\.(?=\s+[A-Z\"'(]|\s*$)")


def read_python_docs(
    seed: int = 0, modules: Mapping[str, Path] | None = None
) -> list[dict[str, Any]]:
    """Choice examples (task, split, context, response) of each module that is documented enough.

    Args:
        seed: Random seed of the names sampled from large modules, and of the splits (20 % but at
            least 20 test examples, 10 % validation).
        modules: File or folder of each module, by name; None for `installed_modules()`.

    Raises:
        UserError: No module has enough documented names.
    """
    modules = installed_modules() if modules is None else modules
    rows: list[dict[str, Any]] = []
    for name in sorted(modules):
        pairs = _documented(name, modules[name])
        if len(pairs) < MIN_NAMES:
            continue
        rng = random.Random(seed_for(seed, name))
        pairs = rng.sample(pairs, min(MAX_NAMES, len(pairs)))
        num_test, num_validation = max(20, len(pairs) // 5), len(pairs) // 10
        for i, (context, response) in enumerate(pairs):
            if i < num_test:
                split = "test"
            else:
                split = "validation" if i < num_test + num_validation else "train"
            rows.append({"task": name, "split": split, "context": context, "response": response})
    if not rows:
        raise UserError(
            f"no Python module with {MIN_NAMES} documented names among {len(modules)}: "
            "is the standard library installed without its sources?"
        )
    return rows


def installed_modules() -> dict[str, Path]:
    """File or folder of each public standard module and each installed package of `PACKAGES`."""
    modules: dict[str, Path] = {}
    library = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED_MODULES:
            continue
        for path in (library / name, library / f"{name}.py"):
            if path.exists():
                modules[name] = path
                break
    for name in PACKAGES:
        try:
            spec = importlib.util.find_spec(name)  # does not import a top-level name
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            origin = Path(spec.origin)
            modules[name] = origin.parent if spec.submodule_search_locations else origin
    return modules


def _documented(module: str, root: Path) -> list[tuple[str, str]]:
    """(context, response) of a module's public names; names and responses are unique."""
    pairs: dict[str, tuple[str, str]] = {}
    responses: set[str] = set()
    files = {file: file.read_bytes() for file in _files(root)}
    # Parsing is slow: skip a module that cannot have enough docstrings.
    if sum(text.count(b'"""') + text.count(b"'''") for text in files.values()) < 2 * MIN_NAMES:
        return []
    for file, text in files.items():
        try:
            with warnings.catch_warnings():  # invalid escapes in third-party strings
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for name, context, docstring in _definitions(tree.body, _dotted(module, root, file)):
            response = first_sentence(docstring)
            if response is None or name in pairs or response.lower() in responses:
                continue
            pairs[name] = (context, response)
            responses.add(response.lower())
        if len(pairs) >= ENOUGH_NAMES:
            break
    return list(pairs.values())


def _files(root: Path) -> list[Path]:
    """The source files of a module, nearest to its top first, without private folders and tests."""
    if root.is_file():
        return [root]
    files = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        private = any(part.startswith("_") for part in parts[:-1])
        if not private and not any(SKIPPED_PARTS.match(part) for part in parts):
            files.append(file)
    files.sort(key=lambda f: (len(f.relative_to(root).parts), f.relative_to(root).as_posix()))
    return files[:MAX_FILES]


def _dotted(module: str, root: Path, file: Path) -> str:
    """The public dotted name of a file: "scipy.stats" for scipy/stats/_morestats.py."""
    parts = () if file == root else file.relative_to(root).with_suffix("").parts
    return ".".join([module, *(part for part in parts if not part.startswith("_"))])


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str, str]]:
    """(name, name with arguments, docstring) of the public functions, classes and methods."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield name, _context(name, node), docstring
        if isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, name)


def _context(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    """The name with its arguments' names, truncated after the last that fits."""
    function = _init(node) if isinstance(node, ast.ClassDef) else node
    if function is None or _is_property(function):
        return name
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [arg.arg for arg in a.kwonlyargs]
    names += [f"**{a.kwarg.arg}"] if a.kwarg else []
    shown = ""
    for argument in (n for n in names if n not in ("self", "cls")):
        longer = f"{shown}, {argument}" if shown else argument
        if len(name) + len(longer) + 2 > MAX_CONTEXT:
            shown = f"{shown}, …" if shown else "…"
            break
        shown = longer
    return f"{name}({shown})"


def _init(node: ast.ClassDef) -> ast.FunctionDef | None:
    """The `__init__` of a class, if it defines one."""
    methods = (n for n in node.body if isinstance(n, ast.FunctionDef))
    return next((method for method in methods if method.name == "__init__"), None)


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {
        d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "")
        for d in node.decorator_list
    }
    return any("property" in name for name in names)


def first_sentence(docstring: str) -> str | None:
    r"""The first sentence of a docstring as plain text; None if it is too short or too long.

    >>> first_sentence("f(x) -> y\n\nReturn the ``y`` of x, i.e. its image. Slow.")
    'Return the y of x, i.e. its image.'
    >>> first_sentence("Too short.") is None
    True
    """
    for paragraph in cleandoc(docstring).split("\n\n")[:2]:
        text = SECTION.sub("", SIGNATURE.sub("", " ".join(paragraph.split()), count=1))
        if text:
            break
    for pattern, plain in MARKUP:
        text = pattern.sub(plain, text)
    end = SENTENCE_END.search(text)
    text = text[: end.end()] if end else text
    lowered = text.lower()
    if not 3 <= len(text.split()) <= 40 or not re.search(r"[a-z]{3}", lowered):
        return None
    if lowered.startswith((":", "return:", "returns:", "args:")) or "deprecated" in lowered:
        return None
    if any(symbol in text for symbol in NO_PROSE):
        return None
    return text
