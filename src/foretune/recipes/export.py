"""`foretune export`: adapters as other programs take them."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foretune.adapters.gguf_lora import write_gguf_lora
from foretune.adapters.stored_adapter import read_adapter
from foretune.claims import output_folder
from foretune.errors import UserError
from foretune.files import LABELS_FILE, check_file_names
from foretune.formats import read_json
from foretune.models.loading import save_base
from foretune.models.onnx_file import FILE, check_packages, write_onnx
from foretune.models.quantised import refuse_quantised
from foretune.models.surgery import name_outputs
from foretune.recipes.check import BasesOfAdapters, all_adapters
from foretune.recipes.saved_base import find_base


def export_adapters(
    base: Path, adapters: Sequence[Path], out: Path, format: str, *, overwrite: bool = False
) -> dict[str, Any]:
    """Writes adapters in another form.

    Args:
        base: Folder of the base, a GGUF file, or the name of a model.
        adapters: PEFT folders, or folders that hold such folders.
        out: Output folder.
        format: "merged": a model folder with the adapter in its weights; "gguf": a file for
            llama.cpp per adapter; "onnx": a folder with model.onnx per adapter, or of the base
            where there is no adapter.
        overwrite: Replace an earlier export.

    Returns:
        JSON-able: format, files, and notes on the adapters.

    Raises:
        UserError: There is no such base or adapter, an adapter does not fit, or `out` may not be
            written.
    """
    saved = find_base(base)
    folders = all_adapters(adapters)
    if format == "merged" and len(folders) > 1:
        raise UserError(f"one adapter at a time is merged, got {len(folders)}")
    if format == "onnx":
        check_packages()
    elif not folders:
        raise UserError(f"--format {format} needs an adapter: name its folder")
    names = [folder.name for folder in folders]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(
                f"{folders[names.index(name)]} and {folders[place]} have the same name, and so "
                "would their files: export them one after the other"
            )
    check_file_names("adapter", names)
    reads: list[Path | str] = [base, saved.folder, *folders]
    with output_folder(out, "export", overwrite=overwrite, at_once=True, reads=reads) as target:
        bases = BasesOfAdapters(saved.folder, "auto")
        if format == "merged":
            return {
                "format": format,
                "files": [str(out)],
                "notes": _merge(bases, folders[0], target),
            }
        notes: list[str] = []
        if format == "onnx":
            places: dict[str, Path | None] = dict(zip(names, folders, strict=True)) or {"": None}
            for name, adapter in places.items():
                notes += _write_onnx(bases, adapter, target / name)
            files = [str(out / name / FILE) for name in places]
            return {"format": format, "files": files, "notes": notes}
        for folder in folders:
            model = bases.of(folder)
            stored = read_adapter(folder, model, allow_unverified=True)
            write_gguf_lora(stored, model, target / f"{folder.name}.gguf")
            notes += stored.notes
    files = [str(out / f"{folder.name}.gguf") for folder in folders]
    return {"format": format, "files": files, "notes": notes}


def _write_onnx(bases: BasesOfAdapters, adapter: Path | None, target: Path) -> list[str]:
    """Writes model.onnx with tokenizer, config and labels beside it; returns notes.

    Raises:
        UserError: The adapter does not fit, or the model cannot be written.
    """
    model: Any = bases.model
    notes: list[str] = []
    if adapter is not None:
        model, notes = _merged(copy.deepcopy(bases.of(adapter)), adapter)
    target.mkdir(parents=True, exist_ok=True)
    write_onnx(model.float().cpu(), target, bases.tokenizer)
    model.config.save_pretrained(target)
    if bases.tokenizer is not None:
        bases.tokenizer.save_pretrained(target)
    if adapter is not None and (adapter / LABELS_FILE).is_file():
        shutil.copy(adapter / LABELS_FILE, target)
    return notes


def _merge(bases: BasesOfAdapters, folder: Path, target: Path) -> list[str]:
    """Saves the base with an adapter in its weights; returns notes on the adapter.

    Raises:
        UserError: The adapter does not fit, or cannot be merged.
    """
    merged, notes = _merged(bases.of(folder), folder)
    save_base(merged, bases.tokenizer, target)
    return notes


def _merged(model: Any, folder: Path) -> tuple[Any, list[str]]:
    """(the base with an adapter in its weights, notes on the adapter).

    Raises:
        UserError: The adapter does not fit, or cannot be merged.
    """
    from peft import PeftModel

    refuse_quantised(model, "merging", "give the original base")
    notes = read_adapter(folder, model, allow_unverified=True).notes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    if not hasattr(adapted, "merge_and_unload"):
        raise UserError(f"{folder} is an adapter that cannot be merged into weights")
    merged = adapted.merge_and_unload()
    if (folder / LABELS_FILE).is_file():
        name_outputs(merged, read_json(folder / LABELS_FILE, list[str | int | float | None]))
    return merged, notes
