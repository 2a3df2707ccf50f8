"""`foretune export`: adapters as other programs take them."""

from __future__ import annotations

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
            llama.cpp per adapter.
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
        for folder in folders:
            model = bases.of(folder)
            stored = read_adapter(folder, model, allow_unverified=True)
            write_gguf_lora(stored, model, target / f"{folder.name}.gguf")
            notes += stored.notes
    files = [str(out / f"{folder.name}.gguf") for folder in folders]
    return {"format": format, "files": files, "notes": notes}


def _merge(bases: BasesOfAdapters, folder: Path, target: Path) -> list[str]:
    """Saves the base with an adapter in its weights; returns notes on the adapter.

    Raises:
        UserError: The adapter does not fit, or cannot be merged.
    """
    from peft import PeftModel

    model: Any = bases.of(folder)
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
    save_base(merged, bases.tokenizer, target)
    return notes
