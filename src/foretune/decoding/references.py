"""Rows as references: texts, the positions that count, and the token that follows each."""

from __future__ import annotations

import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from foretune.decoding.generation import prompt_ids
from foretune.errors import UserError
from foretune.tasks.file_formats import check_unicode
from foretune.tasks.labels import label_text
from foretune.tasks.messages import checked_messages
from foretune.tasks.objectives.chat import encode_chat
from foretune.tasks.objectives.text import ended, plain_ids

KINDS = {
    "label": "prompt (or text) and label",
    "choice": "context, candidates and answer",
    "completion": "prompt and completion (or messages)",
    "text": "text",
}
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class References:
    """Tokenised rows.

    Args:
        kind: "label", "choice", "completion" or "text".
        labels: Label → the ids of its tokens; empty for running text and completions.
        texts: Token ids of each text.
        places: Positions of each text that count: the last ones, without a gap.
        values: The token that follows each of these positions; of kinds with labels, the index of
            the label that follows the text.
        sources: The row that each text comes from, counted from 0.
    """

    kind: str
    labels: dict[str, list[int]]
    texts: list[list[int]] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)
    values: list[list[int]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    @property
    def has_labels(self) -> bool:
        """Whether one label follows each text."""
        return self.kind in ("label", "choice")

    def flat_values(self) -> Tensor:
        """(N,) the values of all texts, concatenated."""
        return torch.tensor([value for values in self.values for value in values])

    def spelled(self) -> References:
        """The same texts with every token of their labels as values, for a loss on tokens."""
        if not self.has_labels:
            return self
        tokens = list(self.labels.values())
        written = References("completion", {})
        for text, [label], source in zip(self.texts, self.values, self.sources, strict=True):
            places = range(len(text) - 1, len(text) + len(tokens[label]) - 1)
            written.add([*text, *tokens[label][:-1]], list(places), tokens[label], source)
        return written

    def add(self, text: list[int], places: list[int], values: list[int], source: int) -> None:
        """Appends one text."""
        self.texts.append(text)
        self.places.append(places)
        self.values.append(values)
        self.sources.append(source)


def read_references(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    permute_options: bool = False,
    like: References | None = None,
    for_encoder: bool = False,
) -> References:
    """Tokenises rows, all of one kind.

    What counts in a row with `prompt` (or `text`) and `label`: the label, after the prompt.
    With `context`, `candidates` and `answer`: the letter of the right candidate. With
    `prompt` and `completion`: every token of the completion and the end-of-text token. With
    `messages`: every token of the last assistant's turn. With `text`:
    every token but the first; texts longer than `max_tokens` are split.

    Args:
        rows: The rows.
        tokenizer: The model's tokenizer.
        max_tokens: Number of positions of the model; None for no limit.
        permute_options: Make one text per rotation of a row's candidates, so that each letter is
            right equally often.
        like: References whose kind and labels the rows must have.
        for_encoder: Whether an encoder reads the rows: texts with all special tokens, labels
            without tokens.

    Raises:
        UserError: There are no rows, rows of several kinds, malformed rows, labels of the same
            tokens, or a prompt that is too long; the message names the row.
    """
    if not rows:
        raise UserError("no rows to read references from; give at least one")
    if tokenizer is None:
        raise UserError("the model has no tokenizer, which reading rows needs: pass one")
    kinds = [_kind(row, i) for i, row in enumerate(rows)]
    kind = kinds[0]
    for i, kind_of_row in enumerate(kinds):
        if kind_of_row != kind:
            raise UserError(
                f"all rows must be of one kind: row {i + 1} holds {KINDS[kind_of_row]}, row 1 "
                f"{KINDS[kind]}"
            )
    if like is not None and like.kind != kind:
        raise UserError(f"rows hold {KINDS[kind]}, but the store was built from {KINDS[like.kind]}")
    if for_encoder and kind != "label":
        raise UserError(
            f"rows hold {KINDS[kind]}, but an encoder only classifies: give {KINDS['label']}"
        )
    if like is not None:
        labels = like.labels
    elif for_encoder:
        labels = {name: [] for name in sorted({label_text(row["label"]) for row in rows})}
    else:
        labels = _label_tokens(rows, kind, tokenizer)
    references = References(kind, dict(labels))
    spare = max([0, *(len(tokens) - 1 for tokens in labels.values())])
    for i, row in enumerate(rows):
        turns = len(row["candidates"]) if kind == "choice" and permute_options else 1
        for turn in range(turns):
            start = len(references.texts)
            _add(references, row, i, tokenizer, max_tokens, turn)
            longest = max((len(text) for text in references.texts[start:]), default=0)
            if max_tokens is not None and longest > max_tokens - spare:
                raise UserError(
                    f"row {i + 1} has {longest + spare} tokens, but the model reads at most "
                    f"{max_tokens}; shorten it"
                )
    if not any(references.values):
        raise UserError("a text needs two tokens or more, one to predict from the other")
    return references


def choice_prompt(row: Mapping[str, Any], turn: int = 0) -> tuple[str, str]:
    r"""The prompt of a choice row and the letter of its answer.

    Args:
        row: `context` (text or a list of turns), `candidates`, `answer`.
        turn: Number of places by which the candidates are rotated.

    >>> choice_prompt({"context": "1 + 1?", "candidates": ["one", "two"], "answer": 1}, turn=1)
    ('1 + 1?\nA. two\nB. one\nAnswer:', 'A')
    """
    context, candidates = row["context"], row["candidates"]
    lines = [context] if isinstance(context, str) else list(context)
    turned = [*candidates[turn:], *candidates[:turn]]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, turned, strict=False)]
    return "\n".join([*lines, "Answer:"]), LETTERS[(row["answer"] - turn) % len(candidates)]


