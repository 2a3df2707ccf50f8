"""Fingerprints of a base's weights: they distinguish retrained bases of one architecture.

`fingerprint` is exact: it depends on the dtype that the weights are held in. An adapter records
`base_record` instead, by which the same base is recognised in another dtype:

    base         digests of names, shapes and values: float32, rounded to bfloat16 and to float16
    dtypes       the floating dtypes that the base was held in
    without      modules that are not digested: those of which the adapter has a full copy
    model_class  the base's class

The digest in float32 decides, so a checkpoint in bfloat16 is the same base whether it is loaded as
bfloat16 or as float32. A base in float32 that is loaded in half precision has other values, but is
still meant: where base or model is held in half precision, the values rounded to it decide. Of a
base that was quantised when it was loaded, the weights of the original are digested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import UserError
from foretune.models.digests import digest, identity, text_tower
from foretune.models.quantised import original_parameters, scales

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprint(model: nn.Module, leave_out: Sequence[str] = (), *, buffers: bool = False) -> str:
    """A digest of names, shapes, types and values of the parameters.

    Args:
        model: The base.
        leave_out: Names of modules that an adapter replaces by its own copies (heads).
        buffers: Whether buffers count too, such as the statistics of batch norms.

    Returns:
        40 hexadecimal digits; equal for equal weights, whatever device they are on.
    """
    tensors = (*model.named_parameters(), *scales(model))
    tensors = (*tensors, *(model.named_buffers() if buffers else ()))
    return digest(_without(tensors, leave_out), frozen=text_tower(model))


def base_record(model: nn.Module, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """What an adapter records of its base; see the head of this file.

    Args:
        model: The base.
        leave_out: Names of modules that the adapter replaces by its own copies (heads).
    """
    return {
        "base": dict(zip(PRECISIONS, _digests(model, leave_out), strict=True)),
        "dtypes": sorted(_dtypes(model)),
        "without": list(leave_out),
        "model_class": type(model).__name__,
    }


def is_base(model: nn.Module, record: Mapping[str, Any]) -> bool:
    """Whether a model is the base of which an adapter has this `base_record`.

    Records of the first version hold an exact fingerprint as `base`. It counts if the model has it
    in any precision.
    """
    digests = record["base"]
    if isinstance(digests, str):
        parameters = list(_without(original_parameters(model), record["without"]))
        precisions = (None, *PRECISIONS.values())
        return any(digest(parameters, dtype=dtype) == digests for dtype in precisions)
    held = ["float32", *_dtypes(model).union(record["dtypes"]).intersection(PRECISIONS)]
    actual = _digests(model, record["without"], held)
    return any(value == digests.get(name) for name, value in zip(held, actual, strict=True))


def keep_digests(model: nn.Module) -> None:
    """From now on the digests of a model are computed once: nothing may write to its weights."""
    model.foretune_unchanged = True  # type: ignore[assignment]


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
    return {"base": digest(base), "adapter": None if disabled else digest(adapter, active)}


def _digests(
    model: nn.Module, leave_out: Sequence[str], precisions: Sequence[str] = tuple(PRECISIONS)
) -> list[str]:
    """The digests of the parameters in these precisions.

    Those of a quantised base are cached, because the original must be loaded for them, and those of
    a model after `keep_digests`.
    """
    cache: dict[tuple[str, ...], str] = {}
    if hasattr(model, "foretune_original") or getattr(model, "foretune_unchanged", False):
        state = [identity(p) for p in model.parameters()]
        cached_state, cached = vars(model).get("foretune_digests", (None, {}))
        cache = cached if cached_state == state else {}
        model.foretune_digests = state, cache  # type: ignore[assignment]
    keys = [(precision, *leave_out) for precision in precisions]
    if not cache.keys() >= {*keys}:
        parameters = list(_without(original_parameters(model), leave_out))
        for key in keys:
            dtype = PRECISIONS[key[0]]
            cache[key] = digest(parameters, dtype=dtype, frozen=text_tower(model))
    return [cache[key] for key in keys]


def _without(
    tensors: Iterable[tuple[str, Tensor]], leave_out: Sequence[str]
) -> Iterable[tuple[str, Tensor]]:
    return (
        (name, tensor)
        for name, tensor in tensors
        if not any(name == m or name.startswith(f"{m}.") for m in leave_out)
    )


def _dtypes(model: nn.Module) -> set[str]:
    """Names of the floating dtypes of a model's parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return {str(dtype).removeprefix("torch.") for dtype in dtypes}
