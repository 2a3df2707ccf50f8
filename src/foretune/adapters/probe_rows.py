"""Rows and outputs of the calls by which it is tried whether a model keeps tasks apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foretune.models.nested import Path

SIZES = (3, 5, 7)  # numbers of rows of a probe: primes, to divide as little else as possible


def probe_sizes(num_rows: int) -> tuple[int, int]:
    """The numbers of rows of two probes.

    Not those of the batch at hand: what is prepared for that batch recognises it by its shape.

    >>> probe_sizes(8), probe_sizes(3)
    ((3, 5), (5, 7))
    """
    few, many, *_ = (n for n in SIZES if n != num_rows)
    return few, many


def probe_rows(size: int, probe: int) -> tuple[list[int], list[int]]:
    """The order of up to seven rows in one of four mixed probes, and the owner of each place.

    No two places have the same owner in each of the first three, so no row can take another's place
    unnoticed. The last has the rows in reverse, for models that sort what was sorted already.

    >>> [probe_rows(5, probe)[1] for probe in range(4)]
    [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    """
    order = list(range(size))
    if probe == 3:
        return order[::-1], probe_rows(size, 1)[1]
    return order, [(i + 1) >> probe & 1 for i in range(size)]


def difference_of(outputs: Mapping[Path, Tensor], others: Mapping[Path, Tensor]) -> float:
    """The least relative difference between two tasks' outputs (n, …)."""
    pairs = [(x.float(), others[path].float()) for path, x in outputs.items() if path in others]
    return min(
        (float((x - y).abs().max() / y.abs().max().clamp(min=1e-9)) for x, y in pairs), default=0.0
    )


def without_padding(x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """An output (n, L, …), zero at the padding of the call's rows: packed rows differ there."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or x.shape[:2] != mask.shape:
        return x
    return x.masked_fill((mask == 0).view(*mask.shape, *[1] * (x.dim() - 2)), 0)
