"""Factors of a change."""

from __future__ import annotations

import pytest
import torch

from foretune.linalg import low_rank
from foretune.linalg.low_rank import (
    leading_directions,
    randomised_svd,
    svd_of_product,
    truncated_svd,
)


def test_product_through_its_factors_equals_the_dense_decomposition() -> None:
    torch.manual_seed(0)
    b, a = torch.randn(20, 4), torch.randn(4, 11)
    u, s, vh = svd_of_product(b, a)
    _, dense_s, dense_vh = truncated_svd(b @ a, 4)
    torch.testing.assert_close(u * s @ vh, b @ a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s, dense_s, rtol=1e-5, atol=1e-5)
    signs = (vh * dense_vh).sum(1).sign().unsqueeze(1)
    torch.testing.assert_close(vh * signs, dense_vh, rtol=1e-4, atol=1e-5)


def test_truncation_is_the_best_of_its_rank_and_works_in_half_precision() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(9, 6)
    u, s, vh = truncated_svd(matrix, 3)
    left = (matrix - u * s @ vh).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(matrix)[3:].square().sum())
    assert truncated_svd(matrix.bfloat16(), 100)[1].shape == (6,)


def test_rank_beyond_the_matrix_of_factors_is_harmless() -> None:
    b, a = torch.randn(3, 5), torch.randn(5, 4)  # rank 3 at most
    u, s, vh = svd_of_product(b, a)
    torch.testing.assert_close(u * s @ vh, b @ a, rtol=1e-4, atol=1e-5)


def test_leading_direction_is_where_a_group_stands_out_not_where_all_are_large() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([10.0, 1.0, 1.0, 1.0])
    plain, scaled = torch.randn(400, 4) * scale, torch.randn(400, 4) * scale
    scaled[:, 2] *= 3
    [_, [direction]] = leading_directions([plain, scaled], 1, ridge=1e-6)
    assert direction.abs().argmax() == 2
    energy = [(rows @ direction).square().mean() for rows in (plain, scaled)]
    torch.testing.assert_close(sum(energy) / 2, torch.tensor(1.0), rtol=1e-3, atol=0)
    assert energy[1] > 4 * energy[0]


def test_directions_beyond_the_span_of_the_rows_are_zero() -> None:
    directions = leading_directions([torch.eye(2, 6), -torch.eye(2, 6)], 4, ridge=0.1)
    assert directions.shape == (2, 4, 6)
    assert directions[:, :2].abs().sum() > 0 and directions[:, 2:].abs().sum() == 0


def decaying(out: int, size: int, decay: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose i-th singular value is i ** -decay."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(out, size, generator=generator)).Q
    v = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return u * torch.arange(1, size + 1).float().pow(-decay) @ v.T


@pytest.mark.parametrize("transposed", [False, True])
def test_randomised_svd_is_the_exact_one_where_the_spectrum_decays(transposed: bool) -> None:
    matrix = decaying(200, 150, 1.0)
    matrix = matrix.T if transposed else matrix
    state = torch.get_rng_state()
    u, s, vh = randomised_svd(matrix, 12)
    assert torch.equal(torch.get_rng_state(), state)
    exact_u, exact_s, exact_vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(s, exact_s[:12], rtol=1e-5, atol=0)
    # the first directions one by one, and the spans that gates and experts are
    for a, b in ((u.T, exact_u.T[:12]), (vh, exact_vh[:12])):
        torch.testing.assert_close(a @ a.T, torch.eye(12), rtol=0, atol=1e-5)
        overlap = torch.linalg.svdvals(a @ b.T)
        assert overlap.min() > 1 - 1e-5
        assert (a[:6] * b[:6]).sum(1).abs().min() > 1 - 1e-5
    approximation = torch.linalg.norm(matrix - u * s @ vh)
    torch.testing.assert_close(approximation, exact_s[12:].norm(), rtol=1e-4, atol=0)


def test_randomised_svd_of_noise_holds_nearly_the_energy_of_the_exact_one() -> None:
    noise = torch.randn(200, 150, generator=torch.Generator().manual_seed(1))
    energy = randomised_svd(noise, 12)[1].square().sum()
    best = torch.linalg.svdvals(noise)[:12].square().sum()
    assert 0.97 * best < energy <= best * (1 + 1e-5)


def test_large_matrices_of_which_a_share_is_wanted_are_sketched(monkeypatch) -> None:
    matrix = decaying(60, 50, 1.0)
    exact = truncated_svd(matrix, 6)
    monkeypatch.setattr(low_rank, "LARGE", 50)
    sketched = truncated_svd(matrix, 6)
    assert not torch.equal(sketched[1], exact[1])
    torch.testing.assert_close(sketched[1], exact[1], rtol=1e-4, atol=0)
    assert torch.equal(truncated_svd(matrix, 7)[1], torch.linalg.svd(matrix)[1][:7])
    assert len(truncated_svd(matrix, None)[1]) == 50


def test_directions_of_many_rows_are_those_of_few() -> None:
    """More rows than their width go through the Gram matrix."""
    torch.manual_seed(0)
    groups = [torch.randn(9, 6) * scale for scale in (torch.rand(6) + 0.1, torch.rand(6) + 0.1)]
    repeated = [torch.cat([rows] * 3) for rows in groups]
    wide = [torch.nn.functional.pad(rows, (0, 40)) for rows in groups]
    few = leading_directions(wide, 2, ridge=0.1 * 46 / 6)[..., :6]
    many = leading_directions(repeated, 2, ridge=0.1)
    torch.testing.assert_close(many.abs(), few.abs(), rtol=1e-3, atol=1e-4)
