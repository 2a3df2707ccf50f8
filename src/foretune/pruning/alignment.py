"""Bringing the hidden units of two networks of one shape into the same order, and averaging.

A hidden layer's units can be permuted without changing what the network computes, so two networks
that do the same may differ in every weight. Before their weights are averaged the units of one are
matched to those of the other (Ainsworth et al., "Git Re-Basin", ICLR 2023, arXiv:2209.04836).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def match_units(reference: Tensor, other: Tensor) -> Tensor:
    """The order of `other`'s units that is nearest to `reference`.

    Maximises Σ_i ⟨reference_i, other_π(i)⟩ over permutations π, which minimises the sum of squared
    distances, by the Hungarian method.

    Args:
        reference: (I, F), all weights of each hidden unit.
        other: (I, F).

    Returns:
        (I,) π, so that `other[π]` stands beside `reference`.
    """
    gain = (reference.double() @ other.double().T).cpu().numpy()
    _, order = linear_sum_assignment(gain, maximize=True)
    return torch.as_tensor(order, device=other.device)


def merged(
    units: Tensor, rest: Tensor, weights: Sequence[float], reference: int, *, align: bool
) -> tuple[Tensor, Tensor]:
    """The weighted mean of n networks of one hidden layer.

    Args:
        units: (n, I, F), all weights of each hidden unit: rows of the layers in, columns of the
            layer out, biases.
        rest: (n, R), what belongs to no unit (the last bias), possibly R = 0.
        weights: Of the n, their sum 1.
        reference: Which of them keeps its order of units.
        align: Match the units of the others to the reference's first.

    Returns:
        ((I, F), (R,)) in the dtype that was given; one network alone comes back bit for bit.
    """
    if len(units) == 1:
        return units[0], rest[0]
    ordered = [
        one if not align or i == reference else one[match_units(units[reference], one)]
        for i, one in enumerate(units)
    ]
    share = torch.tensor(weights, dtype=torch.float64, device=units.device)
    mean = torch.einsum("n,nif->if", share, torch.stack(ordered).double())
    return mean.to(units.dtype), torch.einsum("n,nr->r", share, rest.double()).to(rest.dtype)