def prompt_and_label(row: Mapping[str, Any], kind: str, turn: int = 0) -> tuple[str, str]:
    """(prompt, label) of a row of kind "label" or "choice"."""
    if kind == "choice":
        return choice_prompt(row, turn)
    return _prompt(row), label_text(row["label"])


def _prompt(row: Mapping[str, Any]) -> str:
    """The prompt of a row with a label; classification rows have it under `text`."""
    prompt: str = row["text"] if row.get("prompt") is None else row["prompt"]
    return prompt


def _add(
    references: References,
    row: Any,
    source: int,
    tokenizer: Any,
    max_tokens: int | None,
    turn: int,
) -> None:
    if references.kind == "text":
        ids = prompt_ids(tokenizer, row["text"])
        step = max_tokens or len(ids)
        for start in range(0, len(ids) - 1, step):
            piece = ids[start : start + step + 1]
            references.add(piece[:-1], list(range(len(piece) - 1)), piece[1:], source)
    elif references.kind == "completion" and row.get("prompt") is None:
        turns = checked_messages(row["messages"], f"row {source + 1}: messages")
        ids, [(begin, end)] = encode_chat(
            tokenizer,
            turns,
            train_on="last",
            max_tokens=sys.maxsize,
            tools=row.get("tools"),
            where=f"row {source + 1}",
        )
        references.add(ids[:-1], list(range(begin - 1, end - 1)), ids[begin:end], source)
    elif references.kind == "completion":
        ids = prompt_ids(tokenizer, row["prompt"])
        completion = plain_ids(tokenizer, [row["completion"]])[0]
        after = ended(completion, tokenizer.eos_token_id)
        places = list(range(len(ids) - 1, len(ids) + len(after) - 1))
        references.add([*ids, *after][:-1], places, after, source)
    else:
        prompt, label = prompt_and_label(row, references.kind, turn)
        if label not in references.labels:
            raise UserError(
                f'row {source + 1} has the label "{label}", which is not in the store; it has '
                f"{', '.join(list(references.labels)[:8])}"
            )
        if references.labels[label]:
            ids = prompt_ids(tokenizer, prompt)
        else:
            ids = list(tokenizer(prompt, verbose=False)["input_ids"])
        references.add(ids, [len(ids) - 1], [list(references.labels).index(label)], source)


