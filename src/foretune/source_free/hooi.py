"""Tucker-2: a layer's weight as a small core between two orthonormal bases, one a channel mode.

    W ≈ T ×₁ V₁ ×₂ V₂          T = W ×₁ V₁ᵀ ×₂ V₂ᵀ

    symbol   here         shape                  meaning
    W        weight       (out, in, *kernel)     a weight; a matrix has no kernel
    T        core         (r_out, r_in, *kernel)
    V₁ V₂    factors      (out, r_out) (in, r_in)   None where a mode is not factored

HOSVD takes each basis from its own unfolding of W (De Lathauwer, De Moor, Vandewalle, "A
multilinear singular value decomposition", SIAM J. Matrix Anal. Appl. 2000); HOOI goes on from
there, one basis at a time, and never makes the error larger (the same authors, "On the best rank-1
and rank-(R1, …, RN) approximation of higher-order tensors", same year).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = list[Tensor | None]


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """(size of the mode, all others): the tensor as a matrix whose rows are that mode."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """tensor ×_mode matrix: the mode of size `matrix.shape[1]` becomes one of `matrix.shape[0]`."""
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)


def compose(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """T ×₁ V₁ ×₂ V₂: the weight that core and bases stand for."""
    for mode, factor in enumerate(factors):
        core = core if factor is None else mode_product(core, factor, mode)
    return core


def project(weight: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """W ×₁ V₁ᵀ ×₂ V₂ᵀ: the best core for orthonormal bases."""
    return compose(weight, [None if factor is None else factor.T for factor in factors])


def hosvd(weight: Tensor, ranks: Sequence[int | None]) -> Factors:
    """The leading left singular vectors of each channel mode's unfolding.

    Args:
        weight: (out, in, *kernel).
        ranks: (r_out, r_in); None for a mode that is not factored.
    """
    return [
        None if rank is None else _leading(unfold(weight, mode), rank)
        for mode, rank in enumerate(possible(weight, ranks))
    ]


def hooi(
    weight: Tensor, ranks: Sequence[int | None], *, sweeps: int = 20, tolerance: float = 1e-6
) -> tuple[Tensor, Factors, list[float]]:
    """Tucker-2 by higher-order orthogonal iteration from HOSVD.

    Args:
        weight: (out, in, *kernel), any floating type; the work is done in float64.
        ranks: (r_out, r_in); None for a mode that is not factored. A rank beyond the size of its
            mode, or beyond the product of all other ranks and the kernel, is cut to it.
        sweeps: At most so many; one renews each basis once.
        tolerance: Stops when a sweep lowers the relative error by less.

    Returns:
        (core, [V₁, V₂], the relative error ‖W − Ŵ‖ / ‖W‖ of HOSVD and after each sweep), in the
        weight's own type.
    """
    exact = weight.detach().double()
    ranks = possible(exact, ranks)
    factors = hosvd(exact, ranks)
    errors = [relative_error(exact, factors)]
    for _ in range(sweeps):
        for mode, rank in enumerate(ranks):
            if rank is not None:
                others = [None if other == mode else f for other, f in enumerate(factors)]
                factors[mode] = _leading(unfold(project(exact, others), mode), rank)
        errors.append(relative_error(exact, factors))
        if errors[-2] - errors[-1] < tolerance:
            break
    core = project(exact, factors).to(weight)
    return core, [None if f is None else f.to(weight) for f in factors], errors


def relative_error(weight: Tensor, factors: Sequence[Tensor | None]) -> float:
    """‖W − Ŵ‖ / ‖W‖ with the best core for these orthonormal bases; 0 for a weight of zeros."""
    norm = float(weight.norm())
    left = weight - compose(project(weight, factors), factors)
    return float(left.norm()) / norm if norm else 0.0


def ranks_of_energy(weight: Tensor, energy: float) -> list[int]:
    """For each channel mode the least rank that keeps this share of ‖W‖² in its unfolding."""
    found = []
    for mode in (0, 1):
        squares = torch.linalg.svdvals(unfold(weight.detach().double(), mode)).square()
        held = squares.cumsum(0) / squares.sum()
        found.append(min(int((held < energy - 1e-12).sum()) + 1, weight.shape[mode]))
    return found


def possible(weight: Tensor, ranks: Sequence[int | None]) -> list[int | None]:
    """The ranks cut to what the shape allows: no unfolding has a rank above its smaller side."""
    found = list(ranks)
    for mode, rank in enumerate(ranks):
        if rank is not None:
            others = weight[0, 0].numel()
            for other in (0, 1):
                if other != mode:
                    others *= min(found[other] or weight.shape[other], weight.shape[other])
            found[mode] = min(rank, weight.shape[mode], others)
    return found


def _leading(matrix: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False)[0][:, :rank].contiguous()
