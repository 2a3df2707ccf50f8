"""Factors of a change."""

from __future__ import annotations

import torch

from foretune.linalg.low_rank import leading_directions, svd_of_product, truncated_svd


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
