"""What the folder of an adapter says beside its weights: on which rows it was trained, and how.

`trained_on.json` is the record, `README.md` the card that is made of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

import foretune
from foretune.files import ADAPTER_CONFIG_FILE, CARD_FILE, SPARSE_FILE, TRAINED_ON_FILE
from foretune.formats import TRAINED_ON, read_json, stamped
from foretune.manifest import final_path
from foretune.models.hub_card import front_matter, hub_id, result, task_type
from foretune.models.loading_code import TOWERS, class_name, loading_code
from foretune.printable import markdown
from foretune.tasks.digest import rows_sha256
from foretune.tasks.drawn_rows import undrawn
from foretune.tasks.example import Example
from foretune.tasks.readers import hub_dataset
from foretune.tasks.task import Objective


class TrainedOnRecord(TypedDict, total=False):
    """The content of trained_on.json."""

    foretune: str
    task: str
    draw: int
    num_rows: int
    sha256: str
    datasets: list[str]
    method: dict[str, Any]
    steps: int
    task_type: str
    metric: str
    score: float | None
    num_scored: int
    base_model: str | None
    model_class: str | None
    num_labels: int | None


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """On what an adapter, or a task's own model, was trained, and how.

    Args:
        task: Name of the task.
        draw: Number of the draw of its shots.
        rows: The examples that it was trained on.
        method: The method's record, as JSON types.
        steps: Number of steps.
        objective: The objective.
        base: Folder or id of the base; None if it has none.
        base_model: The id, where the base is one of the Hub.
        model_class: `class_name` of the base.
        num_labels: Outputs of its head if more than the base's.
    """

    task: str
    draw: int = 0
    rows: Sequence[Example]
    method: Mapping[str, Any]
    steps: int
    objective: Objective
    base: str | None
    base_model: str | None
    model_class: str | None
    num_labels: int | None = None

    def record(self, score: float | None, num_scored: int) -> TrainedOnRecord:
        """The content of trained_on.json.

        Args:
            score: Mean score on examples that it was not trained on; None without.
            num_scored: Number of these examples.
        """
        texts = self.objective.tokenizer is not None
        dataset = hub_dataset(self.rows[0]) if self.rows else None  # that of all rows of a task
        return {
            "foretune": foretune.__version__,
            "task": self.task,
            "draw": self.draw,
            "num_rows": len(self.rows),
            "sha256": rows_sha256(undrawn(self.rows)),
            "datasets": [] if dataset is None else [dataset],
            "method": dict(self.method),
            "steps": self.steps,
            "task_type": task_type(self.objective.kind, texts),
            "metric": self.objective.metric,
            "score": score,
            "num_scored": num_scored,
            "base_model": self.base_model,
            "model_class": self.model_class,
            "num_labels": self.num_labels,
        }

    def write(
        self, folder: Path, place: Path, score: float | None = None, num_scored: int = 0
    ) -> None:
        """Writes trained_on.json and README.md.

        Args:
            folder: The folder of the adapter, which holds its weights.
            place: Where that folder will be.
            score: As for `record`.
            num_scored: As for `record`.
        """
        record = self.record(score, num_scored)
        text = json.dumps(stamped(dict(record), TRAINED_ON), indent=1, ensure_ascii=False)
        (folder / TRAINED_ON_FILE).write_text(text + "\n", encoding="utf-8")
        base = self.base_model
        if base is None and self.base:
            base = Path(os.path.relpath(final_path(self.base), final_path(place))).as_posix()
        card = adapter_card(record, folder, base=base)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def base_of(model: Any, num_labels: int | None = None) -> dict[str, Any]:
    """What `TrainedOn` says of the base.

    Args:
        model: The base.
        num_labels: Outputs of the adapters' heads if more than the base's.
    """
    name = str(getattr(model, "name_or_path", "") or "") or None
    return {
        "base": name,
        "base_model": hub_id(name),
        "model_class": class_name(model),
        "num_labels": num_labels,
    }


def read_trained_on(folder: Path) -> TrainedOnRecord:
    """The record in the folder of an adapter; empty where an earlier version wrote none.

    Raises:
        UserError: It is damaged, or a newer foretune wrote it.
    """
    file = folder / TRAINED_ON_FILE
    return read_json(file, TrainedOnRecord, TRAINED_ON) if file.is_file() else {}


def adapter_card(
    record: TrainedOnRecord,
    folder: Path,
    *,
    base: str | None,
    repository: str | None = None,
    subfolder: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """The model card of an adapter, or of a task's own model.

    Args:
        record: The content of trained_on.json.
        folder: Its folder.
        base: Folder or id of its base, for the code; None if unknown.
        repository: The repository of the Hub that it is in; None where the code runs in its folder.
        subfolder: Where in the repository it is; None for its root.
        base_model: Id of the base on the Hub; None for the one that is recorded.
        license: The license, as the Hub names it; None states none.
    """
    name = record.get("task", folder.name)
    base_model = base_model or record.get("base_model")
    method = record.get("method", {}).get("name")
    is_peft = (folder / ADAPTER_CONFIG_FILE).is_file()
    is_sparse = (folder / SPARSE_FILE).is_file()
    score, metric = record.get("score"), record.get("metric")
    results = []
    if score is not None and metric is not None:
        rows = f"{record.get('num_scored', 0)} rows of the task that it was not trained on"
        results.append(result(record.get("task_type", "other"), rows, metric, score))
    head = front_matter(
        library="peft" if is_peft else None if is_sparse else "transformers",
        tags=["foretune", *([method] if method else [])],
        name=name,
        base_model=base_model,
        datasets=record.get("datasets", []),
        license=license,
        results=results,
    )
    what = "Adapter" if is_peft or is_sparse else "Model"
    lines = [f"# {markdown(name)}", "", *_sentences(what, record)]
    code = _code(record, base, repository, subfolder, is_peft=is_peft, is_sparse=is_sparse)
    if code:
        lines += ["", "```python", *code, "```"]
    return "\n".join([head, *lines, ""])


def _sentences(what: str, record: TrainedOnRecord) -> list[str]:
    """What is known of how it came about."""
    if "task" not in record:
        return [f"{what} of a task."]
    method, rows = record.get("method", {}), record.get("num_rows", 0)
    rate = method.get("learning_rate")
    numbers = [f"learning rate {rate:g}"] if isinstance(rate, int | float) else []
    numbers.append(f"{record.get('steps')} steps")
    lines = [
        f"{what} of the task {markdown(record['task'])}: trained by foretune "
        f"{record.get('foretune')} with {method.get('name')} ({', '.join(numbers)}) on {rows} "
        f"row{'' if rows == 1 else 's'}.",
    ]
    score = record.get("score")
    if score is not None:
        scored = record.get("num_scored", 0)
        lines += [
            "",
            f"Mean {record.get('metric')} on {scored} row{'' if scored == 1 else 's'} that it was "
            f"not trained on: {score:.4f}.",
        ]
    return [*lines, "", f"SHA-256 of the rows that it was trained on: `{record.get('sha256')}`"]


def _code(
    record: TrainedOnRecord,
    base: str | None,
    repository: str | None,
    subfolder: str | None,
    *,
    is_peft: bool,
    is_sparse: bool,
) -> list[str]:
    """Python that loads it; none where that depends on what is not recorded."""
    name = record.get("model_class")
    if name is None or (base is None and (is_peft or is_sparse)):
        return []
    labels = record.get("num_labels")
    if is_peft:
        return loading_code(name, base or "", repository or ".", labels, subfolder=subfolder)
    if is_sparse:
        folder = '"."' if repository is None else f"snapshot_download({json.dumps(repository)})"
        inside = json.dumps(f"/{subfolder}", ensure_ascii=False)
        folder += "" if subfolder is None else f" + {inside}"
        download = ["from huggingface_hub import snapshot_download"] * (repository is not None)
        lines = loading_code(name, base or "", None, labels)
        imports = ["from foretune import load_sparse", *download]
        return [*imports, *lines, f"model = load_sparse(base, {folder})"]
    if subfolder is not None and name in TOWERS:  # whose code transformers looks for at the root
        return []
    return loading_code(name, repository or ".", subfolder=subfolder)
