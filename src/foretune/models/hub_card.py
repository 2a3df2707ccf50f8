"""The front matter of model cards, by which the Hugging Face Hub files a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from foretune.printable import in_one_line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

# The Hub's names of what the kinds of objectives do.
TASK_TYPES = {
    ("choice", True): "multiple-choice",
    ("causal-lm", True): "text-generation",
    ("classification", True): "text-classification",
    ("classification", False): "tabular-classification",
    ("regression", False): "tabular-regression",
}
LONGEST = 96  # characters of the id of a repository
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def hub_id(name: str | None) -> str | None:
    """The name if it can be that of a repository of the Hub, and is none on this disk.

    >>> hub_id("org/name"), hub_id("a/b/c"), hub_id("name"), hub_id("./name")
    ('org/name', None, None, None)
    """
    if not name or len(name) > LONGEST or not REPOSITORY.fullmatch(name) or Path(name).exists():
        return None
    return name


def task_type(kind: str | None, texts: bool) -> str:
    """The Hub's name of what a model does.

    Args:
        kind: The kind of its objective.
        texts: Whether it reads texts.

    >>> task_type("choice", True), task_type("denoising", False)
    ('multiple-choice', 'other')
    """
    return TASK_TYPES.get((kind or "", texts), "other")


def result(
    task: str, dataset: str, metric: str, value: float, measured: str | None = None
) -> EvalResult:
    """A score as the Hub lists it in `model-index`.

    Args:
        task: The Hub's name of the task, as `task_type` gives.
        dataset: What was scored on, in words: it is not on the Hub.
        metric: Name of the metric.
        value: The score.
        measured: What the number is, in words; None for the name of the metric alone.
    """
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=task,
        dataset_type="custom",
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(float(value), 4),
        metric_name=measured,
    )


def front_matter(
    *,
    library: str | None,
    tags: Sequence[str],
    name: str,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    license: str | None = None,
    results: Sequence[EvalResult] = (),
) -> str:
    """The front matter of a model card, with the lines `---` around it.

    Args:
        library: The library that loads the model, by the Hub's name; None for none that it knows.
        tags: Tags.
        name: Name of the model in `model-index`.
        base_model: Id of the model on the Hub that this one was made from; None where it is none.
        datasets: Ids of data sets on the Hub.
        license: The license, as the Hub names it; None states none.
        results: Scores.
    """
    from huggingface_hub import ModelCardData

    shown = in_one_line(name).replace("<", "&lt;")  # some show the front matter as a text
    fields: dict[str, Any] = {"eval_results": list(results), "model_name": shown} if results else {}
    data = ModelCardData(
        base_model=base_model,
        datasets=list(datasets) or None,
        license=license,
        library_name=library,
        tags=list(tags),
        **fields,
    )
    # As `data.to_yaml`, which takes ten times as long: there may be a card for each of many tasks.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text = yaml.dump(data.to_dict(), Dumper=dumper, allow_unicode=True, sort_keys=False)
    return f"---\n{text.strip()}\n---\n"
