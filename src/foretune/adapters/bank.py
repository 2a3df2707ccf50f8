"""`AdapterBank`: the stacked adapters of many tasks on one model, one adapter per task.

The bank does not change the model's module tree and parameter names: while it is attached, the
`forward` of each adapted module asks `foretune.models.routing` which slot owns each row and adds
that slot's adapter. So a batch that mixes tasks takes one forward and one backward, and the base is
saved without unwrapping.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.adapters.config import lora_scale
from foretune.adapters.entries import smallest_entries
from foretune.adapters.head_copies import HeadCopies, escaped, unescaped
from foretune.adapters.lora import index_of, lora_conv1d, lora_linear
from foretune.adapters.sparse_slots import sparse_linear
from foretune.adapters.targets import copied_modules, matching_modules
from foretune.errors import UserError
from foretune.models.routing import current_rows


class AdapterBank(nn.Module):
    """One adapter, LoRA or sparse, and one copy of the head modules per slot.

    Args:
        model: The base. Its own parameters are neither copied nor owned by the bank.
        keys: One name per slot; a slot's initial values depend only on the seed and its key, not
            on the other slots.
        lora: Fields of a `peft.LoraConfig`; None for a bank of heads only.
            `target_modules=None` adapts every trainable linear layer of the model.
        sparse: None for LoRA adapters. Otherwise each slot has a sparse change at this share of
            the adapted layers' entries, those that are smallest in the model as it is now, the
            same for all slots; `lora` then only selects the layers.
        heads: Names of modules of which each slot has a full copy (PEFT's `modules_to_save`).
        fresh_heads: Whether the copies of `heads` are initialised randomly; False copies the base's
            weights, from which the `modules_to_save` of `lora` always start.
        seed: Random seed of the initial values.

    Raises:
        UserError: `target_modules`, `modules_to_save` or `heads` match nothing, or a layer that
            would have a sparse change is a convolution.
    """

    def __init__(
        self,
        model: nn.Module,
        keys: Sequence[str],
        *,
        lora: Mapping[str, Any] | None = None,
        sparse: float | None = None,
        heads: Sequence[str] = (),
        fresh_heads: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.keys = tuple(keys)
        self.lora = None if lora is None else dict(lora)
        saved = copied_modules(model, heads, (lora or {}).get("modules_to_save") or ())
        self.head_names = (*heads, *saved)
        self._fresh = frozenset(heads if fresh_heads else ())
        self._seed = seed
        modules = dict(model.named_modules())
        self.layers = nn.ModuleDict()
        if self.lora is not None:
            targets = {n: modules[n] for n in matching_modules(model, self.lora, self.head_names)}
            for name, layer in _layers(targets, len(self.keys), self.lora, sparse):
                self.layers[escaped(name)] = layer
        self.heads = nn.ModuleDict(
            {escaped(name): HeadCopies(modules[name], len(self.keys)) for name in self.head_names}
        )
        self._modules_of = {n: modules[n] for n in [*self.layer_names, *self.head_names]}
        self.reset(range(len(self.keys)), seed)

    @property
    def layer_names(self) -> list[str]:
        """Full names of the modules that carry an adapter."""
        return [unescaped(name) for name in self.layers]

    @property
    def adapted_names(self) -> list[str]:
        """Full names of all modules that the bank changes."""
        return [*self.layer_names, *self.head_names]

    @property
    def parameters_per_slot(self) -> int:
        """Number of trainable parameters of one task's adapter and head."""
        return sum(p[0].numel() for p in self.parameters())

    @torch.no_grad()
    def reset(self, slots: Sequence[int] | range, seed: int | None = None) -> None:
        """Re-initialises these slots: A uniform as in PEFT, B zero, sparse changes zero; heads."""
        seed = self._seed if seed is None else seed
        # SFC64 for speed: a bank for a thousand tasks takes half a billion draws.
        rngs = [np.random.Generator(np.random.SFC64(_seed_of(seed, self.keys[s]))) for s in slots]
        for name in self.layer_names:
            self._layer(name).reset(slots, rngs)
        for name in self.head_names:
            for slot, rng in zip(slots, rngs, strict=True):
                self._head(name).reset(slot, self._modules_of[name], name in self._fresh, rng)

    @contextlib.contextmanager
    def attached(self) -> Iterator[AdapterBank]:
        """Inside the block, the model's forward passes under `route` go through the bank.

        Raises:
            RuntimeError: Another bank is attached to one of the modules.
        """
        patched: list[nn.Module] = []
        # torch's fused encoder layer reads its linear layers' weights instead of calling them.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for name, module in self._modules_of.items():
                if "forward" in vars(module):
                    raise RuntimeError(f"another bank is attached to {name}")
                owner = self._head(name) if name in self.head_names else self._layer(name)
                module.forward = owner.forward_of(module)
                patched.append(module)
            yield self
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module in patched:
                del module.forward

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """Inside the block no adapter is added; each slot still has its own heads."""
        layers = [self._layer(name) for name in self.layer_names]
        try:
            for layer in layers:
                layer.off = True
            yield
        finally:
            for layer in layers:
                layer.off = False

    def add_penalty(self, slots: Sequence[int], weight: float) -> None:
        """Adds the gradient of weight · Σ ‖s·B A‖²_F over these slots and all layers to `.grad`.

        For sparse changes it is the gradient of weight · Σ ‖S‖²_F.

        Args:
            slots: The slots, in ascending order.
            weight: λ.
        """
        for name in self.layer_names:
            self._layer(name).add_penalty(index_of(slots), weight)

    def onto(self, model: nn.Module) -> None:
        """Adapts this model from now on, which has modules of the same names."""
        modules = dict(model.named_modules())
        self._modules_of = {name: modules[name] for name in self._modules_of}

    def mean_delta(self, name: str, slots: Sequence[int]) -> Tensor:
        """Mean over slots of s·B A, in the shape of the weight of module `name`."""
        return self._lora_layer(name).mean_delta(list(slots))

    def factors(self, name: str, slot: int) -> tuple[Tensor, Tensor]:
        """(A, B) of a slot in PEFT's shapes: (r, in) and (out, r), or those of a convolution."""
        layer = self._lora_layer(name)
        if layer.is_conv:
            return layer.a[slot], layer.b[slot][..., None]
        return layer.a[slot], layer.b[slot].T

    @torch.no_grad()
    def set_factors(self, name: str, slot: int, a: Tensor, b: Tensor) -> None:
        """Copies a and b, in the shapes that `factors` returns, into a slot."""
        for target, value in zip(self.factors(name, slot), (a, b), strict=True):
            target.copy_(value)

    def head_state(self, name: str, slot: int) -> dict[str, Tensor]:
        """A slot's parameters of head module `name`, by their names in the module."""
        return {unescaped(k): v[slot] for k, v in self._head(name).stacked.items()}

    def _layer(self, name: str) -> _LoRALayer | _SparseLayer:
        layer = self.layers[escaped(name)]
        assert isinstance(layer, (_LoRALayer, _SparseLayer))
        return layer

    def _lora_layer(self, name: str) -> _LoRALayer:
        layer = self._layer(name)
        assert isinstance(layer, _LoRALayer)
        return layer

    def _head(self, name: str) -> HeadCopies:
        head = self.heads[escaped(name)]
        assert isinstance(head, HeadCopies)
        return head

    def slot_state(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot's values, by parameter names of the bank."""
        return {name: p.detach()[slot].clone() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_slot(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Restores the values of one slot that `slot_state` returned."""
        for name, p in self.named_parameters():
            p[slot] = state[name]


class _LoRALayer(nn.Module):
    """The stacked factors of one adapted module: nn.Linear, transformers' Conv1D or nn.Conv1d."""

    def __init__(self, module: nn.Module, num_slots: int, lora: Mapping[str, Any]) -> None:
        super().__init__()
        weight: Any = module.weight
        r = int(lora.get("r", 8))
        self.is_conv = isinstance(module, nn.Conv1d)
        self.transposed = not self.is_conv and not isinstance(module, nn.Linear)  # HF's Conv1D
        self.scale = lora_scale(lora)
        self.dropout = float(lora.get("lora_dropout", 0.0))
        self._touched = False
        self.off = False
        if self.is_conv:
            out_features, in_features, kernel = weight.shape
            self.a = _zeros(weight, num_slots, r, in_features, kernel)
            self.b = _zeros(weight, num_slots, out_features, r)
        else:
            out_features, in_features = weight.T.shape if self.transposed else weight.shape
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

    def forward_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The forward that replaces the module's own."""
        plain = type(module).forward

        def forward(x: Tensor) -> Tensor:
            rows = current_rows()
            if rows is None or self.off or not x.numel():
                return plain(module, x)
            if self.is_conv:
                channels_last = getattr(module, "channels_last", False)
                x_conv = x.mT if channels_last else x
                dropout = self.dropout if module.training else 0.0
                delta = lora_conv1d(x_conv, module, self.a, self.b, self.scale, rows, dropout)  # type: ignore[arg-type]
                return plain(module, x) + (delta.mT if channels_last else delta)
            weight: Any = module.weight.T if self.transposed else module.weight
            dropout = self.dropout if module.training else 0.0
            return lora_linear(x, weight, module.bias, self.a, self.b, self.scale, rows, dropout)  # type: ignore[arg-type]

        return forward

    @torch.no_grad()
    def add_penalty(self, index: slice | list[int], weight: float) -> None:
        """Adds ∇ ‖s·B A‖² = 2 s² (BᵀB A, B A Aᵀ), from products of rank × rank only."""
        if self.a.grad is None or self.b.grad is None:
            return
        a, b = self.a[index].flatten(2), self.b[index]
        b = b.mT if self.is_conv else b  # (slots, r, out)
        factor = 2 * weight * self.scale**2
        grad_a, grad_b = factor * (b @ b.mT) @ a, factor * (a @ a.mT) @ b
        self.a.grad[index] += grad_a.view_as(self.a[index])
        self.b.grad[index] += grad_b.mT if self.is_conv else grad_b

    def mean_delta(self, slots: list[int]) -> Tensor:
        """Mean over slots of s·B A, in the shape of the module's weight."""
        a, b = self.a[slots], self.b[slots]
        if self.is_conv:
            return torch.einsum("tor,trik->oik", b, a) * (self.scale / len(slots))
        product = b.flatten(0, 1).T @ a.flatten(0, 1) * (self.scale / len(slots))
        return product.T if self.transposed else product


class _SparseLayer(nn.Module):
    """The stacked sparse changes of one nn.Linear or transformers' Conv1D."""

    def __init__(self, module: nn.Module, num_slots: int, positions: Tensor) -> None:
        super().__init__()
        weight: Any = module.weight
        self.transposed = not isinstance(module, nn.Linear)
        self.off = False
        self.values = _zeros(weight, num_slots, len(positions))
        self.register_buffer("positions", positions)

    @torch.no_grad()
    def reset(self, slots: Sequence[int] | range, rngs: Sequence[np.random.Generator]) -> None:
        """Sets the changes of these slots to zero; nothing is drawn."""
        self.values[list(slots)] = 0

    def forward_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The forward that replaces the module's own."""
        plain = type(module).forward

        def forward(x: Tensor) -> Tensor:
            rows = current_rows()
            if rows is None or self.off or not x.numel():
                return plain(module, x)
            weight: Any = module.weight.T if self.transposed else module.weight
            return sparse_linear(x, weight, module.bias, self.values, self.positions, rows)  # type: ignore[arg-type]

        return forward

    @torch.no_grad()
    def add_penalty(self, index: slice | list[int], weight: float) -> None:
        """Adds ∇ ‖S‖² = 2 S."""
        if self.values.grad is not None:
            self.values.grad[index] += 2 * weight * self.values[index]


def _layers(
    modules: Mapping[str, nn.Module], num_slots: int, lora: Mapping[str, Any], sparse: float | None
) -> Iterator[tuple[str, nn.Module]]:
    """(name, adapted layer) of each of these modules.

    Raises:
        UserError: A convolution would have a sparse change.
    """
    if sparse is None:
        for name, module in modules.items():
            yield name, _LoRALayer(module, num_slots, lora)
        return
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv1d):
            raise UserError(
                f"{name} is a convolution, but sparse adapters change only linear layers: name "
                "the linear layers in lora target_modules, or use form lora"
            )
        weight: Any = module.weight
        weights[name] = weight if isinstance(module, nn.Linear) else weight.T
    for name, positions in smallest_entries(weights, sparse).items():
        yield name, _SparseLayer(modules[name], num_slots, positions)


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


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
