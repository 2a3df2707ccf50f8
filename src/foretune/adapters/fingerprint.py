"""A fingerprint of a base's weights: distinguishes retrained bases of one architecture."""

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
        leave_out: Names of modules that an adapter replaces by its own copies (heads).
        buffers: Whether buffers count too, such as the statistics of batch norms.

    Returns:
        40 hexadecimal digits; equal for equal weights, whatever device they are on.
    """
    tensors = (*model.named_parameters(), *(model.named_buffers() if buffers else ()))
    return _digest(
        (name, p)
        for name, p in tensors
        if not any(name == m or name.startswith(f"{m}.") for m in leave_out)
    )


def base_and_adapter(model: Any) -> dict[str, str | None]:
    """The fingerprints of a model's base and of its active adapter.

    Args:
        model: A model, or a `PeftModel`, whose base has the same fingerprint as without adapters.

    Returns:
        `base`, and `adapter`: None where there is none, or where it is disabled.

    Raises:
        UserError: A `PeftModel` whose adapter is a prompt.
    """
    if not hasattr(model, "peft_config"):
        return {"base": fingerprint(model), "adapter": None}
    if model.active_peft_config.is_prompt_learning:
        raise UserError("prompt adapters are not supported: they change the token positions")
    active = [f".{name}" for name in model.active_adapters]
    base, adapter = [], []
    for name, p in model.get_base_model().named_parameters():
        if f".{model.base_model.prefix}" in name or ".modules_to_save." in name:
            adapter += [(name, p)] if any(f"{a}." in f"{name}." for a in active) else []
        else:
            base.append((name.replace(".base_layer.", ".").replace(".original_module.", "."), p))
    disabled = any(getattr(m, "disable_adapters", False) is True for m in model.modules())
    return {"base": _digest(base), "adapter": None if disabled else _digest(adapter, active)}


def _digest(parameters: Iterable[tuple[str, Tensor]], removed: Sequence[str] = ()) -> str:
    """The digest of named tensors; parts of names in `removed` do not count."""
    digest = hashlib.blake2b(digest_size=20)
    for name, p in sorted(parameters, key=lambda pair: pair[0]):
        for part in removed:  # an adapter is the same under any name
            name = f"{name}.".replace(f"{part}.", ".").rstrip(".")
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
