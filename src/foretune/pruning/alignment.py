"""Aligning the hidden units of networks of one shape by permutation, and averaging the networks.

A hidden layer's units can be permuted without changing the network's function, so two networks that
compute the same may differ in every weight. Before their weights are averaged, the units of one are
matched to those of the other (Ainsworth et al., "Git Re-Basin", ICLR 2023, arXiv:2209.04836).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def match_units(reference: Tensor, units: Tensor) -> Tensor:
    """The permutation that brings `units` nearest to `reference`.

    Maximises Σ_i ⟨reference_i, units_π(i)⟩ over permutations π, which minimises the sum of squared
    distances, by the Hungarian method.

    Args:
        reference: (I, F), all weights of each hidden unit.
        units: (I, F).

    Returns:
        (I,) π, so that `units[π]` matches `reference` unit by unit.
    """
    gain = (reference.double() @ units.double().T).cpu().numpy()
    _, order = linear_sum_assignment(gain, maximize=True)
    return torch.as_tensor(order, device=units.device)


def merge_networks(
    units: Tensor, rest: Tensor, weights: Sequence[float], reference: int, *, align: bool
) -> tuple[Tensor, Tensor]:
    """The weighted mean of n networks of one hidden layer.

    Args:
        units: (n, I, F), all weights of each hidden unit: rows of the input layers, columns of the
            output layer, biases.
        rest: (n, R), parameters that belong to no unit (the output bias); R may be 0.
        weights: (n,), weights of the mean, with sum 1.
        reference: Index of the network whose order of units is kept.
        align: First match the units of the other networks to the reference's.

    Returns:
        ((I, F), (R,)) in the input's dtype; a single network comes back bit for bit.
    """
    if len(units) == 1:
        return units[0], rest[0]
    ordered = [
        network if not align or i == reference else network[match_units(units[reference], network)]
        for i, network in enumerate(units)
    ]
    share = torch.tensor(weights, dtype=torch.float64, device=units.device)
    mean = torch.einsum("n,nif->if", share, torch.stack(ordered).double())
    return mean.to(units.dtype), torch.einsum("n,nr->r", share, rest.double()).to(rest.dtype)
