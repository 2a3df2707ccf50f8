"""`Outcome` and `Adapted`: the results of `retrain` and `adapt`, and how they are saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import safe_open
from torch import Tensor, nn

import foretune
from foretune.adapters.bank import AdapterBank
from foretune.adapters.basis import Basis
from foretune.adapters.basis_file import save_basis
from foretune.adapters.fingerprint import base_record, fingerprint
from foretune.adapters.peft_format import peft_config, peft_tensors, write_adapter
from foretune.files import (
    ADAPTER_WEIGHTS_FILE,
    BASE_FILE,
    CARD_FILE,
    DEVICES,
    LABELS_FILE,
    METRICS_FILE,
    RUN_FILE,
    SCORES_FILE,
    VERSIONS,
    same_on_disk,
    whole_folder,
    whole_folders,
    write_whole,
)
from foretune.formats import BASE, RUN, stamped
from foretune.manifest import final_path
from foretune.models.loading import save_base
from foretune.models.loading_code import class_name, loading_code
from foretune.models.surgery import head_labels, name_outputs
from foretune.run import Run
from foretune.tasks.example import Example
from foretune.tasks.task import Objective
from foretune.training.adapt_plan import Setting
from foretune.training.learners.joint import Learner
from foretune.training.methods import RetrainMethod
from foretune.training.record import environment
from foretune.training.trained_on import TrainedOn

V = TypeVar("V")

# Names in a folder of adapters that are not those of tasks: a folder with `base/` holds a base.
RESERVED = (RUN_FILE, SCORES_FILE, VERSIONS, "base")


@dataclass
class Outcome:
    """The result of `retrain`.

    Args:
        model: The retrained base, ready to be adapted.
        bank: The adapters of the seen tasks; None for methods without adapters.
        method: The method's record.
        run: The run.
        objective: The objective, fitted to the seen tasks.
        tokenizer: Saved beside the base.
        history: One dict per validation.
        validation_score: The best mean score on the validation examples of the seen tasks; None
            without such examples. With held-out tasks, the mean of `held_out_scores`.
        held_out_scores: Score of each held-out task after a short adaptation to it; None without.
        cost: seconds, cpu_seconds, peak_memory_mb, tokens, examples, validation_tokens,
            trainable_parameters.
        tasks: Names of the seen tasks.
        choice: For `auto`, the candidates with scores and costs, and the confidence; else None.
        basis: What the seen tasks' adapters have in common, which the model carries too; None
            where none fit the base that is returned.
        inputs: With a folder, what must be the same when the run is resumed: tasks, objective,
            and digests of the pretrained model and of the examples.
        rows: The training examples of each seen task.
    """

    model: nn.Module
    bank: AdapterBank | None
    method: RetrainMethod
    run: Run
    objective: Objective
    tokenizer: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    validation_score: float | None = None
    held_out_scores: dict[str, float] | None = None
    cost: dict[str, Any] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    choice: dict[str, Any] | None = None
    basis: Basis | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Sequence[Example]] = field(default_factory=dict)

    def save(self, folder: Path | str) -> Path:
        """Writes `base/`, `adapters/<task>/`, run.json, metrics.jsonl and a model card.

        `base/` is a plain Hugging Face folder and each adapter a plain PEFT folder.
        """
        folder = Path(folder)
        with whole_folder(folder / "base") as part:
            save_base(self.model, self.tokenizer, part)
            (part / BASE_FILE).write_text(json.dumps(self._base_record(), indent=1))
            if self.basis is not None:
                save_basis(self.basis, part)
        self.save_adapters(folder)
        write_whole(folder / METRICS_FILE, "".join(json.dumps(h) + "\n" for h in self.history))
        write_whole(folder / CARD_FILE, self._model_card())
        write_whole(folder / RUN_FILE, json.dumps(self.record(), indent=1))
        return folder

    def save_adapters(self, folder: Path) -> None:
        """Writes every slot of the bank as a PEFT folder, `adapters/<task>/`."""
        if self.bank is None:
            return
        config = peft_config(self.bank, self.model, str(folder / "base"))
        base = base_record(self.model, self.bank.head_names)
        labels = labels_of(self.objective, self.bank.keys)
        names = folder_names((task, 0) for task in self.tasks or self.bank.keys)
        places = [folder / "adapters" / names[task, 0] for task in self.bank.keys]
        with whole_folders(places) as parts:
            for slot, (task, part) in enumerate(zip(self.bank.keys, parts, strict=True)):
                write_adapter(part, config, peft_tensors(self.bank, slot), base)
                _write_labels(part, labels.get(task))
                if task in self.rows:
                    self._trained_on(folder, task).write(part, places[slot])

    def _trained_on(self, folder: Path, task: str) -> TrainedOn:
        return TrainedOn(
            task=task,
            rows=self.rows[task],
            method=self.method.to_dict(),
            steps=self.run.steps,
            objective=self.objective,
            base=str(folder / "base"),
            base_model=None,
            model_class=class_name(self.model),
        )

    def record(self) -> dict[str, Any]:
        """The contents of run.json."""
        return {
            "format": RUN,
            "finished": True,
            **self.inputs,
            "method": self.method.to_dict(),
            "run": self.run.to_dict(),
            "objective": self.objective.to_dict(),
            "tasks": list(self.tasks),
            "validation_score": self.validation_score,
            "held_out_scores": self.held_out_scores,
            "cost": self.cost,
            "environment": environment(),
            **({} if self.choice is None else {"choice": self.choice}),
            **({} if self.basis is None else {"basis": self.basis.summary()}),
        }

    def _base_record(self) -> dict[str, Any]:
        record = {
            "foretune": foretune.__version__,
            "method": self.method.to_dict(),
            "objective": self.objective.to_dict(),
            "fingerprint": fingerprint(self.model),
            "head_labels": head_labels(self.model),
            "trainable": sorted(n for n, p in self.model.named_parameters() if p.requires_grad),
        }
        return stamped(record, BASE)

    def _model_card(self) -> str:
        method = self.method
        paper = method.paper
        source = f" ({paper['title']}, arXiv:{paper['arxiv']})" if paper else ""
        score = (
            ""
            if self.validation_score is None
            else (
                f"\nMean {self.objective.metric} on the validation examples of the seen tasks: "
                f"{self.validation_score:.4f}.\n"
            )
        )
        code = "\n".join(loading_code(class_name(self.model), "base"))
        return (
            f"---\nlibrary_name: transformers\ntags: [foretune, {method.name}]\n---\n\n"
            f"# Base retrained with {method.label}\n\n"
            f"Retrained with {method.label}{source} by foretune, in {self.run.steps} steps with "
            f"random seed {self.run.seed}.\n{score}\n"
            f"```python\n{code}\n```\n"
        )


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of an adapter that was saved, read at each use: many do not fit in memory.

    Args:
        folder: Its folder, or the folder that will have that name when all have been written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as file:
            if name not in file.keys():  # noqa: SIM118
                raise KeyError(name)
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        with self._open() as file:
            return iter(file.keys())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _open(self) -> Any:
        folder = self.folder if self.folder.is_dir() else Path(final_path(self.folder))
        return safe_open(folder / ADAPTER_WEIGHTS_FILE, "pt")


@dataclass
class Adapted:
    """The result of `adapt`.

    Args:
        scores: Mean test score per task and draw: {(task, draw): score}.
        num_rows: Number of test examples behind each score.
        tensors: The adapters, under PEFT's tensor names (methods that train adapters). Of those
            that were saved while the call ran, they are read from their folders at each use.
        config: PEFT's adapter_config.json of the adapters.
        models: The adapted models (methods that train the whole model).
        base_fingerprint: What the adapters record of their base, as `base_record`.
        cost: seconds, cpu_seconds, peak_memory_mb, tokens, examples, trainable_parameters (per
            task).
        stopped: Step at which a task stopped early: {(task, draw): step}.
        labels: Labels of each task in the order of its outputs; empty where outputs are not labels.
        num_labels: Width of the heads where the base's checkpoint has no head, or a task has more
            labels than it has outputs, so that the base must be loaded with this many labels; else
            None.
        learners: The learner that trained each of `models`, which writes it.
        folders: Names of the folders that `save` writes; empty for those of `folder_names`.
        settings: How each task was adapted, where a plan says so by its rows; empty otherwise.
        records: The `config` and `base_fingerprint` of each adapter, where a plan has them differ.
        path: Scores after the steps of `score_at`: {step: {(task, draw): score}}; of the tasks that
            were adapted in this call.
        path_losses: Mean losses of the same examples; empty where the objective is not
            `select_by_loss`.
        num_train: Number of training examples of each task and draw that was adapted in this call.
        digests: Digest of the examples of each task.
        earlier: What was saved of the tasks that this call adapts again.
        trained_on: The rows of each task and draw that was adapted in this call, and how it was.
    """

    scores: dict[tuple[str, int], float]
    num_rows: dict[tuple[str, int], int]
    tensors: dict[tuple[str, int], Mapping[str, Tensor]]
    config: dict[str, Any]
    base_fingerprint: dict[str, Any]
    models: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    stopped: dict[tuple[str, int], int] = field(default_factory=dict)
    labels: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    num_labels: int | None = None
    learners: dict[tuple[str, int], Learner] = field(default_factory=dict)
    folders: dict[tuple[str, int], str] = field(default_factory=dict)
    settings: dict[tuple[str, int], Setting] = field(default_factory=dict)
    records: dict[tuple[str, int], tuple[dict[str, Any], dict[str, Any]]] = field(
        default_factory=dict
    )
    path: dict[int, dict[tuple[str, int], float]] = field(default_factory=dict)
    path_losses: dict[int, dict[tuple[str, int], float]] = field(default_factory=dict)
    num_train: dict[tuple[str, int], int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    earlier: dict[tuple[str, int], Any] = field(default_factory=dict)
    trained_on: dict[tuple[str, int], TrainedOn] = field(default_factory=dict)

    def first_draw(self) -> Adapted:
        """The part of the result of each task's first draw."""
        return self.part(range(1))

    def part(self, draws: range) -> Adapted:
        """The part of the result of these draws, which are numbered from 0 on in it."""

        def of(values: Mapping[tuple[str, int], V]) -> dict[tuple[str, int], V]:
            return {(t, d - draws.start): v for (t, d), v in values.items() if d in draws}

        return replace(
            self,
            scores=of(self.scores),
            num_rows=of(self.num_rows),
            tensors=of(self.tensors),
            models=of(self.models),
            learners=of(self.learners),
            path={step: of(by_draw) for step, by_draw in self.path.items()},
            path_losses={step: of(by_draw) for step, by_draw in self.path_losses.items()},
        )

    def save(self, folder: Path | str) -> Path:
        """Writes a folder per task and draw: `<task>`, or `<task>-draw<k>` after the first draw."""
        folder = Path(folder)
        names = self.folders or folder_names([*self.tensors, *self.models])
        keys = list(self.tensors)
        with whole_folders([folder / names[key] for key in keys]) as parts:
            for key, part in zip(keys, parts, strict=True):
                config, base = self.records.get(key, (self.config, self.base_fingerprint))
                write_adapter(part, config, dict(self.tensors[key]), base)
                _write_labels(part, self.labels.get(key[0]))
                self._write_trained_on(part, folder / names[key], key)
        for (task, draw), model in self.models.items():
            labels = self.labels.get(task)
            learner = self.learners.get((task, draw))
            with whole_folder(folder / names[task, draw]) as part:
                if learner is not None and learner.model is model:
                    learner.write(part, labels)
                else:  # a model that the caller put in its place
                    name_outputs(model, labels or ())
                    save_base(model, None, part)
                _write_labels(part, labels)
                self._write_trained_on(part, folder / names[task, draw], (task, draw))
        return folder

    def _write_trained_on(self, folder: Path, place: Path, key: tuple[str, int]) -> None:
        trained_on = self.trained_on.get(key)
        if trained_on is not None:
            trained_on.write(folder, place, self.scores.get(key), self.num_rows.get(key, 0))


