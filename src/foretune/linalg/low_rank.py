"""Low-rank factors of a weight's change: of a full matrix, and of a product B A without forming it.

Both return (U, s, Vᵀ) of shapes (out, k), (k,), (k, in) in float32, singular values falling.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]


def truncated_svd(matrix: Tensor, rank: int | None) -> Factors:
    """The leading singular triplets of a matrix.

    Args:
        matrix: (out, in), any floating type.
        rank: How many; None for all min(out, in), and never more than that.
    """
    # LAPACK has no half precision.
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    keep = len(s) if rank is None else min(rank, len(s))
    # Copies, or the small views would keep the full factors in memory.
    return u[:, :keep].clone(), s[:keep].clone(), vh[:keep].clone()


def svd_of_product(b: Tensor, a: Tensor, rank: int | None = None) -> Factors:
    """The singular triplets of B A, exactly, from two thin QRs and an r × r core.

    With B = Q_b R_b and Aᵀ = Q_a R_a the product is Q_b (R_b R_aᵀ) Q_aᵀ, and the two Qs have
    orthonormal columns, so that only the core needs a decomposition: O((out + in) r²).

    Args:
        b: (out, r).
        a: (r, in).
        rank: How many triplets; None for all r.
    """
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().T)
    u, s, vh = truncated_svd(r_b @ r_a.T, rank)
    return q_b @ u, s, vh @ q_a.T


def leading_directions(moment: Tensor, pooled: Tensor, rank: int, ridge: float) -> Tensor:
    """Directions in which one task's inputs have the most energy relative to all tasks' inputs.

    The leading generalised eigenvectors of moment · v = λ · pooled · v, scaled so that the energy
    of the pool along each is 1; λ is then the share of it that the task has.

    Args:
        moment: (in, in), mean of x xᵀ over the task's inputs, about the pool's mean.
        pooled: (in, in), the mean of all tasks' `moment`.
        rank: How many directions.
        ridge: Share of the pool's mean energy that is added to every direction of both, so that
            directions hardly seen do not decide.

    Returns:
        (rank, in).
    """
    size = len(pooled)
    floor = ridge * pooled.diagonal().mean().double() * torch.eye(size, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(pooled.double() + floor)
    whiten = vectors / values.clamp_min(1e-30).sqrt()  # whitenᵀ (pooled + floor) whiten = 1
    _, found = torch.linalg.eigh(whiten.T @ (moment.double() + floor) @ whiten)
    return (whiten @ found[:, -rank:].flip(-1)).T.float()
