"""Nearest neighbours by squared Euclidean distance, and a distribution made of what they carry.

symbol   here       shape        meaning
k_i      keys       (N, d)       what is searched
h        queries    (Q, d)       what it is searched with
d_ij     squared    (Q, K)       squared distances to the K nearest
T        temperature             softmax(−d / T) weighs the neighbours
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from foretune.errors import UserError

CELLS = 2**24  # of the matrix of distances that is held at once: 64 MB
RERANKED = 8  # candidates beyond K whose distances are computed exactly
FLAT = 100_000  # keys that faiss searches one by one; beyond them it walks a graph of neighbours
LINKS, EFFORT = 32, 128  # of that graph: edges of a key, candidates held on the way


class Index(Protocol):
    """What answers `search`."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(squared distances (Q, k) in rising order, places of the keys (Q, k))."""


class ExactIndex:
    """Exact search in torch, in chunks.

    The matrix product |q|² + |k|² − 2 q·k finds candidates; it loses digits where keys lie close
    together and far from zero, so the distances returned are those of the differences.

    Args:
        keys: (N, d), any float type.
        groups: (N,), or None: keys that are left out together; see `search`.
    """

    def __init__(self, keys: Tensor, groups: Tensor | None = None) -> None:
        self.keys, self.groups = keys, groups
        # Distances do not change when all is moved, and small numbers have small errors.
        self.centre = keys[:CELLS].float().mean(0)

    def search(
        self, queries: Tensor, k: int, without: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The `k` nearest keys of every query.

        Args:
            queries: (Q, d).
            k: At most the number of keys.
            without: (Q,), or None: the group whose keys a query must not find.

        Returns:
            (squared distances, float32 (Q, k), rising; places (Q, k)). Where a query has fewer
            keys left than `k` the distance is infinite.
        """
        held = max(len(self.keys), (k + RERANKED) * self.keys.shape[1])
        step = max(1, CELLS // held)
        parts = [
            self._some(queries[i : i + step], k, None if without is None else without[i : i + step])
            for i in range(0, len(queries), step)
        ]
        if not parts:
            return queries.new_zeros(0, k, dtype=torch.float32), queries.new_zeros(0, k).long()
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _some(self, queries: Tensor, k: int, without: Tensor | None) -> tuple[Tensor, Tensor]:
        moved = queries.float() - self.centre
        best, places = None, None
        chunk = max(k + RERANKED, CELLS // max(self.keys.shape[1], len(queries)))
        for start in range(0, len(self.keys), chunk):
            keys = self.keys[start : start + chunk].float() - self.centre
            far = torch.addmm(keys.square().sum(-1), moved, keys.T, alpha=-2)
            if without is not None and self.groups is not None:
                same = without[:, None] == self.groups[None, start : start + chunk]
                far = far.masked_fill(same, torch.inf)
            low, at = far.topk(min(k + RERANKED, len(keys)), largest=False)
            at = at + start
            if best is not None and places is not None:
                low, at = torch.cat([best, low], 1), torch.cat([places, at], 1)
                low, order = low.topk(min(k + RERANKED, low.shape[1]), largest=False)
                at = at.gather(1, order)
            best, places = low, at
        assert best is not None and places is not None
        exact = (self.keys[places].float() - queries.float()[:, None]).square().sum(-1)
        exact = exact.masked_fill(best.isinf(), torch.inf)
        squared, order = exact.sort(dim=1, stable=True)
        return squared[:, :k], places.gather(1, order)[:, :k]


class FaissIndex:
    """Search by faiss: exact up to `FLAT` keys, a graph of neighbours (HNSW) beyond.

    Args:
        keys: (N, d), any float type; faiss keeps float32 copies.

    Raises:
        UserError: faiss is not installed.
    """

    def __init__(self, keys: Tensor) -> None:
        faiss = _faiss()
        width = keys.shape[1]
        if len(keys) <= FLAT:
            self.index = faiss.IndexFlatL2(width)
        else:
            self.index = faiss.IndexHNSWFlat(width, LINKS)
            self.index.hnsw.efSearch = EFFORT
        for start in range(0, len(keys), FLAT):
            self.index.add(keys[start : start + FLAT].float().cpu().contiguous().numpy())

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` nearest keys of every query, as of `ExactIndex`."""
        squared, places = self.index.search(queries.float().cpu().contiguous().numpy(), k)
        found = torch.from_numpy(squared).to(queries.device).clamp(min=0)
        where = torch.from_numpy(places).to(queries.device)
        # The graph answers −1 where it found no more.
        return found.masked_fill(where < 0, torch.inf), where.clamp(min=0)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError(
            'search="faiss" needs faiss, which is not installed; pip install "foretune[rtd]" '
            'brings it, and search="exact" needs nothing'
        ) from None
    return faiss


def neighbour_weights(squared: Tensor, temperature: float) -> Tensor:
    """softmax(−d / T) over the last dimension; 0 where the distance is infinite.

    It subtracts the smallest distance first, so that far neighbours do not underflow together.

    >>> neighbour_weights(torch.tensor([[1e4, 1e4 + 1]]), 1.0).sum().item()
    1.0
    """
    least = squared[..., :1]
    gaps = torch.where(squared.isinf(), torch.inf, squared - least)
    return torch.softmax(-gaps / temperature, -1)


def votes(weights: Tensor, values: Tensor, size: int) -> Tensor:
    """The sum of the weights of the neighbours that carry each value.

    Args:
        weights: (..., K).
        values: (..., K), from 0 to `size` − 1.
        size: Number of values there are.

    Returns:
        (..., size).

    >>> votes(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([2, 0, 2]), 3).tolist()
    [0.25, 0.0, 0.75]
    """
    counted = weights.new_zeros(*weights.shape[:-1], size)
    return counted.scatter_add_(-1, values, weights)


def mixed(logits: Tensor, reference: Tensor, share: float) -> Tensor:
    """log((1 − share) softmax(logits) + share · reference), in the type of `logits`.

    With share 0 it is `logits` itself, bit for bit.
    """
    if share == 0:
        return logits
    own = torch.softmax(logits.float(), -1)
    return ((1 - share) * own + share * reference).log().to(logits.dtype)
