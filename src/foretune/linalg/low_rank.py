"""Low-rank factors of a weight update: of a full matrix, and of a product B A without forming it.

All SVDs return (U, s, Vᵀ) of shapes (out, k), (k,), (k, in) in float32, singular values
descending.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]
LARGE, SHARE = 1024, 8  # from this size on, if at most 1 in SHARE triplets is wanted: randomised


def truncated_svd(matrix: Tensor, rank: int | None) -> Factors:
    """The leading singular triplets of a matrix.

    They are exact, or of a large matrix, of which a small share is wanted, those of
    `randomised_svd`.

    Args:
        matrix: (out, in), any floating type.
        rank: Number of triplets, at most min(out, in); None for all.
    """
    size = min(matrix.shape)
    if rank is not None and size >= LARGE and rank * SHARE <= size:
        return randomised_svd(matrix, rank)
    # LAPACK has no half precision.
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    keep = len(s) if rank is None else min(rank, len(s))
    # Copies, or the small views would keep the full factors in memory.
    return u[:, :keep].clone(), s[:keep].clone(), vh[:keep].clone()


def randomised_svd(matrix: Tensor, rank: int, iterations: int = 4, seed: int = 0) -> Factors:
    """The leading singular triplets of a matrix, from a random sketch of its columns' span.

    Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011,
    arXiv:0909.4061, Algorithms 4.4 and 5.1, with twice as many random columns as triplets. The
    singular values are at most the true ones, and with the spectrum of a change by fine-tuning
    equal to them up to rounding; of random noise, whose spectrum is flat, they hold some per cent
    less energy (docs/results/smile.md).

    Args:
        matrix: (out, in), any floating type.
        rank: Number of triplets.
        iterations: Power iterations; each multiplies the ratio of singular values by itself.
        seed: Seed of the random columns, drawn on the CPU.
    """
    a = matrix.float()
    columns = min(*a.shape, rank + max(rank, 16))
    random = torch.randn(a.shape[1], columns, generator=torch.Generator().manual_seed(seed))
    q = torch.linalg.qr(a @ random.to(a.device)).Q
    for _ in range(iterations):
        q = torch.linalg.qr(a @ torch.linalg.qr(a.T @ q).Q).Q
    u, s, vh = torch.linalg.svd(q.T @ a, full_matrices=False)
    return (q @ u)[:, :rank].clone(), s[:rank].clone(), vh[:rank].clone()


def nuclear_gradient(matrix: Tensor) -> Tensor:
    """(out, in) U Vᵀ of the matrix's thin SVD, without zero singular values.

    It is the subgradient of the nuclear norm that has the smallest norm (Watson, "Characterization
    of the subdifferential of some matrix norms", 1992). The eigenvectors of the smaller Gram matrix
    suffice, at a fraction of the cost of an SVD: U Vᵀ = (A Aᵀ)^(-1/2) A.

    Args:
        matrix: (out, in), any floating type.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return nuclear_gradient(matrix.T).T
    a = matrix.double()  # the Gram matrix squares the singular values
    squares, u = torch.linalg.eigh(a @ a.T)
    nonzero = squares > squares.max().clamp_min(0) * 1e-13
    u = u[:, nonzero]
    return ((u / squares[nonzero].sqrt()) @ (u.T @ a)).to(matrix.dtype)


def svd_of_product(b: Tensor, a: Tensor, rank: int | None = None) -> Factors:
    """The singular triplets of B A, exactly, from two thin QRs and an r × r core.

    With B = Q_b R_b and Aᵀ = Q_a R_a the product is Q_b (R_b R_aᵀ) Q_aᵀ, and the two Qs have
    orthonormal columns, so only the core needs an SVD: O((out + in) r²).

    Args:
        b: (out, r).
        a: (r, in).
        rank: Number of triplets; None for all r.
    """
    q_b, r_b = torch.linalg.qr(b.float())
    q_a, r_a = torch.linalg.qr(a.float().T)
    u, s, vh = truncated_svd(r_b @ r_a.T, rank)
    return q_b @ u, s, vh @ q_a.T


def leading_directions(groups: Sequence[Tensor], rank: int, ridge: float) -> Tensor:
    """For each group of vectors, the directions in which it has more energy than the mean group.

    With M_i = X_iᵀ X_i / n_i and their mean P: the leading generalised eigenvectors of
    M_i v = λ P v, scaled so that the mean energy along each is 1. They are computed within the
    span of the vectors, outside which all groups agree (λ = 1).

    Args:
        groups: (n_i, in) per group, centred on the mean of all groups.
        rank: Number of directions; where the vectors span fewer, the rest are zero.
        ridge: Added to M_i and P along every direction, as a share of the mean energy of a
            direction, so that directions with little energy do not dominate.

    Returns:
        (groups, rank, in) in float32.
    """
    basis = _row_space(torch.cat(list(groups)).double())
    within = [rows.double() @ basis.T for rows in groups]
    moments = torch.stack([z.T @ z / len(z) for z in within])
    pooled = moments.mean(0)
    floor = ridge * pooled.trace() / groups[0].shape[1] * torch.eye(len(basis)).to(pooled)
    lower = torch.linalg.cholesky(pooled + floor)
    white = torch.linalg.solve_triangular(lower, moments + floor, upper=False)
    white = torch.linalg.solve_triangular(lower, white.mT, upper=False)
    vectors = torch.linalg.eigh(white).eigenvectors[..., -rank:].flip(-1)
    directions = torch.linalg.solve_triangular(lower.T, vectors, upper=True).mT @ basis
    padded = torch.zeros(len(groups), rank, basis.shape[1])
    padded[:, : directions.shape[1]] = directions.float()
    return padded


def _row_space(rows: Tensor) -> Tensor:
    """An orthonormal basis (r, in) of the span of (n, in) rows, in float64."""
    if len(rows) <= rows.shape[1]:
        _, s, basis = torch.linalg.svd(rows, full_matrices=False)
        return basis[s > 1e-6 * s.max()]
    # Their Gram matrix suffices, at a fraction of the cost; it squares the singular values.
    squares, vectors = torch.linalg.eigh(rows.T @ rows)
    return vectors[:, squares > 1e-12 * squares.max()].T
