"""`AdapterBank`: one adapter for each of many tasks on one model, stacked.

The bank leaves the model's module tree and parameter names alone: while it is attached, the
`forward` of each adapted module asks `foretune.models.routing` which slot owns each row and adds
that slot's adapter. So one forward and one backward serve a batch that mixes tasks, and saving
the base needs no unwrapping.
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

from foretune.adapters.config import lora_scale, matching_modules
from foretune.adapters.lora import by_rows, by_slot, index_of, lora_conv1d, lora_linear
from foretune.adapters.sparse import smallest_entries
from foretune.adapters.sparse_slots import sparse_linear
from foretune.errors import UserError
from foretune.models.layout import RowSlots
from foretune.models.routing import current_rows


class AdapterBank(nn.Module):
    """One adapter, LoRA or sparse, and one copy of the head modules for each slot.

    Args:
        model: The base. Its own parameters are neither copied nor owned by the bank.
        keys: One name a slot; a slot's fresh values depend on the seed and on its key alone, not
            on which other slots there are.
        lora: Fields of a `peft.LoraConfig`; None for a bank of heads only.
            `target_modules=None` adapts every linear layer that the model lets train.
        sparse: None for LoRA adapters. Otherwise each slot has a change of its own at this share
            of the entries of the adapted layers, the smallest as the model is now, the same ones
            for all slots; of `lora` only what chooses modules then counts.
        heads: Names of modules of which each slot has a full copy (PEFT's `modules_to_save`).
        fresh_heads: Draw the copies anew; False copies the base's own weights.
        seed: Seeds the fresh values.

    Raises:
        UserError: `target_modules` or `heads` match nothing, and the message lists what there is;
            a sparse change of a convolution.
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
        self.head_names = tuple(heads) + tuple((lora or {}).get("modules_to_save") or ())
        self.fresh_heads = fresh_heads
        self._seed = seed
        modules = dict(model.named_modules())
        missing = [name for name in self.head_names if name not in modules]
        if missing:
            raise UserError(
                f"no module {missing[0]!r} to give each task a copy of; the model has: "
                f"{', '.join(n for n in modules if n)[:400]}"
            )
        self.layers = nn.ModuleDict()
        if self.lora is not None:
            names = matching_modules(model, self.lora, self.head_names)
            for name, layer in _layers(
                {name: modules[name] for name in names}, len(self.keys), self.lora, sparse
            ):
                self.layers[_escaped(name)] = layer
        self.heads = nn.ModuleDict(
            {_escaped(name): _HeadCopies(modules[name], len(self.keys)) for name in self.head_names}
        )
        self._modules_of = {n: modules[n] for n in [*self.layer_names, *self.head_names]}
        self.reset(range(len(self.keys)), seed)

    @property
    def layer_names(self) -> list[str]:
        """Full names of the modules that carry an adapter."""
        return [_plain(name) for name in self.layers]

    @property
    def adapted_names(self) -> list[str]:
        """Full names of all modules that the bank changes."""
        return [*self.layer_names, *self.head_names]

    @property
    def parameters_per_slot(self) -> int:
        """Trainable parameters of one task's adapter and head."""
        return sum(p[0].numel() for p in self.parameters())

    @torch.no_grad()
    def reset(self, slots: Sequence[int] | range, seed: int | None = None) -> None:
        """Fresh adapters (A uniform as in PEFT, B zero; or no change) and heads for these slots."""
        seed = self._seed if seed is None else seed
        # SFC64, because a bank for a thousand tasks is half a billion draws.
        rngs = [np.random.Generator(np.random.SFC64(_seed_of(seed, self.keys[s]))) for s in slots]
        for name in self.layer_names:
            self._layer(name).reset(slots, rngs)
        for name in self.head_names:
            for slot, rng in zip(slots, rngs, strict=True):
                self._head(name).reset(slot, self._modules_of[name], self.fresh_heads, rng)

    @contextlib.contextmanager
    def attached(self) -> Iterator[AdapterBank]:
        """Inside the block, the model's forward passes under `route` go through the bank."""
        patched: list[nn.Module] = []
        # torch's fused encoder layer reads its linear layers' weights instead of calling them
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
        """Inside the block no adapter is added; heads stay those of their slots."""
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

        Of sparse changes it is that of weight · Σ ‖S‖²_F.

        Args:
            slots: Ascending.
            weight: λ.
        """
        for name in self.layer_names:
            self._layer(name).add_penalty(index_of(slots), weight)

    def onto(self, model: nn.Module) -> None:
        """Serves this model from now on, which has modules of the same names."""
        modules = dict(model.named_modules())
        self._modules_of = {name: modules[name] for name in self._modules_of}

    def mean_delta(self, name: str, slots: Sequence[int]) -> Tensor:
        """The mean over slots of what their adapters add to the weight of module `name`."""
        return self._lora_layer(name).mean_delta(list(slots))

    def factors(self, name: str, slot: int) -> tuple[Tensor, Tensor]:
        """Slot's (A, B) in PEFT's shapes: (r, in) and (out, r), or those of a convolution."""
        layer = self._lora_layer(name)
        if layer.is_conv:
            return layer.a[slot], layer.b[slot][..., None]
        return layer.a[slot], layer.b[slot].T

    @torch.no_grad()
    def set_factors(self, name: str, slot: int, a: Tensor, b: Tensor) -> None:
        """Sets what `factors` gives."""
        for target, value in zip(self.factors(name, slot), (a, b), strict=True):
            target.copy_(value)

    def head_state(self, name: str, slot: int) -> dict[str, Tensor]:
        """Slot's copy of the parameters of head module `name`."""
        return {_plain(k): v[slot] for k, v in self._head(name).stacked.items()}

    def _layer(self, name: str) -> _LoRALayer | _SparseLayer:
        layer = self.layers[_escaped(name)]
        assert isinstance(layer, (_LoRALayer, _SparseLayer))
        return layer

    def _lora_layer(self, name: str) -> _LoRALayer:
        layer = self._layer(name)
        assert isinstance(layer, _LoRALayer)
        return layer

    def _head(self, name: str) -> _HeadCopies:
        head = self.heads[_escaped(name)]
        assert isinstance(head, _HeadCopies)
        return head

    def slot_state(self, slot: int) -> dict[str, Tensor]:
        """A copy of one slot's values, by parameter name of the bank."""
        return {name: p.detach()[slot].clone() for name, p in self.named_parameters()}

    @torch.no_grad()
    def load_slot(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Takes back what `slot_state` gave."""
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
        """A uniform as in PEFT, kaiming_uniform(a=√5) over its inputs; B zero."""
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
        """The forward that takes the place of the module's own."""
        plain = type(module).forward

        def forward(x: Tensor) -> Tensor:
            rows = current_rows()
            if rows is None or self.off or not x.numel():
                return plain(module, x)
            if self.is_conv:
                turned = getattr(module, "channels_last", False)
                x_conv = x.mT if turned else x
                added = lora_conv1d(x_conv, module, self.a, self.b, self.scale, rows)  # type: ignore[arg-type]
                return plain(module, x) + (added.mT if turned else added)
            weight: Any = module.weight.T if self.transposed else module.weight
            dropout = self.dropout if module.training else 0.0
            return lora_linear(x, weight, module.bias, self.a, self.b, self.scale, rows, dropout)  # type: ignore[arg-type]

        return forward

    @torch.no_grad()
    def add_penalty(self, index: slice | list[int], weight: float) -> None:
        """∇ ‖s·B A‖² = 2 s² (BᵀB A, B A Aᵀ), from products of rank × rank only."""
        if self.a.grad is None or self.b.grad is None:
            return
        a, b = self.a[index].flatten(2), self.b[index]
        b = b.mT if self.is_conv else b  # (slots, r, out)
        factor = 2 * weight * self.scale**2
        grad_a, grad_b = factor * (b @ b.mT) @ a, factor * (a @ a.mT) @ b
        self.a.grad[index] += grad_a.view_as(self.a[index])
        self.b.grad[index] += grad_b.mT if self.is_conv else grad_b

    def mean_delta(self, slots: list[int]) -> Tensor:
        a, b = self.a[slots], self.b[slots]
        if self.is_conv:
            return torch.einsum("tor,trik->oik", b, a) * (self.scale / len(slots))
        product = b.flatten(0, 1).T @ a.flatten(0, 1) * (self.scale / len(slots))
        return product.T if self.transposed else product


class _SparseLayer(nn.Module):
    """The stacked sparse changes of one nn.Linear or transformers' Conv1D."""

    def __init__(self, module: nn.Module, num_slots: int, places: Tensor) -> None:
        super().__init__()
        weight: Any = module.weight
        self.transposed = not isinstance(module, nn.Linear)
        self.off = False
        self.values = _zeros(weight, num_slots, len(places))
        self.register_buffer("places", places)

    @torch.no_grad()
    def reset(self, slots: Sequence[int] | range, rngs: Sequence[np.random.Generator]) -> None:
        """No change; nothing is drawn."""
        self.values[list(slots)] = 0

    def forward_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The forward that takes the place of the module's own."""
        plain = type(module).forward

        def forward(x: Tensor) -> Tensor:
            rows = current_rows()
            if rows is None or self.off or not x.numel():
                return plain(module, x)
            weight: Any = module.weight.T if self.transposed else module.weight
            return sparse_linear(x, weight, module.bias, self.values, self.places, rows)  # type: ignore[arg-type]

        return forward

    @torch.no_grad()
    def add_penalty(self, index: slice | list[int], weight: float) -> None:
        """∇ ‖S‖² = 2 S."""
        if self.values.grad is not None:
            self.values.grad[index] += 2 * weight * self.values[index]


def _layers(
    modules: Mapping[str, nn.Module], num_slots: int, lora: Mapping[str, Any], sparse: float | None
) -> Iterator[tuple[str, nn.Module]]:
    """The adapted layer of each of these modules, by name."""
    if sparse is None:
        for name, module in modules.items():
            yield name, _LoRALayer(module, num_slots, lora)
        return
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv1d):
            raise UserError(
                f"{name} is a convolution, and sparse adapters change linear layers alone: name "
                "the linear layers in lora target_modules, or use form lora"
            )
        weight: Any = module.weight
        weights[name] = weight if isinstance(module, nn.Linear) else weight.T
    for name, places in smallest_entries(weights, sparse).items():
        yield name, _SparseLayer(modules[name], num_slots, places)


def _zeros(like: Tensor, *shape: int) -> nn.Parameter:
    """float32 zeros beside `like`; many of them on a CPU are a memory map, untouched until written.

    The system then hands out only what is used, in large pages, and never twice: of a bank for a
    thousand tasks half is zero until it is trained.
    """
    size = 4 * math.prod(shape)
    if like.device.type != "cpu" or size < 2**20:
        return nn.Parameter(torch.zeros(shape, device=like.device))
    block = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return nn.Parameter(torch.frombuffer(block, dtype=torch.float32).view(shape))


class _HeadCopies(nn.Module):
    """One copy of a whole module for each slot, called for the rows of its slot."""

    def __init__(self, module: nn.Module, num_slots: int) -> None:
        super().__init__()
        self.stacked = nn.ParameterDict(
            {
                _escaped(name): nn.Parameter(p.detach().expand(num_slots, *p.shape).clone())
                for name, p in module.named_parameters()
            }
        )
        self._running = False

    def reset(self, slot: int, module: nn.Module, fresh: bool, rng: np.random.Generator) -> None:
        for name, p in module.named_parameters():
            target = self.stacked[_escaped(name)][slot]
            if not fresh:
                target.copy_(p)
            elif p.dim() > 1:
                drawn = rng.standard_normal(tuple(p.shape), dtype=np.float32) * 0.02
                target.copy_(torch.from_numpy(drawn))
            else:  # biases, and the weights of norms, which start at one
                target.fill_(1.0 if name.endswith("weight") else 0.0)

    def forward_of(self, module: nn.Module) -> Callable[..., Tensor]:
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
        outputs = []
        for i, params in enumerate(self._copies(rows)):

            def part(t: Tensor, i: int = i) -> Tensor:
                return by_slot(t, rows)[i]

            some = _map((args, kwargs), part)
            outputs.append(torch.func.functional_call(module, params, *some))
        y = torch.cat(outputs, 0 if rows.tokens is None else 1)
        return y if rows.inverse is None else by_rows(y, rows.inverse, num_rows)

    def _copies(self, rows: RowSlots) -> list[dict[str, Tensor]]:
        """The parameters of each slot that is present, by name.

        Selected and unbound once: indexing slot by slot would give each slot a gradient of the size
        of the whole stack.
        """
        every = rows.present == tuple(range(len(next(iter(self.stacked.values())))))
        index = slice(None) if every else torch.tensor(rows.present)
        unbound = {_plain(name): p[index].unbind() for name, p in self.stacked.items()}
        return [{k: v[i] for k, v in unbound.items()} for i in range(len(rows.present))]


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples and dicts with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return value


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _escaped(name: str) -> str:
    """A module name as a key of nn.ModuleDict, which allows no dots."""
    return name.replace(".", "/")


def _plain(key: str) -> str:
    return key.replace("/", ".")
