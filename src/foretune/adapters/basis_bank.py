"""The adapters of new tasks as coefficients in a basis: how it is laid out in a bank."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from foretune.adapters.bank import AdapterBank
from foretune.adapters.basis import Basis
from foretune.adapters.coefficients import Coefficients
from foretune.adapters.head_copies import escaped
from foretune.adapters.layers import LoRALayer
from foretune.errors import UserError

FREE_RANK = 16  # rank of a layer's change where it has free directions, if the layer is as wide


def lora_of(basis: Basis, *, free: bool) -> dict[str, Any] | None:
    """The LoRA settings of a bank for adapters in this basis; None for a basis of heads.

    Args:
        basis: The basis.
        free: Whether there are free directions beside it.
    """
    if not basis.left:
        return None
    r = max(len(v) for v in basis.right.values())
    if free:
        r = max(r, min(FREE_RANK, max(v.shape[1] for v in basis.right.values())))
    names = "|".join(map(re.escape, basis.left))  # a list would match ends of names
    return {"r": r, "lora_alpha": r, "target_modules": names}


@torch.no_grad()
def coefficients_in(
    basis: Basis, bank: AdapterBank, *, rank: int | None = None, free: float = 0.0
) -> Coefficients:
    """Coefficients for every slot of a bank of the basis' layers and heads.

    A of each layer is set to V, and beside it to random orthonormal rows where there are free
    directions, and is not trained. The free directions of a layer are all entries of B.

    Args:
        basis: The basis.
        bank: A bank with the settings of `lora_of`. A parameter of its heads that has no mean in
            the basis is free, and starts as it is.
        rank: Number of directions; None for all. The others add to the spread of the free ones.
        free: Prior standard deviation of the free directions, in units of the spread outside the
            span; 0 for none.

    Raises:
        UserError: The bank has a head that the basis does not describe.
    """
    rank = basis.rank if rank is None else min(rank, basis.rank)
    mean, directions, scales = {}, {}, {}
    for layer, left in basis.left.items():
        stacked = bank.layers[escaped(layer)]
        assert isinstance(stacked, LoRALayer)
        r = stacked.a.shape[1]
        stacked.a.copy_(_rows_of_a(basis.right[layer], r, fill=free > 0).view_as(stacked.a[0]))
        stacked.a.requires_grad_(False)
        name = f"layers.{escaped(layer)}.b"
        cores = torch.cat([basis.mean[layer][None], basis.directions[layer]])
        b = torch.zeros(len(cores), r, len(left))
        b[:, : cores.shape[2]] = (left @ cores).mT
        b = b.mT.contiguous() if stacked.is_conv else b
        mean[name], directions[name] = b[0], b[1 : 1 + rank]
        scales[name] = free * _spread(basis, layer, rank) / (r * len(left)) ** 0.5
    for head in bank.head_names:
        for parameter in bank.head_state(head, 0):
            part = f"{head}.{parameter}"
            name = f"heads.{escaped(head)}.stacked.{escaped(parameter)}"
            if part in basis.mean:
                mean[name] = basis.mean[part]
                directions[name] = basis.directions[part][:rank]
                scales[name] = free * _spread(basis, part, rank)
            elif part in basis.spread:
                scales[name] = basis.spread[part]
            else:
                raise UserError(
                    f"these tasks need a {head} each, which the basis does not describe: use "
                    "method lora or head"
                )
    return Coefficients(bank, mean, directions, scales={n: s for n, s in scales.items() if s > 0})


def _rows_of_a(right: Tensor, r: int, *, fill: bool) -> Tensor:
    """(r, in) A: V, then random rows that are orthonormal to it, or zeros."""
    a = torch.zeros(r, right.shape[1])
    a[: len(right)] = right
    num_filled = min(r, right.shape[1]) - len(right)
    if fill and num_filled > 0:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(num_filled, right.shape[1], generator=generator)
        basis = torch.linalg.qr(torch.cat([right, drawn]).double().T).Q.T
        a[len(right) : len(right) + num_filled] = basis[len(right) :].float()
    return a


def _spread(basis: Basis, part: str, rank: int) -> float:
    """The spread of a part outside the first directions."""
    left_out = basis.directions[part][rank:].flatten(1).square()
    total = left_out.sum() if part in basis.left else left_out.mean(1).sum()
    return float(basis.spread[part] ** 2 + total) ** 0.5
