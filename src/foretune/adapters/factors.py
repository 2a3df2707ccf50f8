"""Heads of many tasks as combinations of a few: the start of `factorised-heads`."""

from __future__ import annotations

import torch

from foretune.adapters.bank import AdapterBank
from foretune.adapters.coefficients import Coefficients
from foretune.adapters.layers import spread


@torch.no_grad()
def shared_heads(bank: AdapterBank, num_factors: int, seed: int) -> Coefficients:
    """Coefficients w (slots, K) of K heads V that are learnt: Σ_k w_tk V_k is the head of slot t.

    Every w_tk is 1/K, and the V_k are the head that the slots have with noise of its own size that
    cancels in their mean: so each slot keeps its head, and the V_k differ.

    Args:
        bank: A bank of heads, equal in all slots.
        num_factors: K.
        seed: Random seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, p in bank.named_parameters():
        head = p[0].detach().float().cpu()
        noise = torch.randn((num_factors, *head.shape), generator=generator)
        factors[name] = head + spread(head) * (noise - noise.mean(0))
    coefficients = Coefficients(bank, {}, factors, learn_shared=True)
    coefficients.z.fill_(1 / num_factors)
    return coefficients
