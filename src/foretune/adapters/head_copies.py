"""`HeadCopies`: the stacked copies of a head module, one copy per slot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.adapters.layers import in_use, spread
from foretune.adapters.lora import Layout, by_rows
from foretune.models.calls import forward_of
from foretune.models.layout import RowSlots
from foretune.models.nested import Path, tensors_in, with_tensors
from foretune.models.routing import rows_for_adapters
from foretune.models.row_dims import RowDims
from foretune.models.row_dropout import draws_of_parts

_LOCK = threading.RLock()  # a call exchanges the module's parameters for those of a slot


class HeadCopies(nn.Module):
    """One copy of a module per slot, called on the rows of its slot."""

    def __init__(self, name: str, module: nn.Module, num_slots: int) -> None:
        super().__init__()
        self.rows = RowDims(name)
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

    @torch.no_grad()
    def add_penalty(
        self, index: slice | list[int], weight: float, centre: Mapping[str, Tensor]
    ) -> None:
        """Adds the gradient of weight · ‖w − c‖² over the slots' weight matrices, not their biases.

        Args:
            index: The slots.
            weight: λ.
            centre: c, by name in the module; zero where there is none.
        """
        for name, p in self.stacked.items():
            if p.dim() > 2 and p.grad is not None:
                p.grad[index] += 2 * weight * (p[index] - centre.get(unescaped(name), 0))

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """The mean of each parameter over all slots, by its name in the module."""
        return {unescaped(name): p.mean(0) for name, p in self.stacked.items()}

    @torch.no_grad()
    def stand_in(self, module: nn.Module, generator: torch.Generator) -> HeadCopies:
        """Copies of two slots, randomly changed by about half of their size."""
        pair = HeadCopies(self.rows.name, module, 2)
        for name, p in pair.stacked.items():
            p.data = p.data.to(self.stacked[name])
            drawn = torch.randn(p.shape, generator=generator) * spread(p) / 2
            p += drawn.to(p)
        pair.rows.calls = []
        return pair

    def forward_of(self, module: nn.Module) -> Callable[..., Tensor]:
        """The forward that replaces the module's own."""
        plain = forward_of(module)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            rows = rows_for_adapters()
            if rows is None:
                return plain(module, *args, **kwargs)
            with _LOCK:
                if self._running:
                    return plain(module, *args, **kwargs)
                self._running = True
                try:
                    return in_use(self)._per_slot(module, rows, args, kwargs)
                finally:
                    self._running = False

        return forward

    def _per_slot(self, module: nn.Module, rows: RowSlots, args: Any, kwargs: Any) -> Tensor:
        first = next(iter(tensors_in((args, kwargs)).values()))
        dim = self.rows.of(first.shape, rows)
        copies = self._copies(rows)
        if len(copies) == 1:
            y: Tensor = torch.func.functional_call(module, copies[0], args, kwargs)
            return y
        if rows.tokens is not None and first.shape[0] == 1:
            dim = 1
        size = first.shape[dim]
        counts = Layout.of(rows, size, 0).counts

        def parts(x: Tensor) -> list[Tensor]:
            if x.dim() <= dim or x.shape[dim] != size:
                return [x] * len(counts)
            return list(_sorted(x, rows.order, dim, len(rows.slots)).split(counts, dim))

        split = {path: parts(x) for path, x in tensors_in((args, kwargs)).items()}
        outputs, part_of = [], draws_of_parts()
        for i, (params, index) in enumerate(zip(copies, rows.places.values(), strict=True)):

            def part(path: Path, _: Tensor, i: int = i) -> Tensor:
                return split[path][i]

            inputs = with_tensors((args, kwargs), part)
            with part_of(index):
                outputs.append(torch.func.functional_call(module, params, *inputs))
        return _sorted(torch.cat(outputs, dim), rows.inverse, dim, len(rows.slots))

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


def _sorted(x: Tensor, order: Tensor | None, dim: int, num_rows: int) -> Tensor:
    """Permutes the rows of x, which lie along `dim`; None leaves them in place."""
    return x if order is None else by_rows(x.movedim(dim, 0), order, num_rows).movedim(0, dim)


def escaped(name: str) -> str:
    """A module name as a key of nn.ModuleDict, which allows no dots."""
    return name.replace(".", "/")


def unescaped(key: str) -> str:
    """The module name of an escaped key."""
    return key.replace("/", ".")
