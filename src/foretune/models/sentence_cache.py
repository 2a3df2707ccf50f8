"""The embeddings of texts by the frozen encoder of a tower, each computed once.

Models whose encoders are equal share a cache: the copies that the verbs train, and bases that were
loaded from different folders.
"""

from __future__ import annotations

import contextlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.models.digests import digest, text_tower
from foretune.models.reading import note_asked, note_computed
from foretune.models.tower import TextTower

ROWS = 16  # texts are embedded in batches of this many …
STEP = 8  # … padded to a multiple of this length
MOST_CACHES = 4  # a further encoder evicts the least recently used one


class SentenceCache:
    """The embeddings of texts, which are numbered in the order of their first appearance.

    About 4 d bytes per distinct text are kept, without a limit.

    Args:
        tower: The model whose encoder embeds the texts.

    Attributes:
        by_text: The number and token ids of each text as an objective reads it, by what decides
            them.
    """

    def __init__(self, tower: TextTower) -> None:
        self.tower = tower
        self.by_text: dict[Hashable, tuple[int, list[int]]] = {}
        self._numbers: dict[bytes, int] = {}
        self._new: dict[int, bytes] = {}  # the ids of texts that were not asked for yet
        self._vectors = torch.empty(0, tower.encoder.config.hidden_size)

    def __len__(self) -> int:
        return len(self._numbers)

    def number_of(self, ids: Sequence[int]) -> int:
        """The number of the text with these token ids, special tokens included."""
        key = array("i", ids).tobytes()
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            self._new[number] = key
        return number

    def embeddings(self, numbers: np.ndarray) -> Tensor:
        """(n, d) embeddings of the texts with these numbers (n,); new texts are embedded now."""
        note_asked(len(numbers))
        new = [n for n in np.unique(numbers).tolist() if n in self._new] if self._new else []
        if new:
            self._embed_new(new)
        return self._vectors.index_select(0, torch.from_numpy(numbers))

    def _embed_new(self, numbers: Sequence[int]) -> None:
        """Embeds the texts with these numbers."""
        if len(self._vectors) < len(self):
            room = self._vectors.new_empty(2 * len(self), self._vectors.shape[1])
            room[: len(self._vectors)] = self._vectors
            self._vectors = room
        texts = {n: np.frombuffer(self._new[n], dtype=np.int32) for n in numbers}
        by_length: dict[int, list[int]] = {}
        for number, ids in texts.items():
            by_length.setdefault(self._padded(len(ids)), []).append(number)
        for length, places in sorted(by_length.items()):
            for start in range(0, len(places), ROWS):
                part = places[start : start + ROWS]
                self._vectors[part] = self._embed([texts[n] for n in part], length)
                for number in part:
                    del self._new[number]

    def _padded(self, length: int) -> int:
        """The length that a text is padded to; depends on its own length only."""
        most = getattr(self.tower.encoder.config, "max_position_embeddings", None)
        rounded = -(-length // STEP) * STEP
        return rounded if most is None else max(length, min(rounded, most))

    def _embed(self, texts: Sequence[np.ndarray], length: int) -> Tensor:
        """(n, d) embeddings of up to ROWS texts.

        The batch always has ROWS rows, filled up by repetition, so that an embedding does not
        depend on which other texts are new, and neither does a resumed run.
        """
        rows = (list(texts) * ROWS)[:ROWS]
        fill = getattr(self.tower.encoder.config, "pad_token_id", None) or 0
        ids, mask = np.full((2, ROWS, length), fill, dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i] = np.arange(length) < len(row)
        device = next(self.tower.encoder.parameters()).device
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            note_computed(ROWS, device),
        ):
            vectors = self.tower.embed(
                torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
            )
        return vectors[: len(texts)].float().cpu()


_CACHES: OrderedDict[str, SentenceCache] = OrderedDict()


def sentence_cache(model: nn.Module) -> SentenceCache | None:
    """The cache of a model's frozen encoder; None for a model without one."""
    tower = text_tower(model)
    if tower is None:
        return None
    config: Any = tower.config
    named = [*tower.encoder.named_parameters(), *tower.encoder.named_buffers()]
    weights = digest(named, frozen=tower)
    key = json.dumps([weights, config.encoder], sort_keys=True, default=str)
    if key not in _CACHES:
        _CACHES[key] = SentenceCache(tower)
    _CACHES.move_to_end(key)
    while len(_CACHES) > MOST_CACHES:
        _CACHES.popitem(last=False)
    return _CACHES[key]


@contextlib.contextmanager
def embedding_with(model: nn.Module) -> Iterator[None]:
    """Inside the block the encoder of this copy embeds new texts, on the device that it is on."""
    tower, cache = text_tower(model), sentence_cache(model)
    if tower is None or cache is None:
        yield
        return
    before, cache.tower = cache.tower, tower
    try:
        yield
    finally:
        cache.tower = before
