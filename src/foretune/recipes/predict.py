"""`foretune predict`: what adapters answer to new rows, many adapters in one batch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from foretune.adapters.bank import AdapterBank
from foretune.adapters.fingerprint import fingerprint, keep_digests
from foretune.adapters.peft_format import FIELDS, bank_like, load_adapter
from foretune.adapters.stored_adapter import read_adapter
from foretune.entry_points import entry_point
from foretune.errors import UserError
from foretune.evaluation.forgetting import check_predicts_tokens
from foretune.files import ADAPTER_CONFIG_FILE, RUN_FILE
from foretune.formats import RUN, read_json
from foretune.models.calls import eval_no_grad
from foretune.models.capacity import num_positions
from foretune.models.loading import has_classifier, load_base, load_model
from foretune.models.pretrained import quiet
from foretune.models.routing import route
from foretune.models.sentence_cache import embedding_with
from foretune.models.surgery import head_modules, head_width
from foretune.printable import in_one_line
from foretune.recipes.check import BasesOfAdapters
from foretune.recipes.console import SILENT, Console
from foretune.recipes.predictions import (
    COLUMNS,
    PREDICTION,
    Prediction,
    output_labels,
    prediction_of,
)
from foretune.recipes.questions import Question, examples_of, prompt_of, read_questions
from foretune.recipes.saved_base import SavedBase, find_base
from foretune.recipes.schema import ENCODES_PROMPTS, WRITES_TEXT
from foretune.recipes.setup import with_tokenizer
from foretune.run import Run
from foretune.tasks.objectives import make_objective
from foretune.tasks.objectives.classification import Classification
from foretune.tasks.objectives.regression import check_arrays
from foretune.tasks.readers import Row
from foretune.tasks.row_store import RowStore
from foretune.tasks.sources import Source
from foretune.tasks.task import Task, TaskCollection
from foretune.training.data import SlotRows, TaskData
from foretune.training.loop import make_accelerator
from foretune.training.predicting import predicted_outputs
from foretune.training.text_limits import TextLimits
from foretune.training.token_budget import default_token_budget

ADAPTERS_AT_ONCE = 256


def predict_rows(
    base: Path,
    adapters: Path,
    source: Source,
    *,
    objective: str | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
    allow_unverified: bool = False,
    console: Console = SILENT,
) -> list[dict[str, Any]]:
    """Answers every row with the adapter of its task.

    Args:
        base: Folder or name of the base.
        adapters: A PEFT folder, whose adapter answers all rows, or a folder of such folders.
        source: Where the rows are, and the names of their columns; its splits are not used.
        objective: Kind of objective; None for that of the base, or that of the adaptation.
        batch_size: Rows per batch.
        max_new_tokens: Largest length of an answer that is a text.
        allow_unverified: Whether to take adapters that do not record their base.
        console: Receives the progress.

    Returns:
        For each row, in order, its columns and the prediction: `prediction`; of labels also
        `probability` and `probabilities`; of candidates `prediction_index`, `probability` and
        `scores`.

    Raises:
        UserError: There is no such base or adapter, a row cannot be read or has no adapter, or the
            objective predicts nothing.
    """
    saved = find_base(base)
    if not adapters.is_dir():
        raise UserError(f"no adapters in {adapters}: no such folder")
    kind, settings = _objective_of(saved, adapters, objective)
    questions = read_questions(source, adapters, COLUMNS[kind])
    predictor = _Predictor(saved, kind, settings, batch_size, max_new_tokens, allow_unverified)
    answers: dict[int, Prediction] = {}
    for group in predictor.groups(questions):
        answers |= predictor.answer(group)
        console.say(f"{len(answers)} of {len(questions)} rows answered")
    return [{**question.columns, **answers[question.number]} for question in questions]


def _objective_of(saved: SavedBase, adapters: Path, kind: str | None) -> tuple[str, dict[str, Any]]:
    """The kind of objective and its fields: those that the adapters record, or the base's.

    Raises:
        UserError: Neither records one, and none is asked for, or it predicts nothing.
    """
    recorded: dict[str, Any] = {}
    for folder in (adapters, adapters.parent):
        if not recorded and (folder / RUN_FILE).is_file():
            record = read_json(folder / RUN_FILE, dict[str, Any], RUN)
            recorded = dict(record.get("objective") or {})
    recorded = recorded or dict(saved.metadata.get("objective") or {})
    if kind is not None and kind != recorded.get("kind"):
        recorded = {"kind": kind}
    if "kind" not in recorded:
        saved.objective(None, None)  # raises
    if recorded["kind"] not in COLUMNS or (recorded["kind"] == "causal-lm" and not WRITES_TEXT):
        raise UserError(
            f"nothing is predicted by the objective {recorded['kind']}; those that predict are "
            f"{', '.join(COLUMNS)}"
        )
    return str(recorded["kind"]), recorded


class _Predictor:
    """Answers rows with adapters on one base.

    Args:
        saved: The base.
        kind: Kind of objective.
        settings: Fields of the objective.
        batch_size: Rows per batch.
        max_new_tokens: Largest length of a text.
        allow_unverified: Whether to take adapters that do not record their base.
    """

    def __init__(
        self,
        saved: SavedBase,
        kind: str,
        settings: Mapping[str, Any],
        batch_size: int,
        max_new_tokens: int,
        allow_unverified: bool,
    ) -> None:
        self.allow_unverified = allow_unverified
        self.kind, self.batch_size, self.max_new_tokens = kind, batch_size, max_new_tokens
        self.bases = BasesOfAdapters(saved.folder, None)
        fields = {k: v for k, v in settings.items() if k not in ("labels", "space")}
        self.objective = with_tokenizer(
            make_objective(tokenizer=None, **fields), self.bases.tokenizer
        )
        self.device = make_accelerator(Run()).device

    def groups(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """The rows whose adapters share a bank; a model of its own is a group."""
        by_adapter: dict[Path, list[Question]] = defaultdict(list)
        for question in questions:
            by_adapter[question.adapter].append(question)
        groups: dict[Any, list[Path]] = defaultdict(list)
        for folder in by_adapter:
            groups[self._group_of(folder)].append(folder)
        for folders in groups.values():
            for start in range(0, len(folders), ADAPTERS_AT_ONCE):
                part = folders[start : start + ADAPTERS_AT_ONCE]
                yield [question for folder in part for question in by_adapter[folder]]

    def _group_of(self, folder: Path) -> Any:
        """What adapters have in common that share a bank.

        Raises:
            UserError: The adapter is damaged, of another base, or no LoRA of one rank.
        """
        if not (folder / ADAPTER_CONFIG_FILE).is_file():
            return folder
        model = self.bases.of(folder).to(self.device).eval()
        keep_digests(model)  # of which every adapter asks
        config = read_adapter(folder, model, allow_unverified=self.allow_unverified).config
        return id(model), json.dumps([config.get(name) for name in (*FIELDS, "modules_to_save")])

    def answer(self, questions: Sequence[Question]) -> dict[int, Prediction]:
        """Number of a row → the columns of its prediction.

        Args:
            questions: Rows of one group, those of one adapter together.
        """
        folders = list(dict.fromkeys(question.adapter for question in questions))
        with self._adapted(folders) as (model, bank):
            if self.kind == "causal-lm":
                return self._texts(model, questions, folders, bank)
            return self._outputs(model, questions, folders)

    @contextlib.contextmanager
    def _adapted(self, folders: Sequence[Path]) -> Iterator[tuple[nn.Module, AdapterBank | None]]:
        """The model with a bank of these adapters attached; or the only task's own model.

        Raises:
            UserError: An adapter is of another base, damaged, or nothing that a bank holds.
        """
        if not (folders[0] / ADAPTER_CONFIG_FILE).is_file():
            self._check_own_model(folders[0])
            model = load_base(folders[0])[0].to(self.device).eval()
            with route(None):
                yield model, None
            return
        model = self.bases.of(folders[0])
        stored = read_adapter(folders[0], model, allow_unverified=self.allow_unverified)
        try:
            bank = bank_like(model, stored, [str(folder) for folder in folders])
        except UserError as error:
            raise UserError(f"{folders[0]}: {error}") from error
        for slot, folder in enumerate(folders):
            load_adapter(bank, slot, folder, model, allow_unverified=self.allow_unverified)
        with bank.to(self.device).attached():
            yield model, bank

    def _check_own_model(self, folder: Path) -> None:
        """Checks that a task's own model was made of this base.

        Raises:
            UserError: It was made of another one, or does not say of which.
        """
        file = folder.parent / RUN_FILE
        recorded = read_json(file, dict[str, Any], RUN).get("model") if file.is_file() else None
        if recorded is None and not self.allow_unverified:
            raise UserError(
                f"{folder} does not record which base it was adapted from: if it is this one, use "
                "--allow-unverified"
            )
        if recorded is not None and recorded not in self._digests:
            raise UserError(
                f"{folder} was adapted from another base, or from this one in another --dtype"
            )

    @cached_property
    def _digests(self) -> set[str]:
        """What `adapt` may have recorded of the base: with its head, or without it."""
        models = [self.bases.model]
        if self.kind == "classification" and not has_classifier(self.bases.folder):
            # adapting gave it a head, and the names that go with one
            with quiet():
                models.append(load_model(self.bases.folder, head=self.objective.head)[0])
        return {
            fingerprint(model, heads, buffers=True)
            for model in models
            for heads in ((), head_modules(model))
        }

    def _outputs(
        self, model: nn.Module, questions: Sequence[Question], folders: Sequence[Path]
    ) -> dict[int, Prediction]:
        """The predictions that are made of the objective's outputs.

        Raises:
            UserError: The model does not take the rows.
        """
        labels = {folder: output_labels(folder, model) for folder in folders}
        if self.kind == "prompts":  # which has an output for each of a task's labels
            labels = {f: [v for v in names if v is not None] for f, names in labels.items()}
        names = {folder: str(folder) for folder in folders}
        objective = self._fitted(model, {names[f]: labels[f] for f in folders})
        store = RowStore()
        of_folder: dict[Path, list[int]] = {folder: [] for folder in folders}
        parts: dict[Path, list[tuple[int, int]]] = {folder: [] for folder in folders}
        for question in questions:
            for part, example in enumerate(examples_of(question, self.kind, objective)):
                of_folder[question.adapter].append(len(store))
                parts[question.adapter].append((question.number, part))
                store.add(example, f"{question.row.file} {question.row.unit}", question.row.number)
        slots = [
            SlotRows(names[f], (), test=store.rows(of_folder[f]), task=names[f]) for f in folders
        ]
        data = TaskData(slots, objective, TextLimits.of(model, objective))
        if any("x" in row for slot in slots for row in slot.test):
            check_arrays(TaskCollection(tuple(_task(slot) for slot in slots)), ("x",))
        budget = default_token_budget(model)
        try:
            with embedding_with(model):
                outputs = predicted_outputs(model, data, batch_size=self.batch_size, budget=budget)
        except RuntimeError as error:
            raise UserError(
                f"{type(model).__name__} does not take these rows: {in_one_line(str(error))[:200]}"
            ) from error
        by_row: dict[int, list[np.ndarray]] = defaultdict(list)
        for (slot, i), values in sorted(outputs.items()):
            by_row[parts[folders[slot]][i][0]].append(values)
        return {
            question.number: prediction_of(
                question, self.kind, by_row[question.number], labels[question.adapter]
            )
            for question in questions
        }

    def _fitted(self, model: nn.Module, labels: Mapping[str, Sequence[Any]]) -> Any:
        """The objective for these tasks: each output of a head is a label of its own number.

        What it takes from a model before any training, it takes from the base.
        """
        objective, most = self.objective, num_positions(model)
        if most is not None and getattr(objective, "max_tokens", 0) > most:
            objective = dataclasses.replace(objective, max_tokens=most)
        if self.kind == "prompts":
            words = {task: tuple(of_task) for task, of_task in labels.items()}
            objective = dataclasses.replace(objective, labels=words)
        elif isinstance(objective, Classification):
            width = range(head_width(model) or max(map(len, labels.values())))
            objective = dataclasses.replace(
                objective, labels={task: tuple(width) for task in labels}
            )
        of_base = self.kind in ("prompts", "preference")
        with route(None):
            return objective.bind(self.bases.model.to(self.device) if of_base else model)

    def _texts(
        self,
        model: nn.Module,
        questions: Sequence[Question],
        folders: Sequence[Path],
        bank: AdapterBank | None,
    ) -> dict[int, Prediction]:
        """The continuations of prompts, and the answers to conversations.

        Raises:
            UserError: A row has no prompt, or one that is too long.
        """
        slots = {folder: slot for slot, folder in enumerate(folders)}
        check_predicts_tokens(model, self.bases.tokenizer)
        prompts = [self._checked_prompt(model, question.row) for question in questions]
        owners = [slots[question.adapter] for question in questions]
        order = [*range(len(questions))]
        parts = [order[i : i + self.batch_size] for i in order[:: self.batch_size]]
        if bank is not None and not self._mixes(model, bank, prompts, owners):
            parts = [[i for i, owner in enumerate(owners) if owner == s] for s in slots.values()]
        generate = entry_point(WRITES_TEXT["causal-lm"])
        answers: dict[int, Prediction] = {}
        for part in parts:
            with route([owners[i] for i in part] if bank is not None else None):
                texts = generate(
                    model,
                    self.bases.tokenizer,
                    [prompts[i] for i in part],
                    max_new_tokens=self.max_new_tokens,
                    batch_size=len(part),
                    do_sample=False,
                )
            for i, text in zip(part, texts, strict=True):
                answers[questions[i].number] = {PREDICTION: text.text.strip()}
        return answers

    def _checked_prompt(self, model: nn.Module, row: Row) -> Any:
        """The prompt of a row, which the model can read.

        Raises:
            UserError: It has none, or it is too long.
        """
        prompt = prompt_of(row)
        encode = entry_point(ENCODES_PROMPTS["causal-lm"])
        try:
            encode(model, self.bases.tokenizer, [prompt], self.max_new_tokens)
        except UserError as error:
            raise UserError(f"{row.place}: {error}") from error
        return prompt

    def _mixes(
        self, model: nn.Module, bank: AdapterBank, prompts: Sequence[Any], owners: Sequence[int]
    ) -> bool:
        """Whether rows of several adapters can be in one call, by one that keeps no cache."""
        rows = [owners.index(slot) for slot in dict.fromkeys(owners)][:2]
        encode = entry_point(ENCODES_PROMPTS["causal-lm"])
        inputs = encode(model, self.bases.tokenizer, [prompts[i] for i in rows])
        with route([owners[i] for i in rows]), eval_no_grad(model):
            model(**inputs, use_cache=False)
        return bank.settle() is None


def _task(slot: SlotRows) -> Task:
    return Task(slot.key, test=slot.test)
