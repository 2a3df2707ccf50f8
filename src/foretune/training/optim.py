"""AdamW on stacked parameters, in which a slot that takes no part in a step does not move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class SlotAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with a state of its own for each slot.

    Every parameter has shape (slots, …). A slot that is absent from a step keeps its value, its
    moments and its step count: no weight decay, no momentum, exactly as if it had an optimiser
    of its own. A plain AdamW on the stacked tensor would move it.

    Args:
        params: Stacked parameters.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "wd": weight_decay})

    @torch.no_grad()
    def step_slots(
        self, present: Sequence[int], *, grad_scale: float = 1.0, max_norm: float | None = None
    ) -> None:
        """One update of the slots that are present.

        Args:
            present: Distinct slots.
            grad_scale: The gradients are multiplied by it first.
            max_norm: Each slot's gradient, over all parameters, is clipped to this norm.
        """
        factor = self._slot_factors(present, grad_scale, max_norm)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group, present, factor)

    def _slot_factors(
        self, present: Sequence[int], grad_scale: float, max_norm: float | None
    ) -> Tensor | None:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not grads or (max_norm is None and grad_scale == 1.0):
            return None
        factor = torch.full((len(present),), grad_scale, device=grads[0].device)
        if max_norm is not None:
            squares = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).square().sum(0)
            norms = squares.sqrt()[list(present)] * grad_scale
            factor = factor * (max_norm / (norms + 1e-6)).clamp(max=1.0)
        return factor

    def _step_one(
        self, p: Tensor, group: dict, present: Sequence[int], factor: Tensor | None
    ) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(p.shape[0])
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        everyone = list(present) == list(range(p.shape[0]))
        index = slice(None) if everyone else torch.tensor(present)
        beta1, beta2 = group["betas"]
        state["step"][index] += 1
        steps = _column(state["step"][index], p)

        assert p.grad is not None
        grad = p.grad[index]
        if factor is not None:
            grad = grad * _column(factor, p)
        # Views of the whole state when everyone is present, gathered copies otherwise.
        first, second, value = state["exp_avg"][index], state["exp_avg_sq"][index], p[index]
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        value.mul_(1 - group["lr"] * group["wd"])
        denominator = (second.sqrt() / (1 - beta2**steps).sqrt()).add_(group["eps"])
        value.sub_(first / denominator * (group["lr"] / (1 - beta1**steps)))
        if not everyone:
            state["exp_avg"][index], state["exp_avg_sq"][index], p[index] = first, second, value


def _column(per_slot: Tensor, like: Tensor) -> Tensor:
    """(slots,) shaped so that it broadcasts over the stacked parameter `like`."""
    return per_slot.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))
