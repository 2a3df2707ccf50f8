"""The stacked adapters of one module: low-rank factors or sparse changes, one per slot."""

from __future__ import annotations

import contextlib
import contextvars
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Conv1D
from typing_extensions import override

from foretune.adapters.config import lora_scale
from foretune.adapters.entries import smallest_entries
from foretune.adapters.lora import lora_conv1d, lora_linear
from foretune.adapters.sparse_slots import sparse_linear
from foretune.errors import UserError
from foretune.models.calls import forward_of
from foretune.models.layout import RowSlots
from foretune.models.quantised import dense_weight, is_quantised, linear_shape
from foretune.models.routing import rows_for_adapters
from foretune.models.row_dims import RowDims

Part = TypeVar("Part", bound=nn.Module)
_STAND_INS: contextvars.ContextVar[Mapping[nn.Module, nn.Module] | None] = contextvars.ContextVar(
    "foretune_stand_ins", default=None
)


@contextlib.contextmanager
def replaced_by(stand_ins: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Inside the block, in this thread, adapted modules use these adapters instead of their own."""
    token = _STAND_INS.set(stand_ins)
    try:
        yield
    finally:
        _STAND_INS.reset(token)


def in_use(part: Part) -> Part:
    """What stands in for these adapters at present; themselves as a rule."""
    stand_ins = _STAND_INS.get()
    return part if stand_ins is None else stand_ins.get(part, part)  # type: ignore[return-value]


class _AdaptedLayer(nn.Module):
    """What the kinds of adapters have in common: their call."""

    rows: RowDims
    off: bool

    @property
    def row_dims(self) -> list[RowDims]:
        """The rows in the input of the layer."""
        return [self.rows]

    def forward_of(self, module: nn.Module) -> Callable[..., Tensor]:
        """The forward that replaces the module's own."""
        plain = forward_of(module)
        only_multiplies = plain in (nn.Linear.forward, Conv1D.forward)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            rows = rows_for_adapters()
            x = args[0] if args else next(iter(kwargs.values()))  # named `input` or otherwise
            if rows is None or self.off or not x.numel():
                return plain(module, *args, **kwargs)
            layer = in_use(self)
            dim = layer.rows.of(x.shape, rows)
            if only_multiplies:
                if not dim:
                    return layer.adapted(x, module, rows)
                return layer.adapted(x.movedim(dim, 0), module, rows).movedim(0, dim)
            y = plain(module, *args, **kwargs)
            change = layer.change(x.movedim(dim, 0), module, rows).movedim(0, dim)
            if not isinstance(y, Tensor) or y.shape != change.shape:
                raise UserError(
                    f"{self.rows.name} ({type(module).__name__}) returns something else than a "
                    f"{type(module).__bases__[0].__name__} does, so it cannot carry an adapter: "
                    "leave it out with exclude_modules"
                )
            return y + change.to(y.dtype)

        return forward

    def adapted(self, x: Tensor, module: nn.Module, rows: RowSlots) -> Tensor:
        """The output (n, …, out) of an adapted linear layer for x (n, …, in)."""
        raise NotImplementedError

    def change(self, x: Tensor, module: nn.Module, rows: RowSlots) -> Tensor:
        """What the adapters add to the module's own output, of its shape; x is (n, …, in)."""
        raise NotImplementedError


class LoRALayer(_AdaptedLayer):
    """The stacked factors of one adapted module: nn.Linear, transformers' Conv1D or nn.Conv1d."""

    def __init__(
        self, name: str, module: nn.Module, num_slots: int, lora: Mapping[str, Any]
    ) -> None:
        super().__init__()
        weight: Any = module.weight
        r = int(lora.get("r", 8))
        self.rows = RowDims(name)
        self.is_conv = isinstance(module, nn.Conv1d)
        self.transposed = not self.is_conv and not isinstance(module, nn.Linear)  # HF's Conv1D
        self.lora = lora
        self.scale = lora_scale(lora)
        self.dropout = float(lora.get("lora_dropout", 0.0))
        self._touched = False
        self.off = False
        if self.is_conv:
            out_features, in_features, kernel = weight.shape
            self.a = _zeros(weight, num_slots, r, in_features, kernel)
            self.b = _zeros(weight, num_slots, out_features, r)
        else:
            out_features, in_features = weight.T.shape if self.transposed else linear_shape(module)
            self.a = _zeros(weight, num_slots, r, in_features)
            self.b = _zeros(weight, num_slots, r, out_features)

    @torch.no_grad()
    def reset(self, slots: Sequence[int] | range, rngs: Sequence[np.random.Generator]) -> None:
        """Initialises A uniformly as PEFT does, kaiming_uniform(a=√5) over its inputs; B zero."""
        bound = self.a[0][0].numel() ** -0.5
        shape = tuple(self.a.shape[1:])
        in_place = self.a.device.type == "cpu" and self.a.dtype == torch.float32
        values = self.a.detach().numpy() if in_place else None
        for slot, rng in zip(slots, rngs, strict=True):
            fresh = np.empty(shape, np.float32) if values is None else values[slot]
            rng.random(dtype=np.float32, out=fresh)
            fresh *= 2 * bound
            fresh -= bound
            if values is None:
                self.a[slot] = torch.from_numpy(fresh)
            if self._touched:
                self.b[slot].zero_()
        self._touched = True

    @torch.no_grad()
    def stand_in(self, module: nn.Module, generator: torch.Generator, strength: float) -> LoRALayer:
        """Random adapters of two slots that change the module by this share of its weight."""
        pair = LoRALayer(self.rows.name, module, 2, self.lora).to(self.a.device, self.a.dtype)
        change = spread(dense_weight(module)) * strength
        size = (change / (self.scale * math.sqrt(self.a.shape[1]))) ** 0.5
        for p in pair.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * size)
        pair.rows.calls = []
        return pair

    @override
    def adapted(self, x: Tensor, module: nn.Module, rows: RowSlots) -> Tensor:
        """(rows, …, out) output of the layer for x (rows, …, in)."""
        weight: Any = module.weight.T if self.transposed else module.weight
        return self._linear(x, weight, module.bias, module.training, rows)

    @override
    def change(self, x: Tensor, module: nn.Module, rows: RowSlots) -> Tensor:
        """(rows, …, out) the adapters' part for x (rows, …, in); (rows, out, length) of a conv."""
        if not self.is_conv:
            return self._linear(x, None, None, module.training, rows)
        channels_last = getattr(module, "channels_last", False)
        x = x.mT if channels_last else x
        dropout = self.dropout if module.training else 0.0
        change = lora_conv1d(x, module, self.a, self.b, self.scale, rows, dropout)  # type: ignore[arg-type]
        return change.mT if channels_last else change

    def _linear(self, x: Tensor, weight: Any, bias: Any, training: bool, rows: RowSlots) -> Tensor:
        dropout = self.dropout if training else 0.0
        return lora_linear(x, weight, bias, self.a, self.b, self.scale, rows, dropout)

    @torch.no_grad()
    def add_penalty(
        self, index: slice | list[int], weight: float, centre: Tensor | None = None
    ) -> None:
        """Adds the gradient of weight · ‖s·B A − C‖² in A and B, for each of these slots.

        2 s² (BᵀB A, B A Aᵀ) − 2 s (Bᵀ C, C Aᵀ): of the slots' own, only products of rank × rank.

        Args:
            index: The slots.
            weight: λ.
            centre: C (out, in), or (out, in · k) of a convolution; None for zero.
        """
        if self.a.grad is None or self.b.grad is None:
            return
        a, b = self.a[index].flatten(2), self.b[index]
        b = b.mT if self.is_conv else b  # (slots, r, out)
        grad_a, grad_b = self.scale * (b @ b.mT) @ a, self.scale * (a @ a.mT) @ b
        if centre is not None:
            grad_a -= b @ centre
            grad_b -= a @ centre.T
        factor = 2 * weight * self.scale
        self.a.grad[index] += factor * grad_a.view_as(self.a[index])
        self.b.grad[index] += factor * (grad_b.mT if self.is_conv else grad_b)

    @torch.no_grad()
    def mean(self, slots: slice | list[int] = slice(None)) -> Tensor:
        """(out, in), or (out, in · k) of a convolution: the mean over slots of s·B A."""
        a, b = self.a[slots].flatten(2), self.b[slots]
        b = b.mT if self.is_conv else b
        return b.flatten(0, 1).T @ a.flatten(0, 1) * (self.scale / len(a))

    def mean_delta(self, slots: list[int]) -> Tensor:
        """Mean over slots of s·B A, in the shape of the module's weight."""
        mean = self.mean(slots)
        if self.is_conv:
            return mean.unflatten(1, self.a.shape[2:])
        return mean.T if self.transposed else mean


