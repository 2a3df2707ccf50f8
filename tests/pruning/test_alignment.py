"""Units are matched as brute force would match them, and means are means."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from foretune.linalg.clustering import average_linkage, spectral
from foretune.pruning.alignment import match_units, merge_networks


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_matching_finds_the_permutation_that_was_applied() -> None:
    units = random(20, 9)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(units[order][match_units(units, units[order])], units)


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_nearest_of_all_permutations(seed: int) -> None:
    a, b = random(5, 7, seed=seed), random(5, 7, seed=seed + 10)
    nearest = min(
        itertools.permutations(range(5)), key=lambda p: float((a - b[list(p)]).square().sum())
    )
    assert match_units(a, b).tolist() == list(nearest)


def test_merging_is_the_weighted_mean_after_matching() -> None:
    units, rest = random(3, 6, 4), random(3, 2, seed=1)
    weights = [0.5, 0.2, 0.3]
    unit, last = merge_networks(units, rest, weights, 1, align=True)
    ordered = [units[i][match_units(units[1], units[i])] for i in range(3)]
    torch.testing.assert_close(unit, sum(w * o for w, o in zip(weights, ordered, strict=True)))
    torch.testing.assert_close(last, torch.tensor(weights) @ rest)
    plain, _ = merge_networks(units, rest, weights, 1, align=False)
    torch.testing.assert_close(plain, torch.einsum("n,nif->if", torch.tensor(weights), units))


def test_a_network_alone_comes_back_bit_for_bit() -> None:
    units = random(1, 6, 4).bfloat16()
    unit, _ = merge_networks(units, units[:, 0, :0], [1.0], 0, align=True)
    assert torch.equal(unit, units[0]) and unit.dtype == torch.bfloat16


@pytest.mark.parametrize("k", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_a_partition_into_k_parts(k: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(12, 3))
    near = (1 + np.corrcoef(x)) / 2
    for labels in (spectral(near, k), average_linkage(x, k)):
        assert len(labels) == 12 and set(labels) == set(range(k))
        assert [labels.index(c) for c in range(k)] == sorted(labels.index(c) for c in range(k))


def test_clusters_survive_experts_that_are_all_alike() -> None:
    assert set(spectral(np.ones((6, 6)), 3)) == {0, 1, 2}
    assert set(average_linkage(np.zeros((6, 2)), 3)) == {0, 1, 2}


def test_both_find_clusters_that_are_plain_to_see() -> None:
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(3) * 5, 4, axis=0)[rng.permutation(12)]
    truth = centres.argmax(1)
    x = centres + rng.normal(0, 0.1, (12, 3))
    near = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1))
    for labels in (spectral(near, 3), average_linkage(x, 3)):
        assert all((labels[i] == labels[j]) == (truth[i] == truth[j]) for i in ALL for j in ALL)


ALL = range(12)
