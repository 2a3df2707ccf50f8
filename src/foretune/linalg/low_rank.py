"""Low-rank factors of a weight's change: of a full matrix, and of a product B A without forming it.

Both return (U, s, Vᵀ) of shapes (out, k), (k,), (k, in) in float32, singular values falling.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def nuclear_gradient(matrix: Tensor) -> Tensor:
    """U Vᵀ of the matrix's thin SVD, singular values of zero left out.

    It is a subgradient of the nuclear norm, the one of smallest norm (Watson, "Characterization of
    the subdifferential of some matrix norms", 1992). The eigenvectors of the smaller Gram matrix
    are enough, which takes a fraction of an SVD's time: U Vᵀ = (A Aᵀ)^(-1/2) A.

    Args:
        matrix: (out, in), any floating type.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return nuclear_gradient(matrix.T).T
    a = matrix.double()  # the Gram matrix squares the singular values
    squares, u = torch.linalg.eigh(a @ a.T)
    some = squares > squares.max().clamp_min(0) * 1e-13
    u = u[:, some]
    return ((u / squares[some].sqrt()) @ (u.T @ a)).to(matrix.dtype)


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


def leading_directions(groups: Sequence[Tensor], rank: int, ridge: float) -> Tensor:
    """For each group of rows the directions in which it has more energy than the groups together.

    With M_i = X_iᵀ X_i / n_i and their mean P: the leading generalised eigenvectors of
    M_i v = λ P v, scaled so that the mean energy along each is 1. All is done within the span of
    the rows, beyond which every group has the same (λ = 1).

    Args:
        groups: One (n_i, in) a group, about the mean of all.
        rank: How many directions; fewer where the rows span fewer, the others zero.
        ridge: Share of the mean energy of a direction that is added to M_i and P in each, so that
            directions hardly seen do not decide.

    Returns:
        (groups, rank, in) in float32.
    """
    _, s, basis = torch.linalg.svd(torch.cat(list(groups)).float(), full_matrices=False)
    basis = basis[s > 1e-6 * s.max()].double()
    within = [rows.double() @ basis.T for rows in groups]
    moments = torch.stack([z.T @ z / len(z) for z in within])
    pooled = moments.mean(0)
    floor = ridge * pooled.trace() / groups[0].shape[1] * torch.eye(len(basis)).to(pooled)
    lower = torch.linalg.cholesky(pooled + floor)
    white = torch.linalg.solve_triangular(lower, moments + floor, upper=False)
    white = torch.linalg.solve_triangular(lower, white.mT, upper=False)
    vectors = torch.linalg.eigh(white).eigenvectors[..., -rank:].flip(-1)
    found = torch.linalg.solve_triangular(lower.T, vectors, upper=True).mT @ basis
    made = torch.zeros(len(groups), rank, basis.shape[1])
    made[:, : found.shape[1]] = found.float()
    return made
