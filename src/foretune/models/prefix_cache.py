"""Cache of the states of texts after a frozen prefix, shared by models with equal prefixes."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.models.quantised import scales
from foretune.models.surgery import block_list

SKIPPED_CONFIG = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "id2label", "label2id", "num_labels"),
        *("problem_type", "torch_dtype", "transformers_version", "use_cache"),
    }
)


class PrefixCache:
    """The states of texts after a frozen prefix.

    A full cache makes room by dropping states that were not used since `renew`. What is in use
    stays, and what does not fit is not stored: in passes over the same texts it would only displace
    what the next pass needs.

    Args:
        max_bytes: Size of the cache.
    """

    def __init__(self, max_bytes: int = 2 * 2**30) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._states: dict[bytes, Tensor] = {}  # used since `renew`
        self._earlier: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._states) + len(self._earlier)

    def renew(self) -> None:
        """Begins another wave of tasks: drops the states that the last one did not use."""
        self.num_bytes -= sum(map(_num_bytes, self._earlier.values()))
        self._earlier, self._states = self._states, {}

    def get(self, key: bytes) -> Tensor | None:
        """(L, d) states stored under a key, if any."""
        states = self._earlier.pop(key, None)
        if states is not None:
            self._states[key] = states
        return self._states.get(key)

    def put(self, key: bytes, states: Tensor) -> None:
        """Store (L, d) states unless the cache is full."""
        if self.get(key) is not None:
            return
        size = _num_bytes(states)
        while self.num_bytes + size > self.max_bytes and self._earlier:
            self.num_bytes -= _num_bytes(self._earlier.pop(next(iter(self._earlier))))
        if self.num_bytes + size <= self.max_bytes:
            self._states[key] = states
            self.num_bytes += size


def _num_bytes(states: Tensor) -> int:
    return states.numel() * states.element_size()


_CACHES: OrderedDict[str, PrefixCache] = OrderedDict()
_MOST_CACHES = 2  # a third prefix evicts the least recently used one


def prefix_cache(model: nn.Module, first_block: int, outside: Mapping[str, Tensor]) -> PrefixCache:
    """The cache of this model's prefix, the same object for all models with an equal prefix.

    Args:
        model: A model; the contents of the tensors that its prefix reads are hashed.
        first_block: The lowest block that is not part of the prefix.
        outside: What the prefix reads besides the blocks below it, by name.
    """
    key = _fingerprint(model, first_block, outside)
    cache = _CACHES.setdefault(key, PrefixCache())
    _CACHES.move_to_end(key)
    while len(_CACHES) > _MOST_CACHES:
        _CACHES.popitem(last=False)
    return cache


def renew_prefix_caches() -> None:
    """Begins another wave of tasks in all caches, so that they grow with a wave, not with all."""
    for cache in _CACHES.values():
        cache.renew()


def _fingerprint(model: nn.Module, first_block: int, outside: Mapping[str, Tensor]) -> str:
    """Hexadecimal digest of all that the states depend on.

    Raises:
        UserError: The model has no list of blocks.
    """
    named_blocks = block_list(model)
    if named_blocks is None:
        raise UserError(f"{type(model).__name__} has no list of blocks, so no frozen prefix")
    blocks = named_blocks[1]
    digest = hashlib.blake2b(digest_size=16)
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    settings = {k: v for k, v in fields.items() if k not in SKIPPED_CONFIG}
    device = next(model.parameters()).device
    described = [type(model).__qualname__, first_block, str(device), settings, sorted(outside)]
    digest.update(json.dumps(described, default=str).encode())
    digest.update(repr(blocks[:first_block]).encode())
    tensors = [outside[name] for name in sorted(outside)]
    for block in blocks[:first_block]:
        tensors += [*block.parameters(), *block.buffers()]
        tensors += [scale for _, scale in scales(block)]
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(plain.numpy().data)
    return digest.hexdigest()