class SparseLayer(_AdaptedLayer):
    """The stacked sparse changes of one nn.Linear or transformers' Conv1D."""

    def __init__(self, name: str, module: nn.Module, num_slots: int, positions: Tensor) -> None:
        super().__init__()
        weight: Any = module.weight
        self.rows = RowDims(name)
        self.transposed = not isinstance(module, nn.Linear)
        self.off = False
        self.values = _zeros(weight, num_slots, len(positions))
        self.register_buffer("positions", positions)

    @torch.no_grad()
    def reset(self, slots: Sequence[int] | range, rngs: Sequence[np.random.Generator]) -> None:
        """Sets the changes of these slots to zero; nothing is drawn."""
        self.values[list(slots)] = 0

    @torch.no_grad()
    def stand_in(
        self, module: nn.Module, generator: torch.Generator, strength: float
    ) -> SparseLayer:
        """Random changes of two slots, of twice this share of the module's weight."""
        positions: Any = self.positions
        pair = SparseLayer(self.rows.name, module, 2, positions)
        pair.to(self.values.device, self.values.dtype)
        drawn = torch.randn(pair.values.shape, generator=generator)
        drawn *= 2 * strength * spread(dense_weight(module))
        pair.values.copy_(drawn)
        pair.rows.calls = []
        return pair

    @override
    def adapted(self, x: Tensor, module: nn.Module, rows: RowSlots) -> Tensor:
        """(rows, …, out) output of the layer for x (rows, …, in)."""
        weight: Any = module.weight.T if self.transposed else module.weight
        return sparse_linear(x, weight, module.bias, self.values, self.positions, rows)  # type: ignore[arg-type]

    @override
    def change(self, x: Tensor, module: nn.Module, rows: RowSlots) -> Tensor:
        """(rows, …, out) the adapters' part for x (rows, …, in)."""
        weight: Any = module.weight.T if self.transposed else module.weight
        nothing = torch.zeros_like(weight)
        return sparse_linear(x, nothing, None, self.values, self.positions, rows)  # type: ignore[arg-type]

    @torch.no_grad()
    def add_penalty(
        self, index: slice | list[int], weight: float, centre: Tensor | None = None
    ) -> None:
        """Adds the gradient of weight · ‖S − C‖², 2 (S − C); C (entries,) is zero for None."""
        if self.values.grad is not None:
            change = self.values[index] if centre is None else self.values[index] - centre
            self.values.grad[index] += 2 * weight * change

    @torch.no_grad()
    def mean(self) -> Tensor:
        """(entries,) the mean change over all slots."""
        return self.values.mean(0)


