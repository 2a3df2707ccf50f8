"""The stage of a run that scores general texts by the model as it was, the bases and adapters."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE
from foretune.formats import read_json
from foretune.processes import num_processes
from foretune.recipes.blocks import ForgettingBlock
from foretune.recipes.console import Console
from foretune.recipes.folder import write_json
from foretune.tasks.readers import read_rows

FORGETTING_FILE = "forgetting.json"


def check_texts_of(block: ForgettingBlock, model: Any, tokenizer: Any) -> None:
    """Checks that there are texts and that the model can score them.

    Raises:
        UserError: As `general_texts`, or the model does not predict tokens.
    """
    from foretune.evaluation.forgetting import encoded_texts

    if num_processes() > 1:
        raise UserError(
            "general texts are scored in a single process: remove forgetting, or launch one process"
        )
    encoded_texts(model, tokenizer, general_texts(block), block.max_tokens)


def general_texts(block: ForgettingBlock) -> list[str]:
    """The first texts of the source.

    Raises:
        UserError: There is no such source, it has too few rows, or a row has no text.
    """
    texts: list[str] = []
    for row in read_rows(block.source):
        text = row.fields.get("text")
        if not isinstance(text, str) or not text.strip():
            place = f"{row.file}, {row.unit} {row.number}"
            raise UserError(f"{place}: forgetting reads a column text, which has no text here")
        texts.append(text)
        if len(texts) == block.max_rows:
            break
    if len(texts) < 2:
        raise UserError(
            f"forgetting.source={block.source} has {len(texts)} rows; two are the least"
        )
    return texts


def forgetting_stage(
    block: ForgettingBlock | None,
    model: Any,
    tokenizer: Any,
    bases: Mapping[str, Any],
    out: Path,
    console: Console,
) -> dict[str, Any] | None:
    """Scores of the texts by each base, and by each with adapters of unseen tasks.

    Args:
        block: The block of the recipe; None where it has none.
        model: The model as it was.
        tokenizer: Its tokenizer.
        bases: Name → base of the first repeat, loaded on access.
        out: Folder of the run, with the adapters of the first repeat.
        console: Is told what happens.
    """
    if block is None:
        return None
    texts = general_texts(block)
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if (out / FORGETTING_FILE).is_file():
        earlier = read_json(out / FORGETTING_FILE, dict[str, Any])
        if earlier.get("digest") == digest:
            console.say("forgetting: already done")
            return earlier
    from foretune.evaluation.forgetting import change, text_scores

    def scores_of(model: Any) -> np.ndarray:
        return text_scores(model, tokenizer, texts, block.max_tokens)

    console.say(f"scoring {len(texts)} general texts")
    before = scores_of(model)
    rows: list[dict[str, Any]] = []
    for name, base in bases.items():
        retrained = scores_of(base)
        row: dict[str, Any] = {
            "name": name,
            "base": float(retrained.mean()),
            "base_change": change(retrained, before),
        }
        adapters = sorted(path for path in (out / "adapters" / name).glob("*") if path.is_dir())
        adapted: list[np.ndarray] = []
        for adapter in adapters[: block.adapters]:
            with _with(base, adapter) as with_adapter:
                adapted.append(scores_of(with_adapter))
        if adapted:
            mean = np.mean(adapted, axis=0)
            row |= {
                "adapters": len(adapted),
                "adapted": float(mean.mean()),
                "adapted_change": change(mean, before),
            }
        rows.append(row)
    record = {
        "source": block.source,
        "texts": len(texts),
        "digest": digest,
        "before": float(before.mean()),
        "bases": rows,
    }
    write_json(out / FORGETTING_FILE, record)
    return record


@contextlib.contextmanager
def _with(model: Any, adapter: Path) -> Iterator[Any]:
    """The base with an adapter, inside the block; or the whole model of a task where it has one."""
    from peft import PeftModel

    from foretune.models.loading import load_base

    if not (adapter / ADAPTER_CONFIG_FILE).is_file():
        yield load_base(adapter)[0]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, str(adapter))
    try:
        yield adapted
    finally:
        adapted.unload()
