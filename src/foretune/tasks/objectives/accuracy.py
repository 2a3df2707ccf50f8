"""Accuracy of picking the highest of several scores, in which a tie is no right answer."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracies(scores: Tensor, answers: Tensor) -> Tensor:
    """(n,) 1 where the right option has the highest score, 1/k where it is one of k that have it.

    That is the expected accuracy of picking one of the best at random, so a model that gives all
    options the same score is at chance wherever the right one stands. NaN where a score is NaN.

    Args:
        scores: (n, options); −inf where an option does not count.
        answers: (n,) index of the right option.

    >>> table = torch.tensor([[1.0, 3.0, 3.0], [0.0, 1.0, 2.0], [torch.nan, 1.0, 2.0]])
    >>> accuracies(table, torch.tensor([1, 1, 2])).tolist()
    [0.5, 0.0, nan]
    """
    shares = picks(scores)
    return shares.gather(1, answers[:, None])[:, 0]


def picks(scores: Tensor) -> Tensor:
    """(n, options) the share of each option in the pick: 1 for the best, 1/k for each of k best.

    Args:
        scores: (n, options); −inf where an option does not count.
    """
    best = (scores == scores.amax(1, keepdim=True)).float()
    shares = best / best.sum(1, keepdim=True)
    return shares.masked_fill(scores.isnan().any(1, keepdim=True), torch.nan)
