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
NEAR = 16.0  # squared centre over the keys' variance up to which no bits of note are lost
RERANKED = 8  # candidates beyond K whose distances are computed exactly
FLAT = 100_000  # keys up to which faiss searches exhaustively; beyond, it walks an HNSW graph
LINKS, EFFORT = 32, 128  # of that graph: edges per key, candidates held during a search


class Index(Protocol):
    """A set of keys that can be searched."""

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(squared distances (Q, k), ascending; indices of the keys (Q, k)) of queries (Q, d)."""


class ExactIndex:
    """Exact search in torch, in chunks.

    Candidates are found by |k − c|² − 2 (q − c)·k, which differs from |q − k|² by what is the same
    for all keys. It loses precision where keys lie far from zero and close together, so a
    translated float32 copy of the keys is held where they do, or where they have another type. The
    distances returned are computed from the differences.

    Args:
        keys: (N, d), any float type.
        groups: (N,) the group of each key, which `search` can exclude; or None.
    """

    def __init__(self, keys: Tensor, groups: Tensor | None = None) -> None:
        self.keys, self.groups = keys, groups
        step = max(1, CELLS // keys.shape[1])
        pieces = keys.split(step)
        self.centre = torch.stack([piece.float().sum(0) for piece in pieces]).sum(0) / len(keys)
        moved = ((piece.float() - self.centre).square().sum(-1) for piece in pieces)
        self.norms = torch.cat(list(moved))
        near = bool(self.centre.square().sum() <= NEAR * self.norms.mean())
        self.rows = keys
        if keys.dtype != torch.float32 or not near:
            self.rows = torch.empty_like(keys, dtype=torch.float32)
            for piece, rows in zip(pieces, self.rows.split(step), strict=True):
                torch.sub(piece.float(), self.centre, out=rows)

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
        chunk = max(k + RERANKED, CELLS // len(queries))
        for start in range(0, len(self.rows), chunk):
            rows = self.rows[start : start + chunk]
            far = torch.addmm(self.norms[start : start + chunk], moved, rows.T, alpha=-2)
            if without is not None and self.groups is not None:
                same = without[:, None] == self.groups[None, start : start + chunk]
                far = far.masked_fill(same, torch.inf)
            low, at = far.topk(min(k + RERANKED, len(rows)), largest=False)
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
        keys: (N, d), any float type. The graph holds float16 and bfloat16 keys as they are, all
            others in float32.
        index: faiss's index of these keys; None to build it.

    Raises:
        UserError: faiss is not installed.
    """

    def __init__(self, keys: Tensor, index: Any = None) -> None:
        self.index = _built(keys) if index is None else index

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(squared distances (Q, k), indices (Q, k)) as returned by `ExactIndex.search`."""
        distances, indices = self.index.search(queries.float().cpu().contiguous().numpy(), k)
        squared = torch.from_numpy(distances).to(queries.device).clamp(min=0)
        places = torch.from_numpy(indices).to(queries.device)
        # The graph returns −1 where it finds no more.
        return squared.masked_fill(places < 0, torch.inf), places.clamp(min=0)


def _built(keys: Tensor) -> Any:
    """The index of faiss for keys (N, d)."""
    faiss, width = faiss_module(), keys.shape[1]
    half = {torch.float16: "QT_fp16", torch.bfloat16: "QT_bf16"}.get(keys.dtype)
    if len(keys) <= FLAT:
        index = faiss.IndexFlatL2(width)
    else:
        if half is None:
            index = faiss.IndexHNSWFlat(width, LINKS)
        else:
            index = faiss.IndexHNSWSQ(width, getattr(faiss.ScalarQuantizer, half), LINKS)
        index.hnsw.efSearch = EFFORT
    for piece in keys.split(FLAT):
        index.add(piece.float().cpu().contiguous().numpy())
    return index


def faiss_module() -> Any:
    """The module faiss.

    Raises:
        UserError: It is not installed.
    """
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
