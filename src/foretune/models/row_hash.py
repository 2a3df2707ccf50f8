"""Random bits that are a hash of a key and of coordinates, the same on every device.

symbol   here       is
k        keys       (n,) one key per row
c        cells      hash of k and all coordinates of an element but the last
x        columns    hash of the last coordinate
u                   (c | 1) · x + hash(c), modulo 2⁶⁴: pairwise independent along the last
                    dimension, and cheaper than a full hash of every element
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

# The odd constants of splitmix64, as signed integers.
STEP, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def wrapped(value: int) -> int:
    """An integer modulo 2⁶⁴, as torch's int64 represents it.

    >>> wrapped(2**64 - 1), wrapped(5)
    (-1, 5)
    """
    return (value + 2**63) % 2**64 - 2**63


def mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, a bijection of int64, for each element of any shape."""
    x = (x ^ (x >> 30 & 2**34 - 1)) * FIRST
    x = (x ^ (x >> 27 & 2**37 - 1)) * SECOND
    return x ^ (x >> 31 & 2**33 - 1)


def placed(keys: Tensor, places: Tensor, axis: int) -> Tensor:
    """Hash of keys and of places along an axis, of a common shape; place 0 leaves a key alone.

    Axes are counted from the last. So an axis of size 1 makes no difference, as where tokens are
    run together with rows.
    """
    return torch.where(places == 0, keys, mixed(keys + places * STEP + wrapped(axis * SECOND)))


def cells(keys: Tensor, sizes: Sequence[int]) -> Tensor:
    """(n, *sizes) hash of a row's key (n,) and of a position in the row."""
    for i, size in enumerate(sizes):
        keys = placed(keys[..., None], torch.arange(size, device=keys.device), len(sizes) - i)
    return keys


def hashed_bits(
    keys: Tensor, sizes: Sequence[int], draw: int, places: Tensor | None = None
) -> Tensor:
    """(n, *sizes) 64 bits for each element of rows with these keys (n,).

    Args:
        keys: Key of each row; of each token's row where padding has been removed.
        sizes: Sizes of the dimensions after the rows, or after the tokens.
        draw: Number of the draw.
        places: (n,) place of each token in its row; None for rows. A token has the bits that it has
            in its padded row.
    """
    cell = mixed(keys + wrapped(draw * STEP))
    if places is not None:
        cell = placed(cell, places, len(sizes))
    if not sizes:
        return cell
    cell = cells(cell, sizes[:-1])
    columns = mixed(torch.arange(sizes[-1], device=keys.device) * STEP + draw)
    return ((cell | 1)[..., None] * columns).add_(mixed(cell + STEP)[..., None])


def content_hash(
    tensors: Iterable[Tensor], mask: Tensor | None, padding: Collection[int]
) -> Tensor:
    """(n,) hash of the content of rows, which their padding does not change.

    Args:
        tensors: (n, …) each.
        mask: (n, L), zero at padding; None where the rows have none.
        padding: Integers that are padding wherever they stand. Zeros always are.
    """
    total: Tensor | int = 0
    for i, x in enumerate(tensors):
        if x.is_floating_point():
            values = x.detach().float().contiguous().view(torch.int32).long()
        else:
            values = x.detach().long()
            for value in padding:
                values = values.masked_fill(values == value, 0)
        if mask is not None and x.shape[:2] == mask.shape:
            inside = (mask > 0).view(*mask.shape, *[1] * (x.dim() - 2))
            values = values * inside
        weights = cells(torch.tensor([wrapped((i + 1) * FIRST)], device=x.device), x.shape[1:]) | 1
        total = total + (values * weights).reshape(len(x), -1).sum(1)
    assert isinstance(total, Tensor), "no tensors"
    return mixed(total)