def _kind(row: Mapping[str, Any], place: int) -> str:
    """The kind of a row; checks its fields.

    Raises:
        UserError: The row is of no kind, or a field is malformed.
    """
    kind = next(
        (k for k, needs in _NEEDS if all(row.get(name) is not None for name in needs)), None
    )
    if kind is None:
        has = ", ".join(k for k, v in row.items() if v is not None) or "nothing"
        kinds = "; or ".join(KINDS.values())
        raise UserError(f"row {place + 1}: a row needs {kinds}; this one has {has}")
    for name in ("prompt", "completion", "text"):
        if row.get(name) is not None and (not isinstance(row[name], str) or not row[name].strip()):
            raise UserError(f"row {place + 1}: {name} must be text, got {row[name]!r:.40}")
        check_unicode(row.get(name) or "", f"row {place + 1}, {name}")
    label = row.get("label")
    if kind == "label" and (
        isinstance(label, bool) or not isinstance(label, str | int) or not str(label).strip()
    ):
        raise UserError(f"row {place + 1}: label must be text or an integer, got {label!r:.40}")
    if kind == "choice":
        _check_choice(row, place)
    return kind


_NEEDS = (
    ("choice", ("context", "candidates", "answer")),
    ("label", ("prompt", "label")),
    ("label", ("text", "label")),
    ("completion", ("prompt", "completion")),
    ("completion", ("messages",)),
    ("text", ("text",)),
)


def _check_choice(row: Mapping[str, Any], place: int) -> None:
    candidates, answer = row["candidates"], row["answer"]
    if not isinstance(candidates, list) or not 2 <= len(candidates) <= len(LETTERS):
        raise UserError(
            f"row {place + 1}: candidates must be a list of 2 to {len(LETTERS)}, got "
            f"{candidates!r:.40}"
        )
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(candidates):
        raise UserError(
            f"row {place + 1}: answer must be from 0 to {len(candidates) - 1}, got {answer!r:.40}"
        )


def _label_tokens(
    rows: Sequence[Mapping[str, Any]], kind: str, tokenizer: Any
) -> dict[str, list[int]]:
    """Label → the ids of its tokens, in alphabetical order.

    Raises:
        UserError: Two labels are the same tokens, or one begins with the whole of another and the
            tokenizer has no end-of-text token to tell them apart.
    """
    if kind == "label":
        names = {label_text(row["label"]): _prompt(row) for row in rows}
    elif kind == "choice":
        num_letters = max(len(row["candidates"]) for row in rows)
        names = dict.fromkeys(LETTERS[:num_letters], "Answer:")
    else:
        return {}
    labels = {name: _tokens_after(tokenizer, name, names[name]) for name in sorted(names)}
    by_tokens = sorted(labels.items(), key=lambda item: item[1])
    begun = False
    for (label, tokens), (next_label, next_tokens) in pairwise(by_tokens):
        if tokens == next_tokens:
            raise UserError(
                f'labels "{label}" and "{next_label}" are the same tokens to this tokenizer: '
                "rename one of them"
            )
        if next_tokens[: len(tokens)] == tokens:
            begun = True
            if tokenizer.eos_token_id is None:
                raise UserError(
                    f'label "{next_label}" begins with label "{label}", and the tokenizer has no '
                    "end-of-text token to tell where a label ends: rename one of them"
                )
    # Otherwise the shorter of the two would always be the more probable one.
    end = [tokenizer.eos_token_id] if begun else []
    return {label: [*tokens, *end] for label, tokens in labels.items()}


def _tokens_after(tokenizer: Any, label: str, prompt: str) -> list[int]:
    """The tokens of a label after a prompt, from which a space separates it.

    Raises:
        UserError: The label has no token.
    """
    ids = plain_ids(tokenizer, [label if prompt[-1].isspace() else f" {label}"])[0]
    # Tokenizers that put a space before every text may begin with that space alone.
    if not ids or not tokenizer.decode(ids[:1]).strip():
        ids = plain_ids(tokenizer, [label])[0]
    if not ids:
        raise UserError(f'label "{label}" has no token')
    return ids
