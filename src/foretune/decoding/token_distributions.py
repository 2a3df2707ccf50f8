"""Next-token distributions: their nucleus, logits before a soft cap, tokens that are unheard of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

UNSEEN = 1e-6  # the untuned model never learned a token below this probability


def in_nucleus(log_p: Tensor, share: float) -> Tensor:
    """The most probable ids that together reach a probability of `share`.

    The id that reaches it is included, so there is always at least one.

    Args:
        log_p: (…, V) log-probabilities.
        share: Above 0 and at most 1.

    Returns:
        (…, V) bool.
    """
    ordered, places = log_p.sort(-1, descending=True)
    p = ordered.exp()
    inside = p.cumsum(-1) - p < share
    return torch.zeros_like(inside).scatter(-1, places, inside)


def before_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Inverts the soft cap y = cap · tanh(x / cap) of logits of any shape (…, V).

    Logits at the cap become large, but finite.
    """
    if cap is None:
        return logits
    limit = 1 - 1e-6
    return cap * (logits.float() / cap).clamp(-limit, limit).atanh()


def is_unseen(tuned: Sequence[Tensor], untuned: Sequence[Tensor]) -> bool:
    """Whether a tuned model's top token has a probability below `UNSEEN` in the untuned one."""
    for k, high in enumerate(tuned):
        low = untuned[k if len(untuned) > 1 else 0]
        top = high[:, -1].argmax(-1, keepdim=True)
        inside = top < low.shape[-1]
        log_p = torch.log_softmax(low[:, -1].float(), -1).gather(-1, top.where(inside, 0))
        if bool((inside & (log_p < math.log(UNSEEN))).any()):
            return True
    return False
