"""Leading subspaces and principal directions, from the smaller Gram matrix."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

SMALLEST = 1e-12  # eigenvalues below this share of the largest count as zero


def leading_rows(matrix: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors with singular values above zero.

    Args:
        matrix: (n, d).
        rank: Number of vectors at most.

    Returns:
        (k, d) float64, orthonormal rows, k at most min(rank, n, d).
    """
    return _leading(matrix.double(), rank)[0]


def principal_directions(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and principal directions of a sample.

    Args:
        rows: (n, d), one observation per row.
        rank: Number of directions at most.

    Returns:
        The mean (d,), orthonormal directions (k, d), and the standard deviations (k,) along them,
        all above zero and descending; float64, k at most n − 1.
    """
    rows = rows.double()
    mean = rows.mean(0)
    directions, singular = _leading(rows - mean, min(rank, len(rows) - 1))
    return mean, directions, singular / max(1, len(rows) - 1) ** 0.5


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(k, d) right singular vectors and (k,) singular values of (n, d), descending; on the CPU."""
    wide = matrix.shape[0] < matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    size = len(gram)
    if not min(rank, size):
        return matrix[:0], matrix.new_zeros(0)
    # LAPACK's expert driver: the leading eigenvectors alone take a third of the time of all.
    pairs = scipy.linalg.eigh(gram.numpy(), subset_by_index=[max(0, size - rank), size - 1])
    squares, vectors = (torch.from_numpy(part).flip(-1) for part in pairs)
    vectors = vectors.T
    nonzero = squares > SMALLEST * squares[:1].clamp_min(torch.finfo(squares.dtype).tiny)
    singular, vectors = squares[nonzero].sqrt(), vectors[nonzero]
    return (vectors @ matrix / singular[:, None] if wide else vectors), singular