def labels_of(objective: Objective, tasks: Iterable[str]) -> dict[str, tuple[Any, ...]]:
    """The labels of each task's outputs, in order; none for outputs that are not labels."""
    labels = {task: objective.output_labels(task) for task in tasks}
    return {task: names for task, names in labels.items() if names is not None}


def _write_labels(folder: Path, labels: Sequence[Any] | None) -> None:
    if labels is not None:
        text = json.dumps(list(labels), ensure_ascii=False)
        (folder / LABELS_FILE).write_text(text + "\n", encoding="utf-8")


def folder_names(
    task_draws: Iterable[tuple[str, int]], in_use: Mapping[tuple[str, int], str] | None = None
) -> dict[tuple[str, int], str]:
    """A folder name for each task and draw, no two of which are the same on any file system.

    Args:
        task_draws: Tasks with their draws, in the order in which they take names; first draws are
            served first.
        in_use: Names that tasks have already; they stay as they are.

    >>> folder_names([("red", 0), ("red", 1)])
    {('red', 0): 'red', ('red', 1): 'red-draw1'}
    >>> [*folder_names([("Red", 0), ("red", 0)]).values()]
    ['Red', 'red-449f44']
    """
    names = dict(in_use or {})
    used = {same_on_disk(name) for name in names.values()}
    for task, draw in sorted(task_draws, key=lambda pair: pair[1]):
        if (task, draw) in names:
            continue
        name = folder_name(task, draw)
        if same_on_disk(name) in used:
            name = suffixed_name(task, draw)
        used.add(same_on_disk(name))
        names[task, draw] = name
    return names


