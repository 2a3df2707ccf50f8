"""Prototypes from prompt embeddings, and the divergence between two readouts.

symbol   here         shape      meaning
E        embedded     (M, Y, d)  embedding of template j filled with class name y
μ_y      classes      (Y, d)     class prototype: mean over the templates
μ^sp_j   spurious     (M, d)     spurious prototype: mean over the classes
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foretune.errors import UserError
from foretune.linalg.clustering import k_means

Direction = Literal["forward", "reverse"]


def class_prototypes(embedded: Tensor) -> Tensor:
    """(Y, d) class prototypes μ_y of embeddings (M, Y, d), scaled to unit length."""
    return F.normalize(embedded.mean(0), dim=-1)


def spurious_prototypes(embedded: Tensor) -> Tensor:
    """(M, d) spurious prototypes μ^sp_j of embeddings (M, Y, d), scaled to unit length."""
    return F.normalize(embedded.mean(1), dim=-1)


def representatives(vectors: Tensor, num: int, *, keep: int | None = None, seed: int = 0) -> Tensor:
    """A few vectors that represent many: outliers are removed, the rest is clustered.

    Args:
        vectors: (M, d).
        num: Number of cluster centres; if at most so many vectors remain, they are returned as is.
        keep: Number of vectors that scikit-learn's isolation forest retains; None for all.
        seed: Random seed of the forest; the clustering needs none.

    Returns:
        (at most num, d), of unit length.

    Raises:
        UserError: `keep` exceeds M, or scikit-learn is not installed.
    """
    rows = vectors.detach().cpu().double().numpy()
    if keep is not None:
        if keep > len(rows):
            raise UserError(f"num_kept is {keep}, but there are {len(rows)} templates")
        rows = rows[_most_usual(rows, keep, seed)] if keep < len(rows) else rows
    if num < len(rows):
        labels = np.array(k_means(rows, num))
        rows = np.stack([rows[labels == c].mean(0) for c in range(num)])
    return F.normalize(torch.from_numpy(rows).to(vectors), dim=-1)


def _most_usual(rows: np.ndarray, keep: int, seed: int) -> np.ndarray:
    """Indices, ascending, of the `keep` vectors that are hardest to isolate.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.ensemble import IsolationForest
    except ImportError:
        raise UserError(
            "num_kept needs scikit-learn, which is not installed: pip install scikit-learn, or "
            "leave num_kept out"
        ) from None
    forest = IsolationForest(random_state=seed).fit(rows)
    order = np.argsort(-forest.score_samples(rows), kind="stable")
    return np.sort(order[:keep])


def divergence(student: Tensor, teacher: Tensor, direction: Direction = "forward") -> Tensor:
    """(n,) KL divergence of two readouts in nats; 0 where they differ by a constant only.

    Args:
        student: (n, k) logits that receive the gradient.
        teacher: (n, k) logits.
        direction: "forward" for KL(teacher ‖ student), "reverse" for KL(student ‖ teacher).

    >>> divergence(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([0.])
    """
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    p, q = (p, q) if direction == "forward" else (q, p)
    return (p.exp() * (p - q)).sum(-1)
