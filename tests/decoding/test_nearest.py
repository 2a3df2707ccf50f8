"""Exact search is exact, weights do not underflow, votes are a distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foretune.decoding import nearest
from foretune.decoding.nearest import ExactIndex, FaissIndex, mixed, neighbour_weights, votes
from foretune.errors import UserError


def points(n=200, d=12, seed=0, offset=0.0):
    made = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return made + offset


def brute_force(keys, queries, k):
    far = ((queries[:, None].double() - keys[None].double()) ** 2).sum(-1).numpy()
    places = np.argsort(far, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(far, places, 1), places


@pytest.mark.parametrize("cells", [2**24, 300])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_exact_search_equals_brute_force(monkeypatch, cells, offset):
    monkeypatch.setattr(nearest, "CELLS", cells)
    keys, queries = points(offset=offset), points(17, seed=1, offset=offset)
    squared, places = ExactIndex(keys).search(queries, 9)
    wanted, where = brute_force(keys, queries, 9)
    np.testing.assert_array_equal(places.numpy(), where)
    np.testing.assert_allclose(squared.numpy(), wanted, rtol=1e-5)


def test_half_precision_keys_have_float32_distances():
    keys, queries = points().half(), points(5, seed=1)
    squared, places = ExactIndex(keys).search(queries, 4)
    wanted, where = brute_force(keys, queries, 4)
    assert squared.dtype == torch.float32
    np.testing.assert_array_equal(places.numpy(), where)
    np.testing.assert_allclose(squared.numpy(), wanted, rtol=1e-5)


def test_a_key_is_its_own_neighbour_at_distance_zero():
    keys = points(offset=1000.0)
    squared, places = ExactIndex(keys).search(keys, 1)
    assert torch.equal(places[:, 0], torch.arange(len(keys)))
    assert torch.equal(squared, torch.zeros_like(squared))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("key_type", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 2.0, 30.0])
def test_answers_are_those_of_float64_in_any_layout(key_type, offset, heads):
    """Probabilities to 1e-6, in slices of keys, near zero and far from it."""
    keys, queries = points(400, offset=offset).to(key_type), points(20, seed=1, offset=offset)
    values = torch.arange(400) % 11
    for part, states in zip(keys.chunk(heads, 1), queries.chunk(heads, 1), strict=True):
        squared, places = ExactIndex(part).search(states, 16)
        wanted, where = brute_force(part, states, 16)
        np.testing.assert_array_equal(places.numpy(), where)
        exact = votes(neighbour_weights(torch.from_numpy(wanted), 20.0), values[where], 11)
        answer = votes(neighbour_weights(squared, 20.0), values[places], 11)
        torch.testing.assert_close(answer.double(), exact, rtol=0, atol=1e-6)


def test_keys_are_copied_only_where_their_type_or_place_asks_for_it():
    near = points(offset=1.0)
    assert ExactIndex(near).rows is near
    for keys in (near.half(), near.double(), points(offset=100.0)):
        index = ExactIndex(keys)
        assert index.rows.dtype == torch.float32
        assert index.rows.mean(0).abs().max() < 0.01


@pytest.mark.parametrize("cells", [2**24, 100])
def test_a_group_that_is_left_out_is_not_found(monkeypatch, cells):
    monkeypatch.setattr(nearest, "CELLS", cells)
    keys, groups = points(20), torch.arange(20) // 4
    squared, places = ExactIndex(keys, groups).search(keys, 20, groups)
    finite = squared.isfinite()
    assert finite.sum(1).tolist() == [16] * 20
    assert not (groups[places] == groups[:, None])[finite].any()


def test_no_queries_find_nothing():
    squared, places = ExactIndex(points()).search(points(0), 3)
    assert squared.shape == places.shape == (0, 3)


def test_faiss_finds_what_the_exact_search_finds():
    pytest.importorskip("faiss")
    keys, queries = points(offset=3.0), points(17, seed=1, offset=3.0)
    squared, places = ExactIndex(keys).search(queries, 9)
    other, where = FaissIndex(keys).search(queries, 9)
    assert torch.equal(places, where)
    torch.testing.assert_close(other, squared, rtol=1e-4, atol=1e-4)


def test_the_graph_of_faiss_finds_nearly_all(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(nearest, "FLAT", 500)
    keys, queries = points(1200), points(50, seed=1)
    index = FaissIndex(keys)
    assert "HNSW" in type(index.index).__name__
    _, wanted = ExactIndex(keys).search(queries, 5)
    _, found = index.search(queries, 5)
    kept = [len(set(a) & set(b)) for a, b in zip(wanted.tolist(), found.tolist(), strict=True)]
    assert np.mean(kept) > 4.5


def test_without_faiss_it_is_said_what_brings_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r'pip install "foretune\[rtd\]"'):
        FaissIndex(points())


@pytest.mark.parametrize("temperature", [1.0, 1e-12])
@pytest.mark.parametrize("far", [1e4, 9e3, 1e30])
def test_far_neighbours_neither_underflow_nor_overflow(far, temperature):
    weights = neighbour_weights(torch.tensor([[far, far, 2 * far]]), temperature)
    assert weights.tolist() == [[0.5, 0.5, 0.0]]


def test_an_infinite_distance_has_no_weight():
    weights = neighbour_weights(torch.tensor([[1.0, torch.inf]]), 1e30)
    assert weights.tolist() == [[1.0, 0.0]]


def test_mixing_nothing_changes_no_bit_and_keeps_the_type():
    logits = points(3, 7).half()
    assert mixed(logits, torch.full((3, 7), 1 / 7), 0.0) is logits
    assert mixed(logits, torch.full((3, 7), 1 / 7), 0.5).dtype == torch.float16


def test_a_mixture_is_exact_and_sums_to_one():
    logits, r = points(3, 7), torch.softmax(points(3, 7, seed=1), -1)
    made = mixed(logits, r, 0.3).double().exp()
    wanted = 0.7 * torch.softmax(logits.double(), -1) + 0.3 * r.double()
    torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(made.sum(-1), torch.ones(3).double())


def test_votes_sum_to_one_over_the_values_of_neighbours():
    weights = torch.softmax(points(4, 6), -1)
    values = torch.randint(0, 3, (4, 6), generator=torch.Generator().manual_seed(0)) * 2
    made = votes(weights, values, 9)
    torch.testing.assert_close(made.sum(-1), torch.ones(4))
    assert made[:, [1, 3, 5, 6, 7, 8]].count_nonzero() == 0