def folder_name(task: str, draw: int = 0) -> str:
    """A task's name as a folder name: separators, leading and trailing dots and the like replaced.

    A changed name, and one that is reserved, gets a digest as its suffix.

    >>> folder_name("red"), folder_name("red", 1), folder_name("a/b") == folder_name("a_b")
    ('red', 'red-draw1', False)
    """
    safe = readable_name(task)
    if safe.endswith(".") or safe.casefold() in RESERVED or DEVICES.fullmatch(safe.casefold()):
        safe = f"{safe.rstrip('.')}-{_digest(task)}"
    return safe if draw == 0 else f"{safe}-draw{draw}"


def suffixed_name(task: str, draw: int = 0) -> str:
    """The folder name of a task whose `folder_name` a file system takes for another task's."""
    return f"{folder_name(task, draw)}-{_digest(f'{task}/{draw}')}"


def readable_name(task: str) -> str:
    """A task's name with the characters replaced that a file name may not have.

    >>> readable_name("a/b")
    'a_b-6d959c'
    """
    safe = "".join(c if c.isalnum() or c in "-_. " else "_" for c in task).strip() or "_"
    safe = "_" + safe[1:] if safe.startswith(".") else safe
    safe = safe.encode()[:150].decode(errors="ignore")  # file systems take 255 bytes
    return safe if safe == task else f"{safe}-{_digest(task)}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=3).hexdigest()
