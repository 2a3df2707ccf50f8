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
from foretune.files import check_file_names
from foretune.models.loading import save_base
from foretune.recipes.check import BasesOfAdapters, adapter_folders
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
        JSON-able: format and files.

    Raises:
        UserError: There is no such base or adapter, an adapter does not fit, or `out` may not be
            written.
    """
    saved = find_base(base)
    folders = [path for folder in adapters for path in adapter_folders(folder)]
    if format == "merged" and len(folders) > 1:
        raise UserError(f"one adapter at a time is merged, got {len(folders)}")
    check_file_names("adapter", [folder.name for folder in folders])
    reads: list[Path | str] = [base, saved.folder, *folders]
    with output_folder(out, "export", overwrite=overwrite, at_once=True, reads=reads) as target:
        bases = BasesOfAdapters(saved.folder)
        if format == "merged":
            _merge(bases, folders[0], target)
            return {"format": format, "files": [str(out)]}
        for folder in folders:
            model = bases.of(folder)
            stored = read_adapter(folder, model, allow_unverified=True)
            write_gguf_lora(stored, model, target / f"{folder.name}.gguf")
    return {"format": format, "files": [str(out / f"{folder.name}.gguf") for folder in folders]}


def _merge(bases: BasesOfAdapters, folder: Path, target: Path) -> None:
    """Saves the base with an adapter in its weights.

    Raises:
        UserError: The adapter does not fit, or cannot be merged.
    """
    from peft import PeftModel

    model: Any = bases.of(folder)
    read_adapter(folder, model, allow_unverified=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    if not hasattr(adapted, "merge_and_unload"):
        raise UserError(f"{folder} is an adapter that cannot be merged into weights")
    save_base(adapted.merge_and_unload(), bases.tokenizer, target)
