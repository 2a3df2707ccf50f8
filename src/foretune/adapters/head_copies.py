"""`HeadCopies`: the stacked copies of a head module, one copy per slot.

A head whose weights all belong to linear layers and layer norms is run once on the rows of all
slots, each of these layers as one batched product (`head_products.py`). Any other head, and one
that fails the check of mixed batches that way, is called slot by slot.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Conv1D

from foretune.adapters.head_products import Blocks, of_slots, stacked_layer_norm, stacked_linear
from foretune.adapters.layers import in_use, spread
from foretune.adapters.lora import Layout, by_rows
from foretune.errors import UserError
from foretune.models.calls import forward_of, replaced_forward
from foretune.models.layout import RowSlots
from foretune.models.nested import Path, tensors_in, with_tensors
from foretune.models.quantised import quantised_layers
from foretune.models.routing import rows_for_adapters
from foretune.models.row_dims import RowDims
from foretune.models.row_dropout import draws_of_parts
from foretune.models.surgery import batch_norms

_LOCK = threading.RLock()  # a call exchanges the module's parameters or its layers' forwards


class HeadCopies(nn.Module):
    """One copy of a module per slot, for the rows of its slot.

    Attributes:
        inner: Name in the module → the rows in the input, of each layer that is computed for the
            rows of all slots at once; empty where the module is called slot by slot.
    """

    def __init__(self, name: str, module: nn.Module, num_slots: int) -> None:
        super().__init__()
        if quantised_layers(module):
            raise UserError(
                f"{name} is quantised, so tasks cannot have copies of it to train: use method lora "
                "without modules_to_save, or load the base without quantize"
            )
        self.rows = RowDims(name)
        self.inner = {
            path: RowDims(f"{name}.{path}".rstrip(".")) for path in _stackable_layers(module)
        }
        self.stacked = nn.ParameterDict(
            {
                escaped(name): nn.Parameter(p.detach().expand(num_slots, *p.shape).clone())
                for name, p in module.named_parameters()
            }
        )
        self._running = False

    @property
    def row_dims(self) -> list[RowDims]:
        """The rows in the input of the module, and in those of its layers."""
        return [self.rows, *self.inner.values()]

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
    def stand_in(
        self, module: nn.Module, generator: torch.Generator, strength: float
    ) -> HeadCopies:
        """Copies of two slots, randomly changed by about this share of their size."""
        pair = HeadCopies(self.rows.name, module, 2)
        pair.inner = {path: RowDims(dims.name) for path, dims in self.inner.items()}
        for name, p in pair.stacked.items():
            p.data = p.data.to(self.stacked[name])
            drawn = torch.randn(p.shape, generator=generator) * spread(p) * strength
            p += drawn.to(p)
        for dims in pair.row_dims:
            dims.calls = []
        return pair

    def forward_of(self, module: nn.Module) -> Callable[..., Tensor]:
        """The forward that replaces the module's own."""
        plain = forward_of(module)
        if set(self.inner) != set(_stackable_layers(module)):  # a layer has got a forward since
            self.inner = {}

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            rows = rows_for_adapters()
            with _LOCK:
                if rows is None or self._running:
                    return plain(module, *args, **kwargs)
                self._running = True
                try:
                    return in_use(self)._adapted(module, plain, rows, args, kwargs)
                finally:
                    self._running = False

        return forward

    def _adapted(
        self,
        module: nn.Module,
        plain: Callable[..., Tensor],
        rows: RowSlots,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        """The output of the module for rows of one slot or several."""
        first = next(iter(tensors_in((args, kwargs)).values()))
        dim = self.rows.of(first.shape, rows)
        if len(rows.present) == 1:
            (params,) = self._copies(rows)
            with self._stacked_layers(module, rows):
                y: Tensor = torch.func.functional_call(module, params, args, kwargs)
            return y
        if not self.inner:
            return self._per_slot(module, rows, dim, args, kwargs)
        with self._stacked_layers(module, rows):
            # A module that is such a layer itself has another forward inside the block.
            return (forward_of(module) if "" in self.inner else plain)(module, *args, **kwargs)

    @contextlib.contextmanager
    def _stacked_layers(self, module: nn.Module, rows: RowSlots) -> Iterator[None]:
        """Inside the block, layers of the module compute the rows of several slots at once."""
        blocks: dict[int, Blocks] = {}
        with contextlib.ExitStack() as stack:
            for path in self.inner:
                layer = module.get_submodule(path)
                forward = self._stacked_forward(path, layer, rows, blocks)
                stack.enter_context(replaced_forward(layer, forward))
            yield

    def _stacked_forward(
        self, path: str, layer: nn.Module, rows: RowSlots, blocks: dict[int, Blocks]
    ) -> Callable[..., Tensor]:
        plain = forward_of(layer)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            (x,) = (*args, *kwargs.values())
            dim = self.inner[path].of(x.shape, rows)
            if len(rows.present) == 1:
                return plain(layer, x)
            x = x.movedim(dim, 0)
            vectors = x.reshape(-1, x.shape[-1])
            if len(vectors) not in blocks:
                blocks[len(vectors)] = Blocks.of(rows, len(vectors), x.device)
            y = self._layer_output(path, layer, vectors, blocks[len(vectors)])
            return y.view(*x.shape[:-1], -1).movedim(0, dim)

        return forward

    def _layer_output(self, path: str, layer: nn.Module, x: Tensor, blocks: Blocks) -> Tensor:
        """(n, out) output of a layer for x (n, in), each vector by the layer of its slot."""

        def of_present(name: str) -> Tensor | None:
            if getattr(layer, name) is None:
                return None
            return of_slots(self.stacked[escaped(f"{path}.{name}".lstrip("."))], blocks.slots)

        weight, bias = of_present("weight"), of_present("bias")
        assert weight is not None
        if isinstance(layer, nn.LayerNorm):
            return stacked_layer_norm(x, weight, bias, layer.eps, blocks)
        return stacked_linear(x, weight.mT if isinstance(layer, Conv1D) else weight, bias, blocks)

    def _per_slot(
        self, module: nn.Module, rows: RowSlots, dim: int, args: Any, kwargs: Any
    ) -> Tensor:
        first = next(iter(tensors_in((args, kwargs)).values()))
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
        for i, (params, index) in enumerate(
            zip(self._copies(rows), rows.places.values(), strict=True)
        ):

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
        unbound = {
            unescaped(name): of_slots(p, rows.present).unbind() for name, p in self.stacked.items()
        }
        return [{k: v[i] for k, v in unbound.items()} for i in range(len(rows.present))]


def _stackable_layers(module: nn.Module) -> list[str]:
    """Names of the layers that hold all weights of a module, where a stacked form of each is known.

    Empty where a weight belongs to anything else, is shared between layers, or where the module
    has batch norms, which mix rows.
    """
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if any(True for _ in layer.parameters(recurse=False))
    }
    owned = [
        f"{path}.{name}".lstrip(".")
        for path, layer in layers.items()
        for name, _ in layer.named_parameters(recurse=False)
    ]
    all_stackable = all(_has_stacked_form(layer) for layer in layers.values())
    distinct = owned == [name for name, _ in module.named_parameters()]
    return list(layers) if all_stackable and distinct and not batch_norms(module) else []


def _has_stacked_form(layer: nn.Module) -> bool:
    forward = forward_of(layer)
    if forward is nn.LayerNorm.forward:
        return isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1
    return forward in (nn.Linear.forward, Conv1D.forward)


def _sorted(x: Tensor, order: Tensor | None, dim: int, num_rows: int) -> Tensor:
    """Permutes the rows of x, which lie along `dim`; None leaves them in place."""
    return x if order is None else by_rows(x.movedim(dim, 0), order, num_rows).movedim(0, dim)


def escaped(name: str) -> str:
    """A module name as a key of nn.ModuleDict, which allows no dots."""
    return name.replace(".", "/")


def unescaped(key: str) -> str:
    """The module name of an escaped key."""
    return key.replace("/", ".")
