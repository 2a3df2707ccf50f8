"""Tokenising, truncating and padding for the text objectives."""

from __future__ import annotations

import contextlib
import functools
import itertools
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foretune.errors import UserError
from foretune.tasks.example import place_of
from foretune.tasks.file_formats import check_unicode, one_line

IGNORED = -100  # the label that torch's cross-entropy ignores


@dataclass(frozen=True)
class Template:
    """The special tokens that a tokenizer puts before, between and after its texts."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    segments: tuple[int, int] | None  # token type ids of the two texts; None if it has none

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def fill(self, first: Sequence[int], second: Sequence[int] = ()) -> list[int]:
        """The ids of one or two texts with their special tokens."""
        return [*self.before, *first, *self.between, *second, *self.after]

    def room(self, max_tokens: int, field: str) -> int:
        """The number of text tokens that fit beside the special ones.

        Raises:
            UserError: None fits; the message names `field`.
        """
        room = max_tokens - len(self)
        if room < 1:
            raise UserError(
                f"{field}={max_tokens} leaves no room for text beside the tokenizer's "
                f"{len(self)} special tokens: set it to {len(self) + 1} or more"
            )
        return room


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, without special tokens and truncation.

    Raises:
        UserError: There is no tokenizer, or it does not take the texts.
    """
    if not texts:
        return []
    ids: list[list[int]] = _encoded(tokenizer, list(texts), add_special_tokens=False)["input_ids"]
    return ids