def stacked_layers(
    modules: Mapping[str, nn.Module], num_slots: int, lora: Mapping[str, Any], sparse: float | None
) -> Iterator[tuple[str, LoRALayer | SparseLayer]]:
    """(name, adapted layer) of each of these modules.

    Raises:
        UserError: A convolution would have a sparse change.
    """
    if sparse is None:
        for name, module in modules.items():
            yield name, LoRALayer(name, module, num_slots, lora)
        return
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv1d):
            raise UserError(
                f"{name} is a convolution, but sparse adapters change only linear layers: name "
                "the linear layers in lora target_modules, or use form lora"
            )
        if is_quantised(module):
            raise UserError(
                f"{name} is quantised, but sparse adapters change single entries of its weight: "
                "use form lora, or load the base without quantize"
            )
        weight: Any = module.weight
        weights[name] = weight if isinstance(module, nn.Linear) else weight.T
    for name, positions in smallest_entries(weights, sparse).items():
        yield name, SparseLayer(name, modules[name], num_slots, positions)


def spread(weight: Any) -> float:
    """Root mean square of a weight, and not zero where that is."""
    return max(float(weight.detach().float().square().mean()) ** 0.5, 1e-2)


def _zeros(like: Tensor, *shape: int) -> nn.Parameter:
    """float32 zeros on the device of `like`; on a CPU, large ones are a memory map.

    The system allocates its pages, which are large, on the first write: half of a bank for a
    thousand tasks is zero until it is trained.
    """
    size = 4 * math.prod(shape)
    if like.device.type != "cpu" or size < 2**20:
        return nn.Parameter(torch.zeros(shape, device=like.device))
    block = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return nn.Parameter(torch.frombuffer(block, dtype=torch.float32).view(shape))
