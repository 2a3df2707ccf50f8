"""The model cards of what `foretune push` uploads, with code that loads it from the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from foretune.evaluation.report.advice import best_base
from foretune.files import (
    ADAPTER_CONFIG_FILE,
    CARD_FILE,
    CONFIG_FILE,
    RUN_FILE,
    TOKENIZER_CONFIG_FILE,
    TRAINED_ON_FILE,
)
from foretune.formats import RUN, read_json
from foretune.models.base_record import BaseRecord, read_base_record
from foretune.models.hub_card import front_matter, result, task_type
from foretune.models.loading_code import TOWERS, loading_code
from foretune.printable import markdown
from foretune.recipes.hub_files import Upload, comparison_of, is_part, task_folders
from foretune.recipes.model_card import TAGS, results_of
from foretune.training.trained_on import TrainedOnRecord, adapter_card, read_trained_on


class _Config(TypedDict, total=False):
    architectures: list[str] | None


class _RunRecord(TypedDict, total=False):
    validation_score: float | None


def add_cards(
    upload: Upload, folder: Path, repository: str, base_model: str | None, license: str | None
) -> None:
    """Adds the model cards to an upload, and the id of the base to what names it.

    Args:
        upload: What is to be uploaded.
        folder: What the user named.
        repository: Where it is to be.
        base_model: Id of the base on the Hub; None for the one that is recorded.
        license: The license, as the Hub names it; None states none.
    """
    if upload.kind == "run":
        card = _run_card(upload, folder, repository, base_model, license)
    elif upload.kind == "base":
        card = _base_card(upload.place, repository, base_model, license)
    elif upload.kind == "adapter":
        card = _add_adapter(upload, folder, "", repository, base_model, license)
    else:
        for path in task_folders(folder):
            name = f"{path.name}/"
            text = _add_adapter(upload, path, name, repository, base_model, license)
            upload.files[f"{name}{CARD_FILE}"] = text
        card = _adapters_card(folder, repository, base_model, license)
    upload.files[CARD_FILE] = card


def _run_card(
    upload: Upload, folder: Path, repository: str, base_model: str | None, license: str | None
) -> str:
    """The card of the best base of a run."""
    from foretune.evaluation.report.summary import summary_rows

    comparison = comparison_of(folder)
    base = best_base(comparison)
    record = read_base_record(upload.place) or {}
    header, rows = summary_rows(comparison)
    head = front_matter(
        library=_library(upload.place),
        tags=TAGS,
        name=repository.rpartition("/")[2],
        base_model=base_model or record.get("base_model"),
        datasets=record.get("datasets") or [],
        license=license,
        results=results_of(comparison, base["name"], upload.place),
    )
    lines = [
        f"# {markdown(comparison['title'])}",
        "",
        markdown(comparison["verdict"]["sentence"]),
        "",
        f"This is the base of {markdown(base['label'])}. `report.html` shows how it was compared, "
        "`comparison.json` has all scores, `config.yaml` is the recipe.",
        "",
        *_table(header, rows),
        "",
        *_base_code(base.get("model_class"), upload.place, repository),
        *_adapting(record, repository),
    ]
    return "\n".join([head, *lines])


def _base_card(place: Path, repository: str, base_model: str | None, license: str | None) -> str:
    """The card of a base; of a model that foretune did not retrain, its own where it has one."""
    record = read_base_record(place)
    if record is None and is_part(place / CARD_FILE, place):
        return _with_fields((place / CARD_FILE).read_text("utf-8"), base_model, license)
    record = record or {}
    method = record.get("method", {}).get("name")
    objective = record.get("objective", {})
    kind, run = objective.get("kind"), place.parent / RUN_FILE
    score = None
    if method is not None and run.is_file():
        score = read_json(run, _RunRecord, RUN).get("validation_score")
    name = repository.rpartition("/")[2]
    metric = None if kind is None else _metric(objective)
    results = []
    if score is not None and metric is not None:
        texts = (place / TOKENIZER_CONFIG_FILE).is_file()
        rows = "validation rows, by which the retraining was stopped"
        results.append(result(task_type(kind, texts), rows, metric, score, f"mean {metric}"))
    head = front_matter(
        library=_library(place),
        tags=["foretune", *([method] if method else [])],
        name=name,
        base_model=base_model or record.get("base_model"),
        datasets=record.get("datasets") or [],
        license=license,
        results=results,
    )
    lines = [f"# {markdown(name)}", ""]
    if method is not None:
        version = record.get("foretune")
        by = f"foretune {version}" if version else "foretune"
        how = f"retrained by {by} with {method}" if method != "none" else f"not retrained, by {by}"
        lines += [f"A base to be adapted to new tasks, {how}.", ""]
    model_class = None
    if (place / CONFIG_FILE).is_file():
        model_class = next(
            iter(read_json(place / CONFIG_FILE, _Config).get("architectures") or ()), None
        )
    lines += [*_base_code(model_class, place, repository), *_adapting(record, repository)]
    return "\n".join([head, *lines])


def _add_adapter(
    upload: Upload,
    folder: Path,
    prefix: str,
    repository: str,
    base_model: str | None,
    license: str | None,
) -> str:
    """The card of an adapter, whose files in the upload get the id of its base."""
    record = read_trained_on(folder)
    base = base_model or record.get("base_model")
    config = folder / ADAPTER_CONFIG_FILE
    if config.is_file():
        fields = read_json(config, dict[str, Any])
        name = str(fields.get("base_model_name_or_path") or "")
        served = name if name and not {*name} & {*"/\\"} and not Path(name).exists() else None
        fields["base_model_name_or_path"] = base or served
        upload.files[f"{prefix}{ADAPTER_CONFIG_FILE}"] = json.dumps(fields, indent=2)
    if (folder / TRAINED_ON_FILE).is_file():
        fields = {**read_json(folder / TRAINED_ON_FILE, dict[str, Any]), "base_model": base}
        text = json.dumps(fields, indent=1, ensure_ascii=False)
        upload.files[f"{prefix}{TRAINED_ON_FILE}"] = text + "\n"
    return adapter_card(
        record,
        folder,
        base=base,
        repository=repository,
        subfolder=prefix.rstrip("/") or None,
        base_model=base,
        license=license,
    )


def _adapters_card(
    folder: Path, repository: str, base_model: str | None, license: str | None
) -> str:
    """The card of a folder of adapters: what they score, and how each is loaded."""
    folders = task_folders(folder)
    records = [read_trained_on(path) for path in folders]
    bases = {record.get("base_model") for record in records}
    base = base_model or (bases.pop() if len(bases) == 1 else None)
    scored = [record for record in records if record.get("score") is not None]
    libraries = {"peft": ADAPTER_CONFIG_FILE, "transformers": CONFIG_FILE}
    library = next(
        (n for n, file in libraries.items() if all((path / file).is_file() for path in folders)),
        None,
    )
    methods = {name for r in records if (name := r.get("method", {}).get("name")) is not None}
    name = repository.rpartition("/")[2]
    head = front_matter(
        library=library,
        tags=["foretune", *sorted(methods)],
        name=name,
        base_model=base,
        datasets=sorted({name for record in records for name in record.get("datasets", [])}),
        license=license,
        results=_mean_result(scored),
    )
    metric = scored[0].get("metric") if scored else "score"
    rows = [_row(path, record) for path, record in zip(folders, records, strict=True)]
    number = len(folders)
    lines = [
        f"# {markdown(name)}",
        "",
        f"Adapters of {number} task{'' if number == 1 else 's'}, in a folder each.",
        "",
        *_table(["task", "folder", "rows", str(metric)], rows),
        "",
    ]
    code = adapter_card(
        records[0], folders[0], base=base, repository=repository, subfolder=folders[0].name
    ).partition("```python\n")[2]
    if code:
        lines += ["```python", code]
    elif base is None:
        lines += ["Each belongs to the base whose digests are in its `base_fingerprint.json`.", ""]
    return "\n".join([head, *lines])


def _mean_result(scored: Sequence[TrainedOnRecord]) -> list[Any]:
    metrics = {(record["task_type"], record["metric"]) for record in scored}
    if len(metrics) != 1:
        return []
    ((task, metric),) = metrics
    mean = sum(record["score"] or 0.0 for record in scored) / len(scored)
    rows = f"rows of {len(scored)} tasks that no adapter was trained on"
    return [result(task, rows, metric, mean, f"mean {metric}")]


def _row(path: Path, record: TrainedOnRecord) -> list[str]:
    score = record.get("score")
    return [
        record.get("task", path.name),
        path.name,
        str(record.get("num_rows", "")),
        "" if score is None else f"{score:.4f}",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    cells = [[markdown(cell) for cell in row] for row in [header, *rows]]
    cells.insert(1, ["---"] * len(header))
    return [f"| {' | '.join(row)} |" for row in cells]


def _base_code(model_class: str | None, place: Path, repository: str) -> list[str]:
    """Code that loads a base from the Hub; none for a module of the user's own code."""
    if model_class is None or not (place / CONFIG_FILE).is_file():
        return []
    has_class = model_class in TOWERS or model_class in _classes()
    tokenizer = repository if (place / TOKENIZER_CONFIG_FILE).is_file() else None
    code = loading_code(model_class if has_class else "AutoModel", repository, tokenizer=tokenizer)
    return ["```python", *code, "```", ""]


