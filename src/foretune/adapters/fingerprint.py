"""A fingerprint of a base's weights: tells apart retrained bases of one architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn


def fingerprint(model: nn.Module, leave_out: Sequence[str] = ()) -> str:
    """A digest of names, shapes, types and values of the parameters.

    Args:
        model: The base.
        leave_out: Modules that an adapter replaces by its own copies (heads).

    Returns:
        40 hexadecimal digits; equal for equal weights, whatever device they are on.
    """
    digest = hashlib.blake2b(digest_size=20)
    for name, p in sorted(model.named_parameters()):
        if any(name == m or name.startswith(f"{m}.") for m in leave_out):
            continue
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
