"""`foretune fuse` on folders: reads the settings and the samples, fuses, saves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foretune.errors import UserError, did_you_mean
from foretune.methods import make, method_class
from foretune.recipes.yaml_io import parse_yaml


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Args:
        method: The method's record.
        finetuned: Name → folder.
    """

    method: Any
    finetuned: dict[str, Path]


def parse_request(name: str, given: Sequence[str]) -> Request:
    """Sorts `NAME=FOLDER` from `KEY=VALUE`: a field of the method is a setting.

    Raises:
        UserError: No method of that name that fuses, no `=`, a name twice, or neither a field nor a
            folder.
    """
    cls: Any = method_class(name)
    if cls.verb != "fuse":
        raise UserError(
            f'fuse takes a method whose verb is fuse, got "{name}", whose verb is {cls.verb}; see '
            "foretune ls methods"
        )
    fields = [f.name for f in dataclasses.fields(cls)]
    settings: dict[str, Any] = {}
    finetuned: dict[str, Path] = {}
    for part in given:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UserError(f'"{part}" must read NAME=FOLDER or KEY=VALUE')
        if key in settings or key in finetuned:
            raise UserError(f"{key} stands twice")
        if key in fields:
            settings[key] = parse_yaml(value, f'setting "{part}"')
        elif Path(value).expanduser().is_dir():
            finetuned[key] = Path(value).expanduser()
        else:
            have = f"it has {', '.join(fields)}" if fields else "it has none"
            raise UserError(
                f'"{part}": no folder {value}, and {name} has no field "{key}"; {have}.'
                f"{did_you_mean(key, fields)}"
            )
    if not finetuned:
        raise UserError("nothing to fuse: give NAME=FOLDER of at least one fine-tuned model")
    return Request(make(name, **settings), finetuned)


def read_samples(file: Path, names: Sequence[str], most: int) -> dict[str, list[str]]:
    """The first texts of each task in a file of rows with `task` and `text`.

    Raises:
        UserError: A row without a text, or a task without rows.
    """
    from foretune.tasks.readers import read_rows

    found: dict[str, list[str]] = {name: [] for name in names}
    seen: set[str] = set()
    for row in read_rows(str(file)):
        task, text = row.fields.get("task"), row.fields.get("text")
        seen.add(str(task))
        if task not in found or len(found[task]) == most:
            continue
        if not isinstance(text, str):
            raise UserError(
                f'{row.place}: samples need "task" and "text", got {", ".join(row.fields)}'
            )
        found[task].append(text)
    absent = [name for name in names if not found[name]]
    if absent:
        raise UserError(
            f"{file} has no rows of task {', '.join(absent)}; it has {', '.join(sorted(seen)[:8])}"
        )
    return found


def fuse_folders(
    base: str,
    request: Request,
    out: Path,
    *,
    samples: Path | None = None,
    num_samples: int = 16,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fuses folders and saves the result.

    Args:
        base: A model's folder, or "minilm".
        request: From `parse_request`.
        out: The fused model's folder.
        samples: For gate=activations: a file of rows with `task` and `text`.
        num_samples: Texts of each task that are taken from it.
        overwrite: Replace a fused model that is in `out`.

    Returns:
        out, method, names, seconds, and the method's report.

    Raises:
        UserError: `out` is not empty, or what `foretune.fuse` raises.
    """
    import foretune

    _check_out(out, overwrite, [Path(base), *request.finetuned.values()])
    options: dict[str, Any] = {}
    if samples is not None:
        if request.method.name != "smile":
            raise UserError(f"--samples is for smile; {request.method.name} needs none")
        options["samples"] = read_samples(samples, list(request.finetuned), num_samples)
    start = time.perf_counter()
    fused = foretune.fuse(base, request.finetuned, request.method, **options)
    fused.save(out)
    return {
        "out": str(out),
        "method": fused.method,
        "names": fused.names,
        "own_heads": bool(fused.heads),
        "seconds": time.perf_counter() - start,
        **fused.report,
    }


def _check_out(out: Path, overwrite: bool, used: Sequence[Path]) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out needs a folder")
    if any(out.resolve() == path.expanduser().resolve() for path in used):
        raise UserError(f"--out {out} is one of the models that are fused; choose another folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if names and not overwrite:
        raise UserError(
            f"{out} is not empty: --overwrite replaces it, another folder leaves it alone"
        )
    if names and "fused.json" not in names:
        raise UserError(
            f"{out} holds no fused model ({', '.join(sorted(names)[:3])}, …): --overwrite does not "
            "remove it; choose another folder"
        )


def settings_of(method: Mapping[str, Any]) -> str:
    """A record's fields as `key=value, …`."""
    return ", ".join(f"{k}={'null' if v is None else v}" for k, v in method.items() if k != "name")
