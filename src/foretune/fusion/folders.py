"""`foretune fuse` on folders: read settings and samples, fuse, save."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foretune.claims import output_folder
from foretune.errors import UserError, did_you_mean
from foretune.methods import make, method_class_of
from foretune.recipes.overrides import Setting
from foretune.verbs import FuseMethod

ARGUMENT_FORM = "NAME=FOLDER or KEY=VALUE"


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line.

    Args:
        method: The method's record.
        finetuned: Task → folder of its fine-tuned model.
    """

    method: FuseMethod[Any]
    finetuned: dict[str, Path]


def parse_request(name: str, arguments: Sequence[str]) -> Request:
    """Split arguments into models (`NAME=FOLDER`) and settings (`KEY=VALUE`, KEY a method's field).

    Raises:
        UserError: No fuse method of that name, an argument without `=`, a name given twice, or
            neither a field nor a folder.
    """
    fields = [f.name for f in dataclasses.fields(method_class_of(name, "fuse"))]
    settings: dict[str, Any] = {}
    finetuned: dict[str, Path] = {}
    for argument in arguments:
        setting = Setting.parse(argument, ARGUMENT_FORM)
        key, folder = setting.key, Path(setting.text).expanduser()
        if not setting.text:
            raise UserError(f'"{argument}" must read {ARGUMENT_FORM}')
        if key in settings or key in finetuned:
            raise UserError(f"{key} is given twice")
        if key in fields:
            settings[key] = setting.value()
        elif folder.is_dir():
            finetuned[key] = folder
        else:
            available = f"it has {', '.join(fields)}" if fields else "it has none"
            raise UserError(
                f'"{argument}": no folder {setting.text}, and {name} has no field "{key}"; '
                f"{available}.{did_you_mean(key, fields)}"
            )
    if not finetuned:
        raise UserError("nothing to fuse: give NAME=FOLDER of at least one fine-tuned model")
    return Request(make(name, **settings), finetuned)


def read_samples(file: Path, names: Sequence[str], limit: int) -> dict[str, list[str]]:
    """The first `limit` texts of each task in a file of rows with `task` and `text`.

    Raises:
        UserError: A row without a text, or a task without rows.
    """
    from foretune.tasks.readers import read_rows

    texts: dict[str, list[str]] = {name: [] for name in names}
    tasks: set[str] = set()
    for row in read_rows(str(file)):
        task, text = row.fields.get("task"), row.fields.get("text")
        tasks.add(str(task))
        if task not in texts or len(texts[task]) == limit:
            continue
        if not isinstance(text, str):
            raise UserError(
                f'{row.place}: samples need "task" and "text", got {", ".join(row.fields)}'
            )
        texts[task].append(text)
    missing = [name for name in names if not texts[name]]
    if missing:
        raise UserError(
            f"{file} has no rows of task {', '.join(missing)}; its tasks: "
            f"{', '.join(sorted(tasks)[:8])}"
        )
    return texts


def fuse_folders(
    base: str,
    request: Request,
    out: Path,
    *,
    samples: Path | None = None,
    num_samples: int = 16,
    overwrite: bool = False,
    allow_unverified: bool = False,
) -> dict[str, Any]:
    """Fuse the models of some folders and save the result.

    Args:
        base: A model's folder, a GGUF file, "minilm" or "smollm2".
        request: See `parse_request`.
        out: Folder of the fused model.
        samples: For gate=activations: a file of rows with `task` and `text`.
        num_samples: Texts per task read from `samples`.
        overwrite: Replace a fused model in `out`.
        allow_unverified: Whether to take adapters that do not record their base.

    Returns:
        out, method, names, own_heads, seconds, and the fields of the method's report.

    Raises:
        UserError: `out` may not be written, samples for a method that takes none, or an error of
            `foretune.fuse`.
    """
    import foretune

    options: dict[str, Any] = {"allow_unverified": allow_unverified}
    if samples is not None and request.method.name != "smile":
        raise UserError(f"--samples is for smile; {request.method.name} takes none")
    reads: list[Path | str] = [base, *request.finetuned.values()]
    reads += [] if samples is None else [samples]
    with output_folder(out, "fuse", overwrite=overwrite, at_once=True, reads=reads) as folder:
        if samples is not None:
            options["samples"] = read_samples(samples, list(request.finetuned), num_samples)
        start = time.perf_counter()
        fused = foretune.fuse(base, request.finetuned, request.method, **options)
        fused.save(folder)
    return {
        "out": str(out),
        "method": fused.method,
        "names": fused.names,
        "own_heads": bool(fused.heads),
        "seconds": time.perf_counter() - start,
        **fused.report,
    }


def settings_of(method: Mapping[str, Any]) -> str:
    """The settings of a method's record as `key=value, …`."""
    return ", ".join(f"{k}={'null' if v is None else v}" for k, v in method.items() if k != "name")
