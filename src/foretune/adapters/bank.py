"""`AdapterBank`: the stacked adapters of many tasks on one model, one adapter per task.

The bank does not change the model's module tree and parameter names: while it is attached, the
`forward` of each adapted module asks `foretune.models.routing` which slot owns each row and adds
that slot's adapter. So a batch that mixes tasks takes one forward and one backward, and the base is
saved without unwrapping.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foretune.adapters.head_copies import HeadCopies, escaped, unescaped
from foretune.adapters.layers import LoRALayer, SparseLayer, stacked_layers
from foretune.adapters.lora import index_of
from foretune.adapters.mixing import MixedCalls
from foretune.adapters.targets import copied_modules, matching_modules
from foretune.errors import UserError
from foretune.models.position_tables import table_per_slot
from foretune.models.quantised import prepare_quantised
from foretune.models.recompute import recomputed_on_route
from foretune.models.unadaptable import frozen_reasons, unadaptable


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
        UserError: `target_modules` or `heads` match nothing, a layer that would have a sparse
            change is a convolution, or the model carries an adapter already.
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
        if getattr(model, "peft_config", None):
            raise UserError(
                f"the model carries an adapter of PEFT already ({type(model).__name__}): merge it "
                "into the weights first (merge_and_unload), or take it off (unload)"
            )
        self.keys = tuple(keys)
        self.lora = None if lora is None else dict(lora)
        saved = copied_modules(model, heads, (lora or {}).get("modules_to_save") or ())
        self.head_names = (*heads, *saved)
        for name, reason in frozen_reasons(model, self.head_names).items():
            raise UserError(f"{name} cannot be copied for each task: {reason}")
        self._fresh = frozenset(heads if fresh_heads else ())
        self._seed = seed
        prepare_quantised(model)
        modules = dict(model.named_modules())
        self.layers = nn.ModuleDict()
        if self.lora is not None:
            targets = {n: modules[n] for n in matching_modules(model, self.lora, self.head_names)}
            targets = _adaptable(model, targets, self.lora.get("target_modules"))
            for name, layer in stacked_layers(targets, len(self.keys), self.lora, sparse):
                self.layers[escaped(name)] = layer
        self.heads = nn.ModuleDict(
            {
                escaped(name): HeadCopies(name, modules[name], len(self.keys))
                for name in self.head_names
            }
        )
        self.onto(model)
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
        before: list[tuple[nn.Module, Any]] = []
        stack = contextlib.ExitStack()
        # torch's fused encoder layer reads its linear layers' weights instead of calling them.
        fused = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            for name, module in self._modules_of.items():
                replaced = vars(module).get("forward")  # such as accelerate's, that moves the input
                if hasattr(replaced, "is_of_a_bank"):
                    raise RuntimeError(f"another bank is attached to {name}")
                owner = self._head(name) if name in self.head_names else self._layer(name)
                forward: Any = owner.forward_of(module)
                forward.is_of_a_bank = True
                module.forward = forward
                before.append((module, replaced))
            stack.enter_context(table_per_slot(self._calls.model))
            stack.enter_context(recomputed_on_route(self._calls.model))
            stack.enter_context(self._calls.installed())
            yield self
        finally:
            stack.close()
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, replaced in before:
                del module.forward
                if replaced is not None:
                    module.forward = replaced

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

    def add_penalty(
        self,
        slots: Sequence[int],
        weight: float,
        *,
        centre: Mapping[str, Tensor] | None = None,
        heads: bool = False,
    ) -> None:
        """Adds to `.grad` that of weight · Σ ‖s·B A − C‖²_F over these slots and all layers.

        For sparse changes it is that of weight · Σ ‖S − C‖²_F.

        Args:
            slots: The slots, in ascending order.
            weight: λ.
            centre: C, as `mean` returns it; None for zero.
            heads: Also weight · Σ ‖w − c‖²_F over the weight matrices of the heads.
        """
        index = index_of(slots)
        for name in self.layer_names:
            self._layer(name).add_penalty(index, weight, None if centre is None else centre[name])
        for name in self.head_names if heads else ():
            head = self._head(name)
            names = {k: f"{name}.{k}" for k in map(unescaped, head.stacked)}
            centres = {} if centre is None else {k: centre[full] for k, full in names.items()}
            head.add_penalty(index, weight, centres)

    def mean(self) -> dict[str, Tensor]:
        """The mean over all slots of what `add_penalty` is about.

        Returns:
            Layer → (out, in) mean of s·B A, or (entries,) mean of S; parameter of a head, by its
            full name → its mean.
        """
        of_layers = {name: self._layer(name).mean() for name in self.layer_names}
        return of_layers | self.mean_heads()

    def mean_heads(self) -> dict[str, Tensor]:
        """Full name of each parameter of the heads → its mean over all slots.

        Without heads whose outputs stand for other labels in each slot.
        """
        return {
            f"{name}.{k}": mean
            for name in self.head_names
            if name not in self._fresh
            for k, mean in self._head(name).mean().items()
        }

    def onto(self, model: nn.Module) -> None:
        """Adapts this model from now on, which has modules of the same names."""
        modules = dict(model.named_modules())
        self._modules_of = {name: modules[name] for name in self.adapted_names}
        parts = {
            name: self._head(name) if name in self.head_names else self._layer(name)
            for name in self._modules_of
        }
        self._calls = MixedCalls(model, parts, self._modules_of)

    def settle(self) -> str | None:
        """From now on calls are made as the calls so far have shown to be right, or refused.

        Returns:
            Why the model must be called for each task of a batch on its own; None if it need not.
        """
        return self._calls.settle()

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

    def _layer(self, name: str) -> LoRALayer | SparseLayer:
        layer = self.layers[escaped(name)]
        assert isinstance(layer, (LoRALayer, SparseLayer))
        return layer

    def _lora_layer(self, name: str) -> LoRALayer:
        layer = self._layer(name)
        assert isinstance(layer, LoRALayer)
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


def _adaptable(
    model: nn.Module, targets: Mapping[str, nn.Module], names: Any
) -> dict[str, nn.Module]:
    """Those of the targets that can carry an adapter.

    Args:
        model: The base.
        targets: Name → module.
        names: The configuration's `target_modules`.

    Raises:
        UserError: One that cannot was named, or none can.
    """
    reasons = unadaptable(model, targets)
    adaptable = {name: module for name, module in targets.items() if name not in reasons}
    if reasons and (not adaptable or names not in (None, "all-linear")):
        name, reason = next(iter(reasons.items()))
        raise UserError(
            f"{name} cannot carry an adapter: {reason}; leave it out with target_modules or "
            "exclude_modules"
        )
    return adaptable


def _seed_of(seed: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
