"""Tucker-2: a layer's weight as a small core and two orthonormal bases, one per channel mode.

    W ≈ T ×₁ V₁ ×₂ V₂          T = W ×₁ V₁ᵀ ×₂ V₂ᵀ

    symbol   here         shape                  meaning
    W        weight       (out, in, *kernel)     a layer's weight; a matrix has no kernel
    T        core         (r_out, r_in, *kernel)
    V₁ V₂    factors      (out, r_out) (in, r_in)   None where a mode is not factored

HOSVD takes each basis from the SVD of one unfolding of W (De Lathauwer, De Moor, Vandewalle, "A
multilinear singular value decomposition", SIAM J. Matrix Anal. Appl. 2000). HOOI starts from HOSVD
and updates one basis at a time, which never increases the error (the same authors, "On the best
rank-1 and rank-(R1, …, RN) approximation of higher-order tensors", same year).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = list[Tensor | None]


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The mode-`mode` unfolding, of shape (size of the mode, product of the other sizes)."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """The mode product, tensor ×_mode matrix.

    Args:
        tensor: A tensor whose mode has size k.
        matrix: (m, k); the mode has size m afterwards.
        mode: The mode.
    """
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


def compose(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """The weight T ×₁ V₁ ×₂ V₂, of shape (out, in, *kernel); see the legend for the arguments."""
    for mode, factor in enumerate(factors):
        core = core if factor is None else mode_product(core, factor, mode)
    return core


def project(weight: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """W ×₁ V₁ᵀ ×₂ V₂ᵀ of shape (r_out, r_in, *kernel): the best core for orthonormal bases."""
    return compose(weight, [None if factor is None else factor.T for factor in factors])


def hosvd(weight: Tensor, ranks: Sequence[int | None]) -> Factors:
    """Truncated HOSVD: the leading left singular vectors of each channel mode's unfolding.

    Args:
        weight: (out, in, *kernel).
        ranks: (r_out, r_in); None for a mode that is not factored.

    Returns:
        [V₁, V₂].
    """
    return [
        None if rank is None else _leading(unfold(weight, mode), rank)
        for mode, rank in enumerate(feasible_ranks(weight, ranks))
    ]


def hooi(
    weight: Tensor, ranks: Sequence[int | None], *, sweeps: int = 20, tolerance: float = 1e-6
) -> tuple[Tensor, Factors, list[float]]:
    """Tucker-2 decomposition by higher-order orthogonal iteration, started from HOSVD.

    Args:
        weight: (out, in, *kernel), any floating-point type; computed in float64.
        ranks: (r_out, r_in); None for a mode that is not factored. Ranks are clipped as in
            `feasible_ranks`.
        sweeps: Maximum number of sweeps; one sweep updates each basis once.
        tolerance: Stops when a sweep lowers the relative error by less than this.

    Returns:
        (core, [V₁, V₂], errors): the tensors in the weight's dtype, and the relative errors
        ‖W − Ŵ‖ / ‖W‖ of HOSVD and after each sweep.
    """
    exact = weight.detach().double()
    ranks = feasible_ranks(exact, ranks)
    factors = hosvd(exact, ranks)
    errors = [relative_error(exact, factors)]
    for _ in range(sweeps):
        for mode, rank in enumerate(ranks):
            if rank is not None:
                fixed = [None if i == mode else factor for i, factor in enumerate(factors)]
                factors[mode] = _leading(unfold(project(exact, fixed), mode), rank)
        errors.append(relative_error(exact, factors))
        if errors[-2] - errors[-1] < tolerance:
            break
    core = project(exact, factors).to(weight)
    return core, [None if f is None else f.to(weight) for f in factors], errors


def relative_error(weight: Tensor, factors: Sequence[Tensor | None]) -> float:
    """‖W − Ŵ‖ / ‖W‖ with the best core for orthonormal bases.

    Args:
        weight: (out, in, *kernel).
        factors: [V₁, V₂]; None for a mode that is not factored.

    Returns:
        The relative error; 0 if the weight is zero.
    """
    norm = float(weight.norm())
    residual = weight - compose(project(weight, factors), factors)
    return float(residual.norm()) / norm if norm else 0.0


def ranks_of_energy(weight: Tensor, energy: float) -> list[int]:
    """The smallest rank per channel mode that keeps a share of ‖W‖² in the mode's unfolding.

    Args:
        weight: (out, in, *kernel).
        energy: The share to keep, above 0 and at most 1.

    Returns:
        [r_out, r_in].
    """
    ranks = []
    for mode in (0, 1):
        squares = torch.linalg.svdvals(unfold(weight.detach().double(), mode)).square()
        captured = squares.cumsum(0) / squares.sum()
        ranks.append(min(int((captured < energy - 1e-12).sum()) + 1, weight.shape[mode]))
    return ranks


def feasible_ranks(weight: Tensor, ranks: Sequence[int | None]) -> list[int | None]:
    """The ranks clipped to what the shape allows.

    A rank exceeds neither the size of its mode nor the product of the other mode's rank and the
    kernel's size: the two sides of the unfolding.

    Args:
        weight: (out, in, *kernel).
        ranks: (r_out, r_in); None for a mode that is not factored.
    """
    clipped = list(ranks)
    for mode, rank in enumerate(ranks):
        if rank is not None:
            opposite = 1 - mode
            size = weight.shape[opposite]
            num_columns = weight[0, 0].numel() * min(clipped[opposite] or size, size)
            clipped[mode] = min(rank, weight.shape[mode], num_columns)
    return clipped


def _leading(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank].contiguous()
