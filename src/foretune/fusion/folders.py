"""`foretune fuse` on folders: read settings and samples, measure, fuse, save."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.claims import output_folder
from foretune.errors import UserError, did_you_mean
from foretune.methods import make, method_class_of
from foretune.recipes.overrides import Setting
from foretune.verbs import FuseMethod

if TYPE_CHECKING:
    from foretune.fusion.comparison import Comparison
    from foretune.fusion.sample_rows import Samples

ARGUMENT_FORM = "NAME=FOLDER or KEY=VALUE"
AUTO = "auto"  # in place of a method: the best by held-out rows


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed command line.

    Args:
        method: The method's record; None for `auto`.
        finetuned: Task → folder of its fine-tuned model.
    """

    method: FuseMethod[Any] | None
    finetuned: dict[str, Path]


def parse_request(name: str, arguments: Sequence[str]) -> Request:
    """Split arguments into models (`NAME=FOLDER`) and settings (`KEY=VALUE`, KEY a method's field).

    Raises:
        UserError: No fuse method of that name, an argument without `=`, a name given twice, or
            neither a field nor a folder.
    """
    is_auto = name == AUTO
    fields = [] if is_auto else [f.name for f in dataclasses.fields(method_class_of(name, "fuse"))]
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
    return Request(None if is_auto else make(name, **settings), finetuned)


def fuse_folders(
    base: str,
    request: Request,
    out: Path,
    *,
    samples: Path | None = None,
    num_samples: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    allow_unverified: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Fuse the models of folders and save the result; with samples, measure every fusion first.

    Args:
        base: A model's folder, a GGUF file, "minilm" or "smollm2".
        request: See `parse_request`.
        out: Folder of the fused model.
        samples: A file of rows with `task` and `text`, and `label` for classifiers: a part makes
            the gate of gate=activations, the others measure.
        num_samples: Texts per task that make the gate, at most.
        seed: Seed by which rows are drawn.
        overwrite: Replace a fused model in `out`.
        allow_unverified: Whether to take adapters that do not record their base.
        progress: Called with the name of each fusion before it is measured.

    Returns:
        out, method, names, own_heads, seconds, and the fields of the method's report, with samples
        also `measured` (`Comparison.to_dict`).

    Raises:
        UserError: `out` may not be written, `auto` without samples, or an error of `foretune.fuse`.
    """
    import foretune

    options: dict[str, Any] = {"allow_unverified": allow_unverified}
    if request.method is None and samples is None:
        raise UserError(
            "fuse auto takes the best fusion by held-out rows, and there are none: give --samples, "
            "a file of rows with task and text (and label for classifiers)"
        )
    reads: list[Path | str] = [base, *request.finetuned.values()]
    reads += [] if samples is None else [samples]
    with output_folder(out, "fuse", overwrite=overwrite, at_once=True, reads=reads) as folder:
        start = time.perf_counter()
        method, measured = request.method, None
        if samples is not None:
            from foretune.fusion.sample_rows import read_samples

            rows = read_samples(samples, list(request.finetuned), num_samples, seed)
            measured, method = _measure(base, request, rows, progress, options)
            if getattr(method, "gate", None) == "activations":
                options["samples"] = rows.gate
        assert method is not None
        fused = foretune.fuse(base, request.finetuned, method, **options)
        if measured is not None:
            fused.report["measured"] = measured.to_dict()
        fused.save(folder)
    return {
        "out": str(out),
        "method": fused.method,
        "names": fused.names,
        "own_heads": bool(fused.heads),
        "seconds": time.perf_counter() - start,
        **fused.report,
    }


def _measure(
    base: str,
    request: Request,
    rows: Samples,
    progress: Callable[[str], None] | None,
    options: Mapping[str, Any],
) -> tuple[Comparison, FuseMethod[Any]]:
    """What was measured, and the method that was asked for or chosen."""
    from foretune.fusion.comparison import compare_fusions, method_of

    measured = compare_fusions(
        base, request.finetuned, rows, request.method, progress=progress, **options
    )
    return measured, request.method or method_of(measured.chosen)


def settings_of(method: Mapping[str, Any]) -> str:
    """The settings of a method's record as `key=value, …`."""
    return ", ".join(f"{k}={'null' if v is None else v}" for k, v in method.items() if k != "name")
