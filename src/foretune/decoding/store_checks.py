"""Checks of a reference store's tensors and fields, and of the model that queries it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foretune.adapters.fingerprint import base_and_adapter
from foretune.decoding.side_models import bare_model
from foretune.errors import UserError


def check_tensors(
    keys: Tensor,
    values: Tensor,
    model_log_probs: Tensor | None,
    sources: Tensor,
    scored: Tensor | None,
    *,
    num_rows: int,
    num_labels: int,
) -> None:
    """Checks that the tensors belong together.

    Args:
        keys: (N, d) states.
        values: (N,) token ids, or indices of labels.
        model_log_probs: (N,) log-probabilities, or (S, C) of C labels; None for none.
        sources: (N,) rows, counted from 0.
        scored: (S,) the entries that log-probabilities of labels belong to; None for none.
        num_rows: Number of rows; 0 if the rows are not stored.
        num_labels: C; 0 without labels.

    Raises:
        UserError: They do not; the message names what is wrong.
    """
    n = len(keys)
    log_p_shape = None if model_log_probs is None else tuple(model_log_probs.shape)
    counted = None if scored is None else tuple(scored.shape)
    shapes = [tuple(keys.shape), tuple(values.shape), log_p_shape, tuple(sources.shape), counted]
    if num_labels:
        fits = log_p_shape is None if counted is None else log_p_shape == (*counted, num_labels)
    else:
        fits = log_p_shape == (n,) and counted is None
    if keys.ndim != 2 or n == 0 or {shapes[1], shapes[3]} != {(n,)} or not fits:
        raise UserError(f"a store needs keys (N, d) and values of them (N,), got {shapes}")
    if any(t is not None and t.is_floating_point() for t in (values, sources, scored)):
        raise UserError("a store's values and sources are whole numbers, got fractions")
    first, last = int(sources.min()), int(sources.max())
    if first < 0 or (num_rows and last >= num_rows):
        row = first if first < 0 else last
        raise UserError(f"an entry names row {row}, counted from 0, of {num_rows}")
    if int(values.min()) < 0:
        raise UserError(f"a store's values are token ids, got {int(values.min())}")
    if num_labels and int(values.max()) >= num_labels:
        raise UserError(f"an entry names label {int(values.max())}, from 0, of {num_labels}")
    if scored is not None and not 0 <= int(scored.min()) <= int(scored.max()) < n:
        raise UserError(f"log-probabilities are of entry {int(scored.max())}, from 0, of {n}")


def check_store_model(
    model: Any, recorded: Mapping[str, Any] | None, largest_token: int | None
) -> None:
    """Checks that a store was built with a model.

    Args:
        model: The model that is to query it.
        recorded: Fingerprints of the base and its adapter; None if they were not recorded.
        largest_token: The largest token id in the store; None if it has none.

    Raises:
        UserError: The fingerprint of the base or of the adapter differs, or the store names a
            token that the model does not have.
    """
    vocabulary = getattr(getattr(bare_model(model), "config", None), "vocab_size", None)
    if isinstance(vocabulary, int) and largest_token is not None and largest_token >= vocabulary:
        raise UserError(
            f"the store names token {largest_token} of a model with {vocabulary} tokens; rebuild it"
        )
    if recorded is None:
        return
    actual = base_and_adapter(model)
    if actual["base"] != recorded["base"]:
        raise UserError(
            f"the store was built with another base (fingerprint {str(recorded['base'])[:12]}"
            f", this model has {str(actual['base'])[:12]}); rebuild it with this model"
        )
    if actual["adapter"] != recorded["adapter"]:
        expected, present = (
            "no adapter" if digest is None else f"an adapter (fingerprint {digest[:12]})"
            for digest in (recorded["adapter"], actual["adapter"])
        )
        raise UserError(
            f"the store was built with {expected}, this model has {present}; rebuild it, or "
            "load the model as it was"
        )


def check_heads(heads: int, width: int) -> None:
    """Checks that a state can be cut into so many slices.

    Raises:
        UserError: It cannot.
    """
    if heads < 1 or width % heads:
        raise UserError(f"heads must divide the width of a state, {width}, got {heads}")
