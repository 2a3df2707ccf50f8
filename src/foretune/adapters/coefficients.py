"""`Coefficients`: the parameters of a bank as a linear function of few coefficients per slot.

    θ_t = μ + Σ_k z_tk P_k + σ ε_t

    symbol   here         shape         meaning
    θ_t      bank slot t  (…)           adapter of task t
    μ        mean         (…)           what all slots have in common
    P_k      directions   (k, …)        directions that all slots share
    z_t      z            (slots, k)    coefficients of task t
    σ        scales       ()            scale of the free directions, one per parameter
    ε_t      free         (slots, …)    free directions of task t

The bank and its forward passes know nothing of it: after a backward pass `pull_back` turns the
gradients of the bank's parameters into those of z and ε by the chain rule, and of μ and P where
they are learnt; after a step `write` puts θ into the bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from foretune.adapters.bank import AdapterBank
from foretune.adapters.lora import index_of


class Coefficients(nn.Module):
    """Coefficients z and ε of every slot of a bank.

    They are zero at first, but for ε of a parameter without mean, which begins at its value.

    Args:
        bank: The bank; its parameters that are not named here stay as they are.
        mean: μ by the bank's parameter names; a parameter that is absent has mean zero.
        directions: P, for the same names; the same k for all.
        scales: σ of the parameters that have free directions.
        learn_shared: Whether `mean` and `directions` are trained too.
    """

    def __init__(
        self,
        bank: AdapterBank,
        mean: Mapping[str, Tensor],
        directions: Mapping[str, Tensor],
        *,
        scales: Mapping[str, float] | None = None,
        learn_shared: bool = False,
    ) -> None:
        super().__init__()
        self.bank = bank
        self.scales = dict(scales or {})
        parameters = dict(bank.named_parameters())
        self.names = [name for name in parameters if name in {*mean, *directions, *self.scales}]
        rank = max((len(d) for d in directions.values()), default=0)
        like = next(bank.parameters())
        self.z = nn.Parameter(like.new_zeros(len(bank.keys), rank))
        self.mean, self.directions, self.free = (_Named() for _ in range(3))
        for name in self.names:
            p = parameters[name]
            if name in mean:
                self.mean.add(name, mean[name].to(p).clone(), learn_shared)
            if name in directions:
                self.directions.add(name, directions[name].to(p).clone(), learn_shared)
            if name in self.scales:
                start = torch.zeros_like(p) if name in mean else p.detach() / self.scales[name]
                self.free.add(name, start, True)

    @property
    def per_slot(self) -> list[nn.Parameter]:
        """What each slot has of its own: z (slots, k) and ε (slots, …)."""
        return [*([self.z] if self.z.shape[1] else []), *self.free.parameters()]

    @property
    def shared(self) -> list[nn.Parameter]:
        """μ (…) and P (k, …)."""
        return [*self.mean.parameters(), *self.directions.parameters()]

    @property
    def parameters_per_slot(self) -> int:
        """Number of coefficients of one task."""
        return sum(p[0].numel() for p in self.per_slot)

    @torch.no_grad()
    def pull_back(self, slots: Sequence[int]) -> None:
        """Adds the gradients of z, ε and what is learnt to `.grad`, from those of the bank.

        Those of the bank are cleared.

        Args:
            slots: The slots that were in the step, in ascending order.
        """
        if not slots:
            return
        index = index_of(slots)
        parameters = dict(self.bank.named_parameters())
        z, z_grad = self.z[index], torch.zeros_like(self.z[index])
        for name in self.names:
            grad = parameters[name].grad
            if grad is None:
                continue
            grad = grad[index].flatten(1)  # (slots in the step, numbers)
            mean, directions = self.mean.get(name), self.directions.get(name)
            if directions is not None:
                z_grad += grad @ directions.flatten(1).T
                if directions.requires_grad:
                    _accumulate(directions, (z.T @ grad).view_as(directions))
            if mean is not None and mean.requires_grad:
                _accumulate(mean, grad.sum(0).view_as(mean))
            free = self.free.get(name)
            if free is not None:
                _accumulate_slots(free, index, self.scales[name] * grad)
        _accumulate_slots(self.z, index, z_grad)
        for p in self.bank.parameters():
            if p.grad is not None:
                if len(slots) == len(p):
                    p.grad = None
                else:
                    p.grad[index] = 0

    @torch.no_grad()
    def write(self, slots: Sequence[int]) -> None:
        """Puts θ of these slots, which are in ascending order, into the bank."""
        if not slots:
            return
        index = index_of(slots)
        parameters = dict(self.bank.named_parameters())
        z = self.z[index]
        for name in self.names:
            p = parameters[name]
            value = torch.zeros_like(p[index])
            mean, directions, free = (
                part.get(name) for part in (self.mean, self.directions, self.free)
            )
            if mean is not None:
                value += mean
            if directions is not None:
                value += (z @ directions.flatten(1)).view_as(value)
            if free is not None:
                value += self.scales[name] * free[index]
            p[index] = value


class _Named(nn.Module):
    """Parameters by names that hold dots."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList()
        self.places: dict[str, int] = {}

    def add(self, name: str, value: Tensor, requires_grad: bool) -> None:
        """Adds a parameter."""
        self.places[name] = len(self.places)
        self.values.append(nn.Parameter(value, requires_grad=requires_grad))

    def get(self, name: str) -> nn.Parameter | None:
        """The parameter of this name; None where there is none."""
        place = self.places.get(name)
        return None if place is None else self.values[place]


def _accumulate(p: nn.Parameter, grad: Tensor) -> None:
    """Adds a gradient to `.grad`."""
    p.grad = grad if p.grad is None else p.grad + grad


def _accumulate_slots(p: nn.Parameter, index: slice | list[int], grad: Tensor) -> None:
    """Adds the gradient of some slots to `.grad` of a stacked parameter."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    p.grad[index] += grad.view_as(p.grad[index])
