"""AdamW on stacked parameters, where a slot that is absent from a step does not move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw  # the kernel without the optimiser, on views of some slots

from foretune.adapters.lora import index_of
from foretune.errors import UserError


def make_adamw(
    params: Sequence[Tensor] | list[dict[str, Any]], lr: float, weight_decay: float, kind: str
) -> torch.optim.Optimizer:
    """AdamW on plain parameters of any shapes.

    Args:
        params: The parameters, or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        kind: "adamw" (torch's fused kernel) or "adamw-8bit" (Dettmers et al. 2022,
            arXiv:2110.02861; tensors of fewer than 4,096 elements keep a 32-bit state).

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(
            "optimizer adamw-8bit needs bitsandbytes: pip install 'foretune[quant]', or choose "
            "optimizer adamw"
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(params, lr=lr, weight_decay=weight_decay)
    return optimizer


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser is bitsandbytes' 8-bit AdamW."""
    return type(optimizer).__module__.startswith("bitsandbytes")


class SlotAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with a separate state per slot.

    Every parameter has shape (slots, …). A slot that is absent from a step keeps its value, its
    moments and its step count: no weight decay, no momentum, exactly as if it had its own
    optimiser. A plain AdamW on the stacked tensor would move it. The arithmetic is torch's fused
    kernel, on views of the slots that are present.

    Args:
        params: Stacked parameters, or groups of them; parameters of one group move together.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "wd": weight_decay})

    @torch.no_grad()
    def step_slots(
        self,
        present: Sequence[int],
        *,
        grad_scale: float = 1.0,
        max_norm: float | None = None,
        rates: Sequence[float] | None = None,
    ) -> None:
        """One update of the slots that are present; clears their gradients.

        Args:
            present: Distinct slots, ascending.
            grad_scale: The gradients are multiplied by it first.
            max_norm: Each slot's gradient, over all parameters, is clipped to this norm.
            rates: The learning rate of every slot; None for that of the parameter groups.
        """
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        if max_norm is not None and params:
            _clip(params, present, max_norm / grad_scale)
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for slots in self._runs(moved, present, rates):
                lr = group["lr"] if rates is None else rates[slots.start]
                self._step_run(moved, slots, {**group, "lr": lr}, grad_scale)
        for p in params:
            if len(present) == len(p):
                p.grad = None
            else:
                assert p.grad is not None
                p.grad[index_of(present)] = 0

    def forget(self, slots: Sequence[int]) -> None:
        """Resets the step counts and moments of these slots."""
        for state in self.state.values():
            for value in state.values():
                value[list(slots)] = 0

    def _runs(
        self, params: Sequence[Tensor], present: Sequence[int], rates: Sequence[float] | None
    ) -> Iterator[slice]:
        """Slices of neighbours with equal step counts and rates; the kernel updates their views."""
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros(len(p)),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        steps = self.state[params[0]]["step"].tolist()
        start = 0
        for i in range(1, len(present) + 1):
            ends = i == len(present)
            if (
                ends
                or present[i] != present[i - 1] + 1
                or steps[present[i]] != steps[present[start]]
                or (rates is not None and rates[present[i]] != rates[present[start]])
            ):
                yield slice(present[start], present[i - 1] + 1)
                start = i

    def _step_run(
        self, params: Sequence[Tensor], slots: slice, group: dict[str, Any], grad_scale: float
    ) -> None:
        states = [self.state[p] for p in params]
        # The kernel adds one to each of these and divides the gradients by grad_scale.
        counts = [state["step"][slots][:1].clone()[0].to(params[0].device) for state in states]
        scale = torch.tensor(1 / grad_scale, device=params[0].device)  # float32, says the kernel
        adamw(
            [p[slots] for p in params],
            [p.grad[slots] for p in params if p.grad is not None],
            [state["exp_avg"][slots] for state in states],
            [state["exp_avg_sq"][slots] for state in states],
            [],
            counts,
            fused=True,
            grad_scale=None if grad_scale == 1.0 else scale,
            found_inf=None if grad_scale == 1.0 else torch.zeros_like(scale),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["wd"],
            eps=group["eps"],
            maximize=False,
        )
        for state in states:
            state["step"][slots] += 1


def _clip(params: Sequence[Tensor], present: Sequence[int], max_norm: float) -> None:
    """Clips each slot's gradient, over all parameters, to the norm `max_norm`."""
    index = index_of(present)
    grads = [p.grad[index] for p in params if p.grad is not None]
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads]).square().sum(0).sqrt()
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    if bool((factors < 1).any()):
        for p, grad in zip(params, grads, strict=True):
            assert p.grad is not None
            grad *= factors.to(grad).view(-1, *[1] * (grad.dim() - 1))
            if not isinstance(index, slice):  # then grad is a copy, else a view
                p.grad[index] = grad
