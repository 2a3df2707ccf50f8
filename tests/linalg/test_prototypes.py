"""Class and spurious prototypes, what stands for many of them, and the divergence of read-outs."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from foretune.errors import UserError
from foretune.linalg.prototypes import (
    class_prototypes,
    divergence,
    representatives,
    spurious_prototypes,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_prototypes_are_the_two_axis_means_of_one_tensor() -> None:
    embedded = unit(5, 3, 8)
    swapped = embedded.transpose(0, 1)
    assert torch.equal(class_prototypes(embedded), spurious_prototypes(swapped))
    assert torch.equal(spurious_prototypes(embedded), class_prototypes(swapped))
    torch.testing.assert_close(class_prototypes(embedded), F.normalize(sum(embedded) / 5, dim=-1))


def test_as_many_centres_as_templates_leaves_them_as_they_are() -> None:
    vectors = unit(6, 4)
    for num in (6, 9):
        torch.testing.assert_close(representatives(vectors, num, keep=6), vectors)


def test_a_cluster_s_centre_stands_for_it() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(representatives(vectors, 2), vectors[:2])
    assert representatives(unit(20, 8), 7).shape == (7, 8)


def test_the_forest_leaves_out_what_is_far_from_the_rest() -> None:
    pytest.importorskip("sklearn")
    near = F.normalize(torch.tensor([[1.0, 0.0, 0.0]]) + 0.05 * unit(12, 3), dim=-1)
    vectors = torch.cat([near[:5], torch.tensor([[0.0, 0.0, -1.0]]), near[5:]])
    selected = representatives(vectors, 12, keep=12, seed=3)
    torch.testing.assert_close(selected, near)


def test_prototypes_are_the_same_with_the_same_seed() -> None:
    pytest.importorskip("sklearn")
    vectors = unit(30, 6)
    torch.manual_seed(1)
    first = representatives(vectors, 8, keep=20, seed=5)
    torch.manual_seed(2)
    assert torch.equal(representatives(vectors, 8, keep=20, seed=5), first)


def test_more_kept_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="num_kept is 9, but there are 6 templates"):
        representatives(unit(6, 4), 2, keep=9)


def test_without_scikit_learn_the_forest_says_what_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(UserError, match="pip install scikit-learn, or leave num_kept out"):
        representatives(unit(6, 4), 2, keep=4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_is_no_less_than_zero_and_does_not_see_a_shift(direction: str) -> None:
    student, teacher = 3 * unit(9, 5), 3 * unit(9, 5, seed=1)
    divergences = divergence(student, teacher, direction)
    assert (divergences > 0).all()
    shifted = divergence(student + 4.0, teacher - torch.arange(9.0)[:, None], direction)
    torch.testing.assert_close(shifted, divergences)
    assert divergence(teacher, teacher, direction).abs().max() == 0


def test_divergence_is_torch_s_own_in_each_direction() -> None:
    student, teacher = 3 * unit(9, 5), 3 * unit(9, 5, seed=1)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    forward = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    reverse = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(student, teacher), forward)
    torch.testing.assert_close(divergence(student, teacher, "reverse"), reverse)


def test_the_authors_mean_times_their_beta_is_ours_times_beta_by_k() -> None:
    student, teacher = 3 * unit(16, 20), 3 * unit(16, 20, seed=1)
    theirs = 20.0 * torch.nn.KLDivLoss()(student.log_softmax(-1), teacher.softmax(-1))
    torch.testing.assert_close(theirs, (20.0 / 20) * divergence(student, teacher).mean())
