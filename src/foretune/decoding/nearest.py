"""Nearest neighbours by squared Euclidean distance, and the distribution of their values.

symbol   here       shape        meaning
k_i      keys       (N, d)       the indexed vectors
h        queries    (Q, d)       the vectors to look up
d_ij     squared    (Q, K)       squared distances to the K nearest keys
T        temperature             neighbours are weighted by softmax(−d / T)
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from foretune.errors import UserError

CELLS = 2**24  # of the distance matrix held at once: 64 MB
RERANKED = 8  # candidates beyond K whose distances are computed exactly
FLAT = 100_000  # keys up to which faiss searches exhaustively; beyond, it walks an HNSW graph
LINKS, EFFORT = 32, 128  # of that graph: edges per key, candidates held during a search


class Index(Protocol):
    """A set of keys that can be searched."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(squared distances (Q, k), ascending; indices of the keys (Q, k)) of queries (Q, d)."""


class ExactIndex:
    """Exact search in torch, in chunks.

    Candidates are found by |q|² + |k|² − 2 q·k, which loses precision where keys lie close
    together and far from zero; the distances returned are computed from the differences.

    Args:
        keys: (N, d), any float type.
        groups: (N,) the group of each key, which `search` can exclude; or None.
    """

    def __init__(self, keys: Tensor, groups: Tensor | None = None) -> None:
        self.keys, self.groups = keys, groups
        # A translation changes no distance, and small numbers have small errors.
        self.centre = keys[:CELLS].float().mean(0)

    def search(
        self, queries: Tensor, k: int, without: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The `k` nearest keys of each query.

        Args:
            queries: (Q, d).
            k: At most the number of keys.
            without: (Q,) the group whose keys are excluded for each query; or None.

        Returns:
            (squared distances (Q, k), float32, ascending; indices (Q, k)). Distances are infinite
            where fewer than `k` keys are left for a query.
        """
        held = max(len(self.keys), (k + RERANKED) * self.keys.shape[1])
        step = max(1, CELLS // held)
        parts = [
            self._search_chunk(
                queries[i : i + step], k, None if without is None else without[i : i + step]
            )
            for i in range(0, len(queries), step)
        ]
        if not parts:
            return queries.new_zeros(0, k, dtype=torch.float32), queries.new_zeros(0, k).long()
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _search_chunk(
        self, queries: Tensor, k: int, without: Tensor | None
    ) -> tuple[Tensor, Tensor]:
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
    """Search by faiss: exact up to `FLAT` keys, approximate (an HNSW graph) beyond.

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
        """(squared distances (Q, k), indices (Q, k)) as returned by `ExactIndex.search`."""
        distances, indices = self.index.search(queries.float().cpu().contiguous().numpy(), k)
        squared = torch.from_numpy(distances).to(queries.device).clamp(min=0)
        places = torch.from_numpy(indices).to(queries.device)
        # The graph returns −1 where it finds no more.
        return squared.masked_fill(places < 0, torch.inf), places.clamp(min=0)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError(
            'search="faiss" needs faiss, which is not installed: pip install "foretune[rtd]", '
            'or use search="exact"'
        ) from None
    return faiss


def neighbour_weights(squared: Tensor, temperature: float) -> Tensor:
    """softmax(−d / T) of distances (…, K), ascending; 0 where a distance is infinite.

    The smallest distance is subtracted first, so that distant neighbours do not all underflow.

    >>> neighbour_weights(torch.tensor([[1e4, 1e4 + 1]]), 1.0).sum().item()
    1.0
    """
    least = squared[..., :1]
    gaps = torch.where(squared.isinf(), torch.inf, squared - least)
    return torch.softmax(-gaps / temperature, -1)


def votes(weights: Tensor, values: Tensor, size: int) -> Tensor:
    """The summed weight of the neighbours that carry each value.

    Args:
        weights: (…, K).
        values: (…, K), from 0 to `size` − 1.
        size: Number of possible values.

    Returns:
        (…, size).

    >>> votes(torch.tensor([0.5, 0.25, 0.25]), torch.tensor([2, 0, 2]), 3).tolist()
    [0.25, 0.0, 0.75]
    """
    totals = weights.new_zeros(*weights.shape[:-1], size)
    return totals.scatter_add_(-1, values, weights)


def mixed(logits: Tensor, reference: Tensor, share: float) -> Tensor:
    """log((1 − share) softmax(logits) + share · reference), (…, V), in the type of `logits`.

    With share 0 it is `logits` itself, bit for bit.

    Args:
        logits: (…, V) of the model.
        reference: (…, V) distribution.
        share: Weight of the reference, from 0 to 1.
    """
    if share == 0:
        return logits
    probs = torch.softmax(logits.float(), -1)
    return ((1 - share) * probs + share * reference).log().to(logits.dtype)
