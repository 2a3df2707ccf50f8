"""Scoring a fused model on rows of its tasks, one score per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foretune.errors import UserError
from foretune.fusion.fused import Fused
from foretune.fusion.sample_rows import SampleRow
from foretune.models.loading import head_of_class

Measure = Literal["accuracy", "agreement", "log-likelihood"]
Batches = Mapping[str, Sequence[Mapping[str, Tensor]]]
BATCH_SIZE = 16  # rows per forward pass
MAX_LENGTH = 512  # tokens of a text that are read
IGNORED = -100  # label of a token that is not scored


class HeldOut:
    """Held-out rows of each task, and how they are scored.

    Args:
        fused: A fusion of the models, for their tokenizer and the names of their classes.
        rows: Task → `SampleRow`s, or batches with "labels".

    Raises:
        UserError: The models cannot be scored on such rows.
    """

    def __init__(self, fused: Fused, rows: Mapping[str, Sequence[Any]]) -> None:
        self.tokenizer, self.rows = fused.tokenizer, rows
        name = type(fused.model).__name__
        self.kind = head_of_class(name)
        if self.kind not in ("classification", "image-classification", "causal-lm", "seq2seq"):
            raise UserError(
                f"rows can be scored by classifiers and by models that generate text, not by a "
                f"{name}: leave --samples out"
            )
        self.is_classifier = self.kind.endswith("classification")
        texts = any(isinstance(row, SampleRow) for part in rows.values() for row in part)
        if texts and self.tokenizer is None:
            raise UserError("samples are texts and the base has no tokenizer: give tokenizer=")
        config: Any = getattr(fused.model, "config", None)
        shared = dict(getattr(config, "id2label", None) or {})
        self.classes = {task: fused.labels.get(task, shared) for task in fused.names}
        self.measure: Measure = "log-likelihood"
        if self.is_classifier:
            is_labelled = all(self._has_labels(task) for task in rows)
            self.measure = "accuracy" if is_labelled else "agreement"
        if self.kind == "seq2seq" and any(
            isinstance(row, SampleRow) and not row.prompt for part in rows.values() for row in part
        ):
            raise UserError(f'a {name} is scored on rows with "prompt" and "completion"')

    def batches(self, task: str, model: nn.Module) -> list[dict[str, Tensor]]:
        """A task's rows as batches with "labels".

        Args:
            task: Name of the task.
            model: The task's own model, whose answers are the labels where "agreement" is measured.

        Raises:
            UserError: No row has a token that can be scored.
        """
        batches = [dict(row) for row in self.rows[task] if not isinstance(row, SampleRow)]
        batches += self._of_texts(task)
        if not batches:
            raise UserError(f"no held-out row of {task} has a token that can be scored")
        if self.measure == "agreement":
            for batch in batches:
                batch.pop("labels", None)
                batch["labels"] = _logits(model, batch).argmax(-1).cpu()
        return batches

    def _has_labels(self, task: str) -> bool:
        names = set(self.classes[task].values())
        return all(
            row.label in names if isinstance(row, SampleRow) else "labels" in row
            for row in self.rows[task]
        )

    def _of_texts(self, task: str) -> Iterator[dict[str, Tensor]]:
        rows = [row for row in self.rows[task] if isinstance(row, SampleRow)]
        for start in range(0, len(rows), BATCH_SIZE):
            part = rows[start : start + BATCH_SIZE]
            if self.kind == "seq2seq":
                yield self._pairs(part)
                continue
            batch = self._tokens([row.text for row in part])
            if self.is_classifier:
                index = {label: i for i, label in self.classes[task].items()}
                if self.measure == "accuracy":
                    batch["labels"] = torch.tensor([index[str(row.label)] for row in part])
            else:
                mask = batch["attention_mask"].bool()
                prompts = torch.tensor([self._length(row.prompt) for row in part])
                place = mask.long().cumsum(1)  # 1 for the first token, on whichever side the pads
                scored = mask & (place > prompts.unsqueeze(1))
                batch["labels"] = batch["input_ids"].masked_fill(~scored, IGNORED)
                usable = scored[:, 1:].any(1)  # not a prompt of MAX_LENGTH tokens
                batch = {key: value[usable] for key, value in batch.items()}
            if len(batch["input_ids"]):
                yield batch

    def _pairs(self, rows: Sequence[SampleRow]) -> dict[str, Tensor]:
        """Prompts for an encoder, completions as labels."""
        batch = self._tokens([row.prompt for row in rows])
        answers = self._tokens([row.text[len(row.prompt) :] for row in rows])
        padding = ~answers["attention_mask"].bool()
        return {**batch, "labels": answers["input_ids"].masked_fill(padding, IGNORED)}

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        length = min(MAX_LENGTH, self.tokenizer.model_max_length)
        return dict(
            self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
            )
        )

    def _length(self, prompt: str) -> int:
        """Number of tokens of a prompt, without a token that ends it."""
        if not prompt:
            return 0
        ids = self.tokenizer(prompt)["input_ids"]
        ends = bool(ids) and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
        return len(ids) - ends


def row_scores(fused: Fused, task: str, batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """One score per row: 1 or 0 for a class, or the mean log-likelihood of its tokens in nats.

    Args:
        fused: The model, whose head (and, with routing=task, experts) become the task's.
        task: Name of the task.
        batches: Inputs of the model with "labels": classes (rows,), or tokens (rows, length) with
            -100 where none is scored.
    """
    fused.set_task(task)
    scores: list[float] = []
    shifted = not getattr(getattr(fused.model, "config", None), "is_encoder_decoder", False)
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels = batch["labels"]
        if labels.dim() == 1:
            logits = _logits(fused.model, inputs)
            scores += (logits.argmax(-1).cpu() == labels).float().tolist()
        else:
            logits = _logits(fused.model, inputs if shifted else batch)
            scores += _log_likelihoods(logits, labels, shifted=shifted)
    return scores


def _log_likelihoods(logits: Tensor, labels: Tensor, *, shifted: bool) -> list[float]:
    """(rows, length, vocabulary), (rows, length) → per row the mean over its scored tokens."""
    labels = labels.to(logits.device)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    counts = (labels != IGNORED).sum(1).clamp_min(1)
    return (-losses.sum(1) / counts).tolist()


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad():
        logits: Tensor = model(**{key: value.to(device) for key, value in batch.items()}).logits
    return logits
