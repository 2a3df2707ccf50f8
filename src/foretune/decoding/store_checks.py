"""Checks of a reference store's tensors and fields."""

from __future__ import annotations

from torch import Tensor

from foretune.errors import UserError


def check_tensors(
    keys: Tensor, values: Tensor, model_log_probs: Tensor, sources: Tensor, *, num_rows: int
) -> None:
    """Checks that the tensors belong together.

    Args:
        keys: (N, d) states.
        values: (N,) token ids.
        model_log_probs: (N,) log-probabilities.
        sources: (N,) rows, counted from 0.
        num_rows: Number of rows; 0 if the rows are not stored.

    Raises:
        UserError: They do not; the message names what is wrong.
    """
    shapes = [tuple(tensor.shape) for tensor in (keys, values, model_log_probs, sources)]
    n = len(keys)
    if keys.ndim != 2 or n == 0 or shapes[1:] != [(n,)] * 3:
        raise UserError(f"a store needs keys (N, d) and three tensors (N,), got {shapes}")
    if any(tensor.is_floating_point() for tensor in (values, sources)):
        raise UserError("a store's values and sources are whole numbers, got fractions")
    first, last = int(sources.min()), int(sources.max())
    if first < 0 or (num_rows and last >= num_rows):
        row = first if first < 0 else last
        raise UserError(f"an entry names row {row}, counted from 0, of {num_rows}")
    if int(values.min()) < 0:
        raise UserError(f"a store's values are token ids, got {int(values.min())}")


def check_heads(heads: int, width: int) -> None:
    """Checks that a state can be cut into so many slices.

    Raises:
        UserError: It cannot.
    """
    if heads < 1 or width % heads:
        raise UserError(f"heads must divide the width of a state, {width}, got {heads}")
