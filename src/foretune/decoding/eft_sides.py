"""EFT's side models: the pairs of tuned and untuned ones, and the sum of their differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from foretune.decoding.side_models import Side
from foretune.decoding.token_distributions import UNSEEN, before_cap, is_unseen
from foretune.errors import UserError

Combine = Callable[[Tensor, list[Tensor]], Tensor]


def sides_of(
    method: Any,
    tuned: Any,
    untuned: Any,
    shared: Tensor | None = None,
    prompts: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[list[Side], Combine]:
    """The side models, tuned ones first, and the function that combines their logits.

    Args:
        method: The record of EFT.
        tuned: A fine-tuned model, or several.
        untuned: The model that they were tuned from, or one per tuned model; None if each is a
            `PeftModel`.
        shared: (ids,) bool, the ids that mean the same token to all models; None for all.
        prompts: "tuned" or "untuned" → what these side models read instead of the model's prompt.

    Returns:
        (sides, combine): `combine` takes the model's logits (…, V) and those of each side (…, V_k)
        and returns normalised log-probabilities (…, V). Its first call that meets a token which the
        untuned model never learned warns.

    Raises:
        UserError: The untuned model is missing, or the numbers of models do not match.
    """
    ups, downs = _pairs(method, listed(tuned), untuned)
    read = prompts or {}
    sides = [Side(model=up, prompt=read.get("tuned")) for up in ups]
    sides += [Side(model=down, adapter_off=off, prompt=read.get("untuned")) for down, off in downs]
    caps = [_soft_cap(side.bare) if method.uncap else None for side in sides]
    warned = False

    def combine(base: Tensor, logits: list[Tensor]) -> Tensor:
        nonlocal warned
        uncapped = [before_cap(x, cap) for x, cap in zip(logits, caps, strict=True)]
        high, low = uncapped[: len(ups)], uncapped[len(ups) :]
        if not warned and method.delta_clip is None and is_unseen(high, low):
            warned = True
            warnings.warn(
                "the tuned model prefers a token to which the untuned model gives a "
                f"probability below {UNSEEN:g}, which is unreliable: the large model may never "
                "emit it, or always; delta_clip=10 bounds the difference",
                stacklevel=2,
            )
        return method.combine(base, high, low, shared)

    return sides, combine


def listed(item: Any) -> list[Any]:
    """The models of a list, or the only one."""
    return list(item) if isinstance(item, list | tuple) else [item]


def _pairs(method: Any, ups: list[Any], untuned: Any) -> tuple[list[Any], list[tuple[Any, bool]]]:
    """(tuned models, (untuned model, whether to turn its adapter off) for all or for each).

    Raises:
        UserError: The untuned model is missing, or the numbers do not match.
    """
    downs = ups if untuned is None else listed(untuned)
    if len(downs) not in (1, len(ups)):
        raise UserError(
            f"{len(ups)} tuned models but {len(downs)} untuned: give one, or one for each"
        )
    if method.weights is not None and len(method.weights) != len(ups):
        raise UserError(f"{len(method.weights)} weights for {len(ups)} tuned models")
    if len(downs) > 1 and all(down is downs[0] for down in downs):
        downs = downs[:1]
    # A tuned PeftModel as the untuned model, or the base inside it (into which peft has
    # injected the adapter), means that model without its adapter.
    adapted = [up for up in ups if hasattr(up, "disable_adapter")]
    pairs = []
    for down in downs:
        wrappers = [up for up in adapted if down is up or down is up.get_base_model()]
        pairs.append((wrappers[0], True) if wrappers else (down, False))
    if untuned is None and not all(off for _, off in pairs):
        raise UserError(
            "untuned is missing: give the model that the tuned model was tuned from; only a "
            "PeftModel needs none"
        )
    return ups, pairs


def _soft_cap(model: Any) -> float | None:
    cap: float | None = getattr(model.config, "final_logit_softcapping", None)
    return cap