def _encoded(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """What the tokenizer makes of texts.

    Raises:
        UserError: There is no tokenizer, or it does not take them.
    """
    if tokenizer is None:
        raise UserError("this objective reads text and needs a tokenizer, got tokenizer=None")
    try:
        return tokenizer(*texts, verbose=False, **options)
    except Exception as error:  # of the tokenizers library: it has no class of its own
        sample = texts[0] if isinstance(texts[0], str) else texts[0][0]
        raise UserError(f"the tokenizer does not take {sample!r:.60}: {one_line(error)}") from error


TRIED_WORDS = 100
CACHED_TOKENS = 5_000_000  # of four bytes
_cache: OrderedDict[tuple[Any, int, str], array[int]] = OrderedDict()
_cached_tokens = 0


def token_ids(tokenizer: Any, text: str, where: str) -> list[int]:
    """The token ids of one text, without special tokens and truncation.

    The latest ones are remembered: rows are checked before they are trained on, and the distractors
    of one row are the answers of others.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        where: Its row, for the message.

    Raises:
        UserError: There is no tokenizer, or it does not take the text.
    """
    global _cached_tokens
    key = (*state_of(tokenizer), text)
    ids = _cache.get(key)
    if ids is None:
        check_unicode(text, where)
        try:
            ids = _cache[key] = array("i", plain_ids(tokenizer, [text])[0])
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        _cached_tokens += len(ids)
        while _cached_tokens > CACHED_TOKENS:
            _cached_tokens -= len(_cache.popitem(last=False)[1])
    return ids.tolist()


def state_of(tokenizer: Any) -> tuple[Any, int]:
    """What decides the token ids of a text: the tokenizer, to which tokens may have been added."""
    return tokenizer, len(tokenizer) if hasattr(tokenizer, "__len__") else 0


@functools.lru_cache(maxsize=16)
def single_template(tokenizer: Any) -> Template:
    """The special tokens that the tokenizer puts around one text.

    They are read off an example: truncating with the tokenizer itself would change its state
    (`truncation_side`), which belongs to the caller.
    """
    word = _known_word(tokenizer)
    probe = plain_ids(tokenizer, [word])[0]
    ids = _encoded(tokenizer, word)["input_ids"]
    start = _index_of(ids, probe, 0)
    return Template(tuple(ids[:start]), (), tuple(ids[start + len(probe) :]), None)


@functools.lru_cache(maxsize=16)
def pair_template(tokenizer: Any) -> Template:
    """The special tokens that the tokenizer puts around and between two texts."""
    word = _known_word(tokenizer)
    [probe] = plain_ids(tokenizer, [word])
    encoded = _encoded(tokenizer, word, word)
    ids = encoded["input_ids"]
    start = _index_of(ids, probe, 0)
    middle = start + len(probe)
    second = _index_of(ids, probe, middle)
    end = second + len(probe)
    types = encoded.get("token_type_ids")
    segments = None if types is None else (types[start], types[second])
    return Template(tuple(ids[:start]), tuple(ids[middle:second]), tuple(ids[end:]), segments)


def _known_word(tokenizer: Any) -> str:
    """A text that the tokenizer makes a token of: "a", or else a word of its vocabulary.

    Raises:
        UserError: There is none.
    """
    special = set(getattr(tokenizer, "all_special_tokens", ()))
    words = itertools.chain(["a"], (w for w in _vocabulary(tokenizer) if w not in special))
    for word in itertools.islice(words, TRIED_WORDS):
        with contextlib.suppress(UserError):
            if plain_ids(tokenizer, [word])[0]:
                return word
    raise UserError(f"the tokenizer makes no token of any of {TRIED_WORDS} words that it knows")


def _vocabulary(tokenizer: Any) -> Iterable[str]:
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ()


def _index_of(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    """The first index, `start` or later, at which `ids` contains `part`.

    Raises:
        UserError: It does not.
    """
    for i in range(start, len(ids) - len(part) + 1):
        if list(ids[i : i + len(part)]) == list(part):
            return i
    raise UserError("the tokenizer changes a text's ids when it adds special tokens")


def ended(ids: Sequence[int], end: int | None, max_tokens: int | None = None) -> list[int]:
    """The ids of a text that is predicted, closed by the end-of-text token where it really ends.

    A text that ends with the token gets no second one, and one that is cut gets none.

    Args:
        ids: The whole text.
        end: The end-of-text token; None if there is none.
        max_tokens: Most ids to return; None for all.

    >>> ended([5, 6], 2, 4), ended([5, 2], 2, 4), ended([5, 6, 7], 2, 3)
    ([5, 6, 2], [5, 2], [5, 6, 7])
    """
    closed = [*ids] if end is None or ids[-1:] == [end] else [*ids, end]
    return closed[:max_tokens]


def pad_id(tokenizer: Any) -> int:
    """The id used for padding; attention masks make the choice irrelevant to the result."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if isinstance(value, int):
            return value
    return 0


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(n, longest) ids, padded on the right with `value`."""
    longest = max((len(row) for row in rows), default=0)
    filled = np.full((len(rows), longest), value, dtype=np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return torch.from_numpy(filled)


def pad_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """(n, longest) attention mask: 1 where a row has a token, 0 where it is padded."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    longest = int(lengths.max()) if len(rows) else 0
    return torch.from_numpy((np.arange(longest)[None, :] < lengths[:, None]).astype(np.int64))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(n, d) mean of hidden (n, L, d) over the tokens where mask (n, L) is 1."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def text_of(example: Any, field: str, task: str) -> str:
    """The text in a field of an example.

    Raises:
        UserError: The field is missing or is not a text.
    """
    value = example.get(field)
    if not isinstance(value, str):
        raise UserError(
            f'{name_of(example, task)}: a row needs text in "{field}", got {value!r:.60}; '
            f"the row has {', '.join(map(str, example)) or 'no fields'}"
        )
    return value


def name_of(example: Any, task: str) -> str:
    """The task of an example and where it was read, for a message."""
    return f'task "{task}"{place_of(example)}'


def field_ids(tokenizer: Any, example: Any, field: str, task: str) -> list[int]:
    """The token ids of the text in a field, without special tokens and truncation.

    Raises:
        UserError: There is no text, no tokenizer, or no token.
    """
    value = text_of(example, field, task)
    where = name_of(example, task)
    return need_tokens(token_ids(tokenizer, value, where), value, where)


def need_tokens(ids: list[int], text: str, where: str) -> list[int]:
    """The ids, one or more.

    Raises:
        UserError: The tokenizer makes no token of the text.
    """
    if not ids:
        raise UserError(f"{where}: the tokenizer makes no token of {text!r:.60}: leave the row out")
    return ids


def logits_of(output: Any) -> Tensor:
    """The logits (n, …) in a model's output, which is a tensor or has `.logits`."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
