"""`foretune datastore` on folders and files: building, tuning and evaluating a store."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foretune.claims import output_folder
from foretune.decoding.prompts import decode_method
from foretune.errors import UserError
from foretune.recipes.console import SILENT, Console
from foretune.tasks.readers import read_rows


def rows_of(source: str, *, task: str | None = None, split: str | None = None) -> list[Any]:
    """The rows of a file or dataset, optionally of one task or split.

    Args:
        source: A path or a dataset, as in a recipe's `tasks.source`.
        task: Only rows of this task; None for all.
        split: Only rows of this split; None for all.

    Raises:
        UserError: The source does not exist, or has no such row.
    """
    selected, tasks, splits = [], set(), set()
    for row in read_rows(source):
        its_split = row.fields.get("split", row.split)
        tasks.add(row.fields.get("task"))
        splits.add(its_split)
        if task in (None, row.fields.get("task")) and split in (None, its_split):
            selected.append(row.fields)
    if not selected:
        condition = ", ".join(f"{k} {v}" for k, v in (("task", task), ("split", split)) if v)
        has = sorted(str(v) for v in (tasks if task else splits) if v is not None)
        raise UserError(
            f"{source} has no row"
            + (f" of {condition}; it has {', '.join(has[:8]) or 'none'}" if condition else "")
        )
    return selected


def build_folder(
    model: str, rows: str, out: Path, *, task: str | None, split: str | None, **options: Any
) -> dict[str, Any]:
    """Builds a store and saves it.

    Args:
        model: A model folder, a hub id, or a PEFT folder.
        rows: A path or a dataset.
        out: The store's folder.
        task: Only rows of this task; None for all.
        split: Only rows of this split; None for all.
        options: `overwrite`, `allow_unverified` (whether to take an adapter that does not record
            its base), and the options of `ReferenceStore.build`.

    Returns:
        JSON-able: out, kind, rows, entries, hidden_size, labels, megabytes, seconds.
    """
    from foretune.decoding.peft_model import load_reader
    from foretune.decoding.reference_store import ReferenceStore

    overwrite = options.pop("overwrite")
    allow_unverified = options.pop("allow_unverified", False)
    reads: list[Path | str] = [model, rows]
    with output_folder(out, "datastore", overwrite=overwrite, at_once=True, reads=reads) as folder:
        selected = rows_of(rows, task=task, split=split)
        loaded, tokenizer = load_reader(model, allow_unverified=allow_unverified)
        began = time.perf_counter()
        store = ReferenceStore.build(loaded, selected, tokenizer=tokenizer, **options)
        seconds = time.perf_counter() - began
        store.name = str(Path(model).resolve()) if Path(model).is_dir() else model
        store.save(folder)
    return {
        "out": str(out),
        "kind": store.kind,
        "rows": len(selected),
        "entries": len(store),
        "hidden_size": store.keys.shape[1],
        "labels": list(store.labels),
        "megabytes": round(store.keys.nbytes / 2**20, 2),
        "seconds": round(seconds, 3),
    }


def tune_folder(folder: Path, *, heads: int | None, sample: int, seed: int) -> dict[str, Any]:
    """Tunes a store, writes the result into its folder and returns it."""
    from foretune.decoding.reference_store import ReferenceStore

    store = ReferenceStore.load(folder)
    if heads is not None:
        store.lookup = dataclasses.replace(store.lookup, heads=heads)
    tuned = store.tune(sample=sample, seed=seed)
    store.save_lookup(folder)
    return tuned


def evaluate_folder(
    folder: Path,
    rows: str,
    changes: Sequence[str] = (),
    *,
    model: str | None = None,
    task: str | None = None,
    split: str | None = None,
    console: Console = SILENT,
    allow_unverified: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Scores a store and its baselines on held-out rows; see `evaluate_store`.

    Args:
        folder: The store's folder.
        rows: A path or a dataset.
        changes: `key=value` for the fields of RTD.
        model: A model folder; None for the one that the store names.
        task: Only rows of this task; None for all.
        split: Only rows of this split; None for all.
        console: Shows the progress of training LoRA.
        allow_unverified: Whether to take an adapter that does not record its base.
        options: Options of `evaluate_store`.

    Raises:
        UserError: The folder is not a store, its model is unknown or a different one, or the rows
            are of another kind than the store's.
    """
    from foretune.decoding.store_table import evaluate_store

    selected = rows_of(rows, task=task, split=split)
    store, loaded, tokenizer, record = _opened(folder, changes, model, allow_unverified)
    with console.bar("training LoRA, a baseline", rounds=3) as progress:
        return evaluate_store(
            loaded,
            tokenizer,
            store,
            selected,
            lookup=record.lookup(store),
            progress=progress,
            **options,
        )


def predict_folder(
    folder: Path,
    rows: str,
    changes: Sequence[str] = (),
    *,
    model: str | None = None,
    task: str | None = None,
    split: str | None = None,
    shown: int = 3,
    allow_unverified: bool = False,
) -> dict[str, Any]:
    """The labels of rows by a store; the arguments are those of `evaluate_folder` and `classify`.

    Returns:
        JSON-able: store, and results, each with the row's `text` and what `classify` returns.

    Raises:
        UserError: As `evaluate_folder`, or the store has no labels.
    """
    from foretune.decoding.classify import classify

    selected = rows_of(rows, task=task, split=split)
    store, loaded, tokenizer, record = _opened(folder, changes, model, allow_unverified)
    lookup = record.lookup(store)
    labelled = classify(loaded, tokenizer, store, selected, lookup=lookup, shown=shown)
    names = ("prompt", "text", "context")
    texts = [next((row[n] for n in names if row.get(n) is not None), "") for row in selected]
    pairs = zip(texts, labelled, strict=True)
    return {"store": str(folder), "results": [{"text": text, **row} for text, row in pairs]}


def _opened(
    folder: Path, changes: Sequence[str], model: str | None, allow_unverified: bool
) -> tuple[Any, Any, Any, Any]:
    """(store, its model, the tokenizer, the record of RTD).

    Raises:
        UserError: The folder is not a store, or its model is unknown.
    """
    record = decode_method("rtd", changes)
    from foretune.decoding.peft_model import load_reader
    from foretune.decoding.reference_store import ReferenceStore

    store = ReferenceStore.load(folder)
    name = model if model is not None else store.name
    if name is None:
        raise UserError(f"{folder} does not name the model that it was built with: give --model")
    loaded, tokenizer = load_reader(name, allow_unverified=allow_unverified)
    return store, loaded, tokenizer, record
