"""Tokenising, truncating and padding that the text objectives share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretune.errors import UserError

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Template:
    """The special tokens that a tokenizer puts before, between and after its texts."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    segments: tuple[int, int] | None  # token type ids of the two texts, None when it gives none

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def fill(self, first: Sequence[int], second: Sequence[int] = ()) -> list[int]:
        """The ids of one row."""
        return [*self.before, *first, *self.between, *second, *self.after]

    def room(self, max_tokens: int, field: str) -> int:
        """Tokens of text that fit beside the special ones.

        Raises:
            UserError: None does; the message names `field`.
        """
        left = max_tokens - len(self)
        if left < 1:
            raise UserError(
                f"{field}={max_tokens} leaves no room for text beside the tokenizer's "
                f"{len(self)} special tokens; {len(self) + 1} or more would do"
            )
        return left


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text: no special tokens, no truncation."""
    if tokenizer is None:
        raise UserError("this objective reads text and needs a tokenizer, got tokenizer=None")
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


@functools.lru_cache(maxsize=2**16)
def cached_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of one text that is likely to come again: distractors are other rows' answers."""
    return tuple(plain_ids(tokenizer, [text])[0])


@functools.lru_cache(maxsize=16)
def single_template(tokenizer: Any) -> Template:
    """What the tokenizer puts around one text.

    Read off an example, because truncating by the tokenizer itself would mean changing its state
    (`truncation_side`) under the feet of the caller who owns it.
    """
    probe = plain_ids(tokenizer, ["a"])[0]
    whole = tokenizer("a", verbose=False)["input_ids"]
    start = _find(whole, probe, 0)
    return Template(tuple(whole[:start]), (), tuple(whole[start + len(probe) :]), None)


@functools.lru_cache(maxsize=16)
def pair_template(tokenizer: Any) -> Template:
    """What the tokenizer puts around and between two texts."""
    a, b = plain_ids(tokenizer, ["a", "b"])
    whole = tokenizer("a", "b", verbose=False)
    ids = whole["input_ids"]
    start = _find(ids, a, 0)
    middle = start + len(a)
    second = _find(ids, b, middle)
    end = second + len(b)
    types = whole.get("token_type_ids")
    segments = None if types is None else (types[start], types[second])
    return Template(tuple(ids[:start]), tuple(ids[middle:second]), tuple(ids[end:]), segments)


def _find(whole: Sequence[int], part: Sequence[int], start: int) -> int:
    for i in range(start, len(whole) - len(part) + 1):
        if list(whole[i : i + len(part)]) == list(part):
            return i
    raise UserError("the tokenizer changes a text's ids when it adds special tokens")


def pad_id(tokenizer: Any) -> int:
    """The id that fills rows up; which one does not matter to the result, masks decide."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(n, longest) ids, filled up on the right."""
    longest = max((len(row) for row in rows), default=0)
    filled = np.full((len(rows), longest), value, dtype=np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return torch.from_numpy(filled)


def pad_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """(n, longest) 1 where a row has a token, 0 where it is filled up."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max()) if len(rows) else 0
    return torch.from_numpy((np.arange(longest)[None, :] < lengths[:, None]).astype(np.int64))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(n, d) mean over the tokens that `mask` (n, L) keeps."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def text_of(example: Any, field: str, task: str) -> str:
    """The text in a field of an example.

    Raises:
        UserError: The field is absent or holds no text.
    """
    value = example.get(field)
    if not isinstance(value, str):
        raise UserError(
            f'task "{task}": a row needs text in "{field}", got {value!r:.60}; '
            f"the row has {', '.join(map(str, example)) or 'no fields'}"
        )
    return value


def logits_of(output: Any) -> Tensor:
    """What a model returned, when it is a tensor or has `.logits`."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
