"""The stage of a run that scores what the model could do before: as it was, bases and adapters."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.errors import UserError
from foretune.files import ADAPTER_CONFIG_FILE
from foretune.formats import read_json
from foretune.processes import num_processes
from foretune.recipes.blocks import ForgettingBlock
from foretune.recipes.console import Console
from foretune.recipes.folder import write_json
from foretune.tasks.readers import read_rows

if TYPE_CHECKING:
    from foretune.evaluation.benchmarks import Benchmarks
    from foretune.evaluation.forgetting import Measured

FORGETTING_FILE = "forgetting.json"


def check_forgetting(block: ForgettingBlock, model: Any, tokenizer: Any) -> None:
    """Checks that there is something to score, and that the model can score it.

    Raises:
        UserError: As `general_texts` and `Benchmarks`, there is neither, or the model does not
            predict tokens.
    """
    from foretune.evaluation.forgetting import encoded_texts

    if num_processes() > 1:
        raise UserError(
            "general texts are scored in a single process: remove forgetting, or launch one process"
        )
    if block.source is None and not block.benchmarks:
        raise UserError("forgetting needs source (general texts), benchmarks (of lm-eval), or both")
    encoded_texts(model, tokenizer, general_texts(block), block.max_tokens)
    benchmarks = _benchmarks_of(block)
    if benchmarks is not None:
        benchmarks.try_on(model, tokenizer)


def _benchmarks_of(block: ForgettingBlock) -> Benchmarks | None:
    """The benchmarks, loaded; None where the block names none."""
    from foretune.evaluation.benchmarks import Benchmarks

    return Benchmarks(block.benchmarks, block.max_examples) if block.benchmarks else None


def general_texts(block: ForgettingBlock) -> list[str]:
    """The first texts of the source; none without one.

    Raises:
        UserError: There is no such source, it has too few rows, or a row has no text.
    """
    texts: list[str] = []
    if block.source is None:
        return texts
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
    """What each base reaches in each measure, and each with adapters of unseen tasks.

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
    benchmarks = _benchmarks_of(block)
    inputs = [*texts, "" if benchmarks is None else benchmarks.digest, str(block)]
    digest = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    if (out / FORGETTING_FILE).is_file():
        earlier = read_json(out / FORGETTING_FILE, dict[str, Any])
        if earlier.get("digest") == digest:
            console.say("forgetting: already done")
            return earlier
    from foretune.evaluation.forgetting import change, mean_of, measured_texts

    def measure(model: Any) -> list[Measured]:
        measured = [] if benchmarks is None else benchmarks.measure(model, tokenizer)
        if texts:
            measured.insert(0, measured_texts(model, tokenizer, texts, block.max_tokens))
        return measured

    console.say("forgetting: the model as it was")
    before = measure(model)
    measures: list[dict[str, Any]] = [
        {
            "name": measured.name,
            "metric": measured.metric,
            "higher_is_better": measured.higher_is_better,
            "examples": measured.num_examples,
            "before": measured.score,
            "bases": [],
        }
        for measured in before
    ]
    for name, base in bases.items():
        console.say(f"forgetting: {name}")
        retrained = measure(base)
        adapters = sorted(path for path in (out / "adapters" / name).glob("*") if path.is_dir())
        adapted: list[list[Measured]] = []
        for adapter in adapters[: block.adapters]:
            with _with(base, adapter) as with_adapter:
                adapted.append(measure(with_adapter))
        for i, measured in enumerate(before):
            row: dict[str, Any] = {
                "name": name,
                "base": retrained[i].score,
                "base_change": change(retrained[i], measured),
            }
            if adapted:
                mean = mean_of([of_adapter[i] for of_adapter in adapted])
                row |= {
                    "adapters": len(adapted),
                    "adapted": mean.score,
                    "adapted_change": change(mean, measured),
                }
            measures[i]["bases"].append(row)
    record = {"source": block.source, "digest": digest, "measures": measures}
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
