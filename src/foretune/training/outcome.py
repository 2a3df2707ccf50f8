"""`Outcome` and `Adapted`: what the verbs return, and how it is saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import fingerprint
from foretune.adapters.peft_format import peft_config, peft_tensors, write_adapter
from foretune.files import (
    BASE_FILE,
    CARD_FILE,
    LABELS_FILE,
    METRICS_FILE,
    RUN_FILE,
    whole_folder,
    write_whole,
)
from foretune.formats import BASE, RUN, stamped
from foretune.models.loading import save_base
from foretune.models.loading_code import class_name, loading_code
from foretune.models.surgery import name_outputs
from foretune.run import Run
from foretune.tasks.task import Objective
from foretune.training.learners.joint import Learner
from foretune.training.methods import RetrainMethod
from foretune.training.record import environment


@dataclass
class Outcome:
    """The result of `retrain`.

    Args:
        model: The retrained base; adapt this one.
        bank: The seen tasks' adapters, None for methods that have none.
        method: The method's record.
        run: The run.
        objective: As fitted to the seen tasks.
        tokenizer: Saved beside the base.
        history: One dict for each validation.
        validation_score: The best mean score on the seen tasks' validation rows; None without.
        cost: seconds, cpu_seconds, peak_memory_mb, tokens, examples, trainable_parameters.
        tasks: Names of the seen tasks.
        choice: What `auto` tried, the scores, the cost and how sure it is; None for other methods.
        inputs: With a folder, what a run is known by when it is resumed: tasks, objective, and
            digests of the model that it began with and of the rows.
    """

    model: nn.Module
    bank: AdapterBank | None
    method: RetrainMethod
    run: Run
    objective: Objective
    tokenizer: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    validation_score: float | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    choice: dict[str, Any] | None = None
    inputs: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path | str) -> Path:
        """Writes `base/`, `adapters/<task>/`, run.json, metrics.jsonl and a model card.

        `base/` is a plain Hugging Face folder and each adapter a plain PEFT folder.
        """
        folder = Path(folder)
        with whole_folder(folder / "base") as part:
            name_outputs(self.model, self.objective.space or ())
            save_base(self.model, self.tokenizer, part)
            (part / BASE_FILE).write_text(json.dumps(self._about_base(), indent=1))
        self.save_adapters(folder)
        write_whole(folder / METRICS_FILE, "".join(json.dumps(h) + "\n" for h in self.history))
        write_whole(folder / CARD_FILE, self._card())
        write_whole(folder / RUN_FILE, json.dumps(self.record(), indent=1))
        return folder

    def save_adapters(self, folder: Path) -> None:
        """Writes every slot of the bank as a PEFT folder, `adapters/<task>/`."""
        if self.bank is None:
            return
        config = peft_config(self.bank, self.model, str(folder / "base"))
        mark = fingerprint(self.model, self.bank.head_names)
        labels = labels_of(self.objective, self.bank.keys)
        for slot, task in enumerate(self.bank.keys):
            with whole_folder(folder / "adapters" / folder_name(task)) as part:
                write_adapter(part, config, peft_tensors(self.bank, slot), mark)
                _write_labels(part, labels.get(task))

    def record(self) -> dict[str, Any]:
        """What run.json holds."""
        return {
            "format": RUN,
            "finished": True,
            **self.inputs,
            "method": self.method.to_dict(),
            "run": self.run.to_dict(),
            "objective": self.objective.to_dict(),
            "tasks": list(self.tasks),
            "validation_score": self.validation_score,
            "cost": self.cost,
            "environment": environment(),
            **({} if self.choice is None else {"choice": self.choice}),
        }

    def _about_base(self) -> dict[str, Any]:
        record = {
            "method": self.method.to_dict(),
            "objective": self.objective.to_dict(),
            "fingerprint": fingerprint(self.model),
            "trainable": sorted(n for n, p in self.model.named_parameters() if p.requires_grad),
        }
        return stamped(record, BASE)

    def _card(self) -> str:
        method = self.method
        paper = method.paper
        source = f" ({paper['title']}, arXiv:{paper['arxiv']})" if paper else ""
        score = (
            ""
            if self.validation_score is None
            else (
                f"\nMean {self.objective.metric} on the seen tasks' validation rows: "
                f"{self.validation_score:.4f}.\n"
            )
        )
        code = "\n".join(loading_code(class_name(self.model), "base"))
        return (
            f"---\nlibrary_name: transformers\ntags: [foretune, {method.name}]\n---\n\n"
            f"# A base retrained by {method.label}\n\n"
            f"Retrained with foretune by {method.label}{source}, in {self.run.steps} steps with "
            f"seed {self.run.seed}.\n{score}\n"
            f"```python\n{code}\n```\n"
        )


@dataclass
class Adapted:
    """The result of `adapt`.

    Args:
        scores: Mean test score of each slot's task: {(task, draw): score}.
        num_rows: Test rows behind each score.
        tensors: Each slot's adapter under PEFT's names (methods that train adapters).
        config: PEFT's adapter_config.json for them.
        models: Each slot's whole state (methods that train the whole model).
        base_fingerprint: Of the base that they belong to.
        cost: seconds, cpu_seconds, peak_memory_mb, tokens, examples, trainable_parameters (of
            one task).
        stopped: The step after which a task stopped early: {(task, draw): step}.
        labels: Each task's labels in the order of its outputs; empty where outputs are no labels.
        num_labels: Outputs of the heads where a task has more labels than the base's head outputs,
            which then has to be loaded so wide; else None.
        learners: What trained each of `models`, and writes it.
    """

    scores: dict[tuple[str, int], float]
    num_rows: dict[tuple[str, int], int]
    tensors: dict[tuple[str, int], dict[str, Tensor]]
    config: dict[str, Any]
    base_fingerprint: str
    models: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    stopped: dict[tuple[str, int], int] = field(default_factory=dict)
    labels: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    num_labels: int | None = None
    learners: dict[tuple[str, int], Learner] = field(default_factory=dict)

    def first_draw(self) -> Adapted:
        """The part of the result that belongs to the first draw of each task."""
        return replace(
            self,
            scores={key: v for key, v in self.scores.items() if key[1] == 0},
            num_rows={key: v for key, v in self.num_rows.items() if key[1] == 0},
            tensors={key: v for key, v in self.tensors.items() if key[1] == 0},
            models={key: v for key, v in self.models.items() if key[1] == 0},
            learners={key: v for key, v in self.learners.items() if key[1] == 0},
        )

    def save(self, folder: Path | str) -> Path:
        """Writes a PEFT folder for each task (`<task>`, or `<task>-draw<k>` beyond the first)."""
        folder = Path(folder)
        for (task, draw), tensors in self.tensors.items():
            with whole_folder(folder / folder_name(task, draw)) as part:
                write_adapter(part, self.config, tensors, self.base_fingerprint)
                _write_labels(part, self.labels.get(task))
        for (task, draw), learner in self.learners.items():
            with whole_folder(folder / folder_name(task, draw)) as part:
                learner.write(part, self.labels.get(task))
                _write_labels(part, self.labels.get(task))
        return folder


def labels_of(objective: Objective, tasks: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """Task → labels of its outputs, in their order; empty where outputs are no labels."""
    labels = {task: objective.output_labels(task) for task in tasks}
    return {task: names for task, names in labels.items() if names is not None}


def _write_labels(folder: Path, labels: Sequence[Any] | None) -> None:
    if labels is not None:
        text = json.dumps(list(labels), ensure_ascii=False)
        (folder / LABELS_FILE).write_text(text + "\n", encoding="utf-8")


def folder_name(task: str, draw: int = 0) -> str:
    """A task's name as a folder name: separators and leading dots replaced.

    A name that had to be changed gets a mark of its own, so that no two tasks share a folder.

    >>> folder_name("red"), folder_name("red", 1), folder_name("a/b") == folder_name("a_b")
    ('red', 'red-draw1', False)
    """
    safe = "".join(c if c.isalnum() or c in "-_. " else "_" for c in task).strip() or "_"
    safe = "_" + safe[1:] if safe.startswith(".") else safe
    safe = safe.encode()[:150].decode(errors="ignore")  # file systems take 255 bytes
    if safe != task:
        safe = f"{safe}-{hashlib.blake2b(task.encode(), digest_size=3).hexdigest()}"
    return safe if draw == 0 else f"{safe}-draw{draw}"
