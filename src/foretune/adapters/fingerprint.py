"""A fingerprint of a base's weights: tells apart retrained bases of one architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import UserError


def fingerprint(model: nn.Module, leave_out: Sequence[str] = (), *, buffers: bool = False) -> str:
    """A digest of names, shapes, types and values of the parameters.

    Args:
        model: The base.
        leave_out: Modules that an adapter replaces by its own copies (heads).
        buffers: Of the buffers too, such as the statistics of batch norms.

    Returns:
        40 hexadecimal digits; equal for equal weights, whatever device they are on.
    """
    more = model.named_buffers() if buffers else ()
    kept = (
        (name, p)
        for name, p in (*model.named_parameters(), *more)
        if not any(name == m or name.startswith(f"{m}.") for m in leave_out)
    )
    return _digest(kept)


def base_and_adapter(model: Any) -> dict[str, str | None]:
    """The fingerprints of a model's base and of the adapter that is at work on it.

    Args:
        model: A model, or a `PeftModel`. The base of a `PeftModel` has the fingerprint that it
            has alone.

    Returns:
        `base`, and `adapter`: None where there is none, or where it is switched off.

    Raises:
        UserError: A `PeftModel` whose adapter is a prompt.
    """
    if not hasattr(model, "peft_config"):
        return {"base": fingerprint(model), "adapter": None}
    if model.active_peft_config.is_prompt_learning:
        raise UserError("adapters that are prompts are not supported: they change the positions")
    active = [f".{name}" for name in model.active_adapters]
    own, added = [], []
    for name, p in model.get_base_model().named_parameters():
        if f".{model.base_model.prefix}" in name or ".modules_to_save." in name:
            added += [(name, p)] if any(f"{a}." in f"{name}." for a in active) else []
        else:
            own.append((name.replace(".base_layer.", ".").replace(".original_module.", "."), p))
    off = any(getattr(m, "disable_adapters", False) is True for m in model.modules())
    return {"base": _digest(own), "adapter": None if off else _digest(added, active)}


def _digest(parameters: Iterable[tuple[str, Tensor]], nameless: Sequence[str] = ()) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name, p in sorted(parameters, key=lambda pair: pair[0]):
        for part in nameless:  # the name under which an adapter was put in is no part of it
            name = f"{name}.".replace(f"{part}.", ".").rstrip(".")
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
