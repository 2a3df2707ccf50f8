"""`HeadCopies`: the stacked copies of a head module, one copy per slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.adapters.lora import by_rows, by_slot
from foretune.models.layout import RowSlots
from foretune.models.routing import current_rows
from foretune.models.row_dropout import draws_of_parts


class HeadCopies(nn.Module):
    """One copy of a module per slot, called on the rows of its slot."""

    def __init__(self, module: nn.Module, num_slots: int) -> None:
        super().__init__()
        self.stacked = nn.ParameterDict(
            {
                escaped(name): nn.Parameter(p.detach().expand(num_slots, *p.shape).clone())
                for name, p in module.named_parameters()
            }
        )
        self._running = False

    def reset(self, slot: int, module: nn.Module, fresh: bool, rng: np.random.Generator) -> None:
        """Initialises a slot randomly, or with the module's weights if not `fresh`."""
        for name, p in module.named_parameters():
            target = self.stacked[escaped(name)][slot]
            if not fresh:
                target.copy_(p)
            elif p.dim() > 1:
                drawn = rng.standard_normal(tuple(p.shape), dtype=np.float32) * 0.02
                target.copy_(torch.from_numpy(drawn))
            else:  # biases start at zero, the weights of norms at one
                target.fill_(1.0 if name.endswith("weight") else 0.0)

    def forward_of(self, module: nn.Module) -> Callable[..., Tensor]:
        """The forward that replaces the module's own."""
        plain = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            rows = current_rows()
            if rows is None or self._running:
                return plain(module, *args, **kwargs)
            self._running = True
            try:
                return self._per_slot(module, rows, args, kwargs)
            finally:
                self._running = False

        return forward

    def _per_slot(self, module: nn.Module, rows: RowSlots, args: Any, kwargs: Any) -> Tensor:
        num_rows = len(rows.slots)
        if rows.order is not None:
            args, kwargs = _map((args, kwargs), lambda t: by_rows(t, rows.order, num_rows))  # type: ignore[arg-type]
        outputs, part_of = [], draws_of_parts()
        order = torch.arange(num_rows) if rows.order is None else rows.order
        for i, params in enumerate(self._copies(rows)):

            def slot_rows(t: Tensor, i: int = i) -> Tensor:
                return by_slot(t, rows)[i]

            inputs = _map((args, kwargs), slot_rows)
            _, start, end = rows.segments[i]
            with part_of(order[start:end]):
                outputs.append(torch.func.functional_call(module, params, *inputs))
        y = torch.cat(outputs, 0 if rows.tokens is None else 1)
        return y if rows.inverse is None else by_rows(y, rows.inverse, num_rows)

    def _copies(self, rows: RowSlots) -> list[dict[str, Tensor]]:
        """The parameters of each slot that is present, by name.

        Selected and unbound once: indexing slot by slot would give each slot a gradient of the size
        of the whole stack.
        """
        num_slots = len(next(iter(self.stacked.values())))
        complete = rows.present == tuple(range(num_slots))
        index = slice(None) if complete else torch.tensor(rows.present)
        unbound = {unescaped(name): p[index].unbind() for name, p in self.stacked.items()}
        return [{k: v[i] for k, v in unbound.items()} for i in range(len(rows.present))]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested tuples and dicts with `change` applied to their tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return value


def escaped(name: str) -> str:
    """A module name as a key of nn.ModuleDict, which allows no dots."""
    return name.replace(".", "/")


def unescaped(key: str) -> str:
    """The module name of an escaped key."""
    return key.replace("/", ".")
