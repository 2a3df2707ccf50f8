"""Deterministic clustering of vectors or a similarity matrix into exactly k non-empty clusters."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.cluster.vq import kmeans2


def spectral(similarity: np.ndarray, k: int) -> list[int]:
    """Normalised spectral clustering (Ng, Jordan, Weiss, NIPS 2001).

    k-means on the rows of the k leading eigenvectors of D^(-1/2) S D^(-1/2), each row scaled to
    length one. It is initialised with Ward's clusters of the same rows and needs no random seed.

    Args:
        similarity: (n, n) symmetric and non-negative.
        k: Number of clusters, 1 to n.

    Returns:
        Cluster index of each of the n items, numbered by first appearance.

    >>> spectral(np.array([[1, 0.9, 0], [0.9, 1, 0], [0, 0, 1.0]]), 2)
    [0, 0, 1]
    """
    if k in (1, len(similarity)):
        return _trivial(len(similarity), k)
    root = 1 / np.sqrt(similarity.sum(1).clip(1e-12))
    _, vectors = np.linalg.eigh(root[:, None] * similarity * root[None, :])
    rows = vectors[:, -k:]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return k_means(rows, k)


def k_means(rows: np.ndarray, k: int) -> list[int]:
    """k-means initialised with Ward's clusters, which are returned if k-means empties a cluster.

    Args:
        rows: (n, d).
        k: Number of clusters, 1 to n.

    Returns:
        Cluster index of each of the n items, numbered by first appearance.

    >>> k_means(np.array([[0.0], [5.0], [0.1]]), 2)
    [0, 1, 0]
    """
    if k in (1, len(rows)):
        return _trivial(len(rows), k)
    start = cut_tree(linkage(rows, "ward"), n_clusters=k)[:, 0]
    centres = np.stack([rows[start == c].mean(0) for c in range(k)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k-means emptied a cluster
        _, labels = kmeans2(rows, centres, iter=100, minit="matrix")
    return _numbered(labels if len(set(labels.tolist())) == k else start)


def average_linkage(vectors: np.ndarray, k: int) -> list[int]:
    """Agglomerative clustering by the mean Euclidean distance between members of two clusters.

    Args:
        vectors: (n, d).
        k: Number of clusters, 1 to n.

    Returns:
        Cluster index of each of the n items, numbered by first appearance.

    >>> average_linkage(np.array([[0.0], [5.0], [0.1]]), 2)
    [0, 1, 0]
    """
    if k in (1, len(vectors)):
        return _trivial(len(vectors), k)
    return _numbered(cut_tree(linkage(vectors, "average"), n_clusters=k)[:, 0])


def _trivial(n: int, k: int) -> list[int]:
    """The clusters for k = 1 or k = n."""
    return [0] * n if k == 1 else list(range(n))


def _numbered(labels: np.ndarray) -> list[int]:
    """The labels, renumbered in the order of their first appearance."""
    order: dict[int, int] = {}
    return [order.setdefault(int(label), len(order)) for label in labels]
