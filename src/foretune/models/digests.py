"""Digests of weights; that of an encoder that copies of a model share is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.models.tower import TextTower

Named = tuple[str, Tensor]


def text_tower(model: nn.Module) -> TextTower | None:
    """The part of a model that has a frozen encoder and what is above it; None for other models."""
    body = getattr(model, "body", model)
    return body if isinstance(body, TextTower) else None


def moving_buffers(model: nn.Module) -> list[Named]:
    """The buffers of a model that training may change, by name: all but those of an encoder."""
    tower = text_tower(model)
    frozen = set() if tower is None else {id(buffer) for buffer in tower.encoder.buffers()}
    return [(name, buffer) for name, buffer in model.named_buffers() if id(buffer) not in frozen]


def digest(
    tensors: Iterable[Named],
    removed: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    frozen: TextTower | None = None,
) -> str:
    """The digest of named tensors: names, shapes, types and values.

    Args:
        tensors: (name, tensor) pairs, in any order.
        removed: Parts of names that do not count.
        dtype: Floating tensors are digested in this dtype; None digests each in its own.
        frozen: A tower whose encoder may be among the tensors.

    Returns:
        40 hexadecimal digits.
    """
    pairs = sorted(tensors, key=lambda pair: pair[0])
    state, start = hashlib.blake2b(digest_size=20), 0
    if frozen is not None:
        state, start = _after_encoder(pairs, removed, dtype, frozen)
    _update(state, pairs[start:], removed, dtype)
    return state.hexdigest()


def _update(
    state: Any, pairs: Sequence[Named], removed: Sequence[str], dtype: torch.dtype | None
) -> None:
    for name, tensor in pairs:
        for part in removed:  # an adapter is the same under any name
            name = f"{name}.".replace(f"{part}.", ".").rstrip(".")
        value = tensor.detach()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        state.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        state.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _after_encoder(
    pairs: Sequence[Named], removed: Sequence[str], dtype: torch.dtype | None, frozen: TextTower
) -> tuple[Any, int]:
    """The state after the tensors of the encoder, which come first, and their number."""
    inside = {id(t) for t in (*frozen.encoder.parameters(), *frozen.encoder.buffers())}
    count = next((i for i, (_, t) in enumerate(pairs) if id(t) not in inside), len(pairs))
    leading = pairs[:count]
    key = f"digest {dtype} {removed} {[name for name, _ in leading]}"
    identities = [identity(tensor) for _, tensor in leading]
    earlier = frozen.shared.get(key)
    if earlier is None or earlier[0] != identities:
        state = hashlib.blake2b(digest_size=20)
        _update(state, leading, removed, dtype)
        # While these tensors are held, no other one takes their place in memory.
        earlier = frozen.shared[key] = identities, state, [t.detach() for _, t in leading]
    return earlier[1].copy(), count


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors of any shape that share their memory, until one of them is written to."""
    version = -1 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.shape, tensor.stride(), tensor.dtype, tensor.device