def _library(place: Path) -> str | None:
    """What loads a base: no library that the Hub knows, for a module of the user's own code."""
    return "transformers" if (place / CONFIG_FILE).is_file() else None


def _classes() -> set[str]:
    import transformers

    return {*dir(transformers)}


def _adapting(record: BaseRecord | Mapping[str, Any], repository: str) -> list[str]:
    """How the base is adapted to a new task, where held-out tasks chose that."""
    if "adapting" not in record:
        return []
    return [
        "Held-out tasks chose how it is adapted (`adapting` in `foretune.json`):",
        "",
        "```",
        f"hf download {repository} --local-dir base",
        "foretune adapt base --tasks NEW.jsonl",
        "```",
        "",
    ]


def _metric(objective: Mapping[str, Any]) -> str | None:
    """The name of an objective's score."""
    from foretune.tasks.objectives import make_objective

    metric: str = make_objective(tokenizer=None, **objective).metric
    return metric


def _with_fields(card: str, base_model: str | None, license: str | None) -> str:
    """A model card of others, with what the command line states."""
    from huggingface_hub import ModelCard

    stated = ModelCard(card, ignore_metadata_errors=True)
    if base_model is not None:
        stated.data["base_model"] = base_model
    if license is not None:
        stated.data["license"] = license
    return card if base_model is None and license is None else str(stated)
