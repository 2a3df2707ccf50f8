"""Tucker-2 against its exact properties, the optimum of matrices, and tensorly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foretune.source_free.hooi import (
    compose,
    feasible_ranks,
    hooi,
    hosvd,
    project,
    ranks_of_energy,
    relative_error,
    unfold,
)

SHAPES = [(12, 9, 5), (6, 6), (8, 4, 3, 3), (5, 16, 1)]
RANKS = {(12, 9, 5): (4, 3), (6, 6): (2, 2), (8, 4, 3, 3): (3, 2), (5, 16, 1): (2, 4)}


def weight(shape, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)
    decay = 1 / torch.arange(1, shape[0] + 1, dtype=dtype)
    return values * decay.reshape(-1, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_bases_are_orthonormal(shape):
    _, factors, _ = hooi(weight(shape), RANKS[shape])
    for factor in factors:
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]), atol=5e-7, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_ranks_give_the_weight_back(shape):
    w = weight(shape)
    core, factors, errors = hooi(w, shape[:2])
    torch.testing.assert_close(compose(core, factors), w, atol=2e-6, rtol=0)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_energy_of_core_and_error_add_up(shape):
    w = weight(shape, torch.float64)
    core, factors, _ = hooi(w, RANKS[shape])
    residual = w - compose(core, factors)
    energy = core.square().sum() + residual.square().sum()
    assert energy.item() == pytest.approx(w.square().sum().item(), rel=2e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_sweeps_never_raise_the_error_and_begin_at_hosvd(shape):
    w = weight(shape, torch.float64)
    _, _, errors = hooi(w, RANKS[shape], tolerance=0.0)
    assert errors[0] == pytest.approx(relative_error(w, hosvd(w, RANKS[shape])))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(errors))


def test_sweeps_lower_the_error_where_hosvd_is_not_the_best():
    w = weight((12, 9, 5), torch.float64)
    _, _, errors = hooi(w, (2, 2))
    assert errors[-1] < errors[0] - 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_hosvd_error_is_within_the_discarded_singular_values(shape):
    w = weight(shape, torch.float64)
    discarded = sum(
        torch.linalg.svdvals(unfold(w, mode))[rank:].square().sum()
        for mode, rank in enumerate(RANKS[shape])
    )
    error = relative_error(w, hosvd(w, RANKS[shape])) * w.norm()
    assert error.square() <= discarded + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_hosvd_is_within_root_two_of_the_optimum(seed):
    # The optimum of two modes is at most the error of HOOI from many starts.
    w = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = min(_hooi_from(w, (2, 2), start) for start in range(6))
    first = relative_error(w, hosvd(w, (2, 2)))
    assert best - 1e-9 <= hooi(w, (2, 2))[2][-1] <= first <= math.sqrt(2) * best + 1e-9


def _hooi_from(w, ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    v2 = torch.linalg.qr(torch.randn(w.shape[1], ranks[1], generator=generator).double())[0]
    for _ in range(50):
        v1 = torch.linalg.svd(unfold(project(w, [None, v2]), 0))[0][:, : ranks[0]]
        v2 = torch.linalg.svd(unfold(project(w, [v1, None]), 1))[0][:, : ranks[1]]
    return relative_error(w, [v1, v2])


def test_a_matrix_gets_the_error_of_its_truncated_svd():
    w = weight((6, 6), torch.float64)
    s = torch.linalg.svdvals(w)
    best = (s[2:].square().sum() / s.square().sum()).sqrt()
    assert hooi(w, (2, 2))[2][-1] == pytest.approx(best.item(), rel=1e-9)


def test_error_is_that_of_tensorly():
    decomposition = pytest.importorskip("tensorly.decomposition")
    tensorly = pytest.importorskip("tensorly")
    w = weight((12, 9, 5), torch.float64)
    (core, (v1, v2)), _ = decomposition.partial_tucker(
        w.numpy(), rank=[4, 3], modes=[0, 1], n_iter_max=100, tol=1e-10
    )
    composed = torch.from_numpy(tensorly.tenalg.multi_mode_dot(core, [v1, v2], modes=[0, 1]))
    theirs = ((w - composed).norm() / w.norm()).item()
    assert hooi(w, (4, 3), tolerance=1e-10, sweeps=100)[2][-1] == pytest.approx(theirs, rel=1e-4)


def test_a_mode_without_rank_stays_whole():
    w = weight((12, 9, 5))
    core, (v1, v2), _ = hooi(w, (4, None))
    assert core.shape == (4, 9, 5) and v1.shape == (12, 4) and v2 is None


@pytest.mark.parametrize(
    ("shape", "asked", "feasible"),
    [((8, 3), (8, 3), [3, 3]), ((64, 1, 8), (32, None), [8, None]), ((4, 9, 2), (9, 9), [4, 8])],
)
def test_ranks_are_clipped_to_what_an_unfolding_can_have(shape, asked, feasible):
    assert feasible_ranks(torch.zeros(shape), asked) == feasible
    assert torch.isfinite(hooi(weight(shape), asked)[0]).all()


def test_energy_says_the_least_ranks_that_keep_it():
    w = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    assert ranks_of_energy(w, 9 / 14) == [1, 1]
    assert ranks_of_energy(w, 0.65) == [2, 2]
    assert ranks_of_energy(w, 1.0) == [3, 3]


def test_zeros_have_no_error():
    assert hooi(torch.zeros(4, 3, 2), (2, 2))[2][-1] == 0.0
