"""Layers in Tucker-2 form: thin projection, small core, thin projection. A model rewrite.

    y = V₁ · (T ∗ (V₂ᵀ x)) + b

A convolution becomes one of kernel 1 (V₂ᵀ), one of the same kernel, stride, padding and dilation
on few channels (T), and one of kernel 1 (V₁); a linear layer becomes V₁ T V₂ᵀ with an r × r core.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from foretune.errors import UserError, did_you_mean
from foretune.models.calls import eval_no_grad
from foretune.models.surgery import head_modules
from foretune.run import check_int, check_one_of
from foretune.source_free.hooi import compose, hooi, possible, ranks_of_energy

CONVOLUTIONS: dict[int, tuple[type[nn.Module], Any]] = {
    0: (nn.Linear, F.linear),
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
}
Ranks = tuple[int | None, int | None]


class TuckerLayer(nn.Module):
    """A `Conv1d`, `Conv2d` or linear layer in Tucker-2 form; all its parts are parameters.

    Args:
        layer: The layer; it is not changed.
        ranks: (r_out, r_in); None for a mode that is not factored.
        fit: False leaves zeros, for weights that are read from a file afterwards.

    Attributes:
        core: T (r_out, r_in, *kernel).
        out_factor: V₁ (out, r_out), None where that mode is not factored.
        in_factor: V₂ (in, r_in), likewise.
        bias: (out,) or None, as it was.
        error: ‖W − Ŵ‖ / ‖W‖ when it was made.
    """

    def __init__(self, layer: nn.Module, ranks: Ranks, *, fit: bool = True) -> None:
        super().__init__()
        weight: Any = layer.weight
        weight = weight.detach().T if isinstance(layer, Conv1D) else weight.detach()
        core, (v1, v2), errors = hooi(weight, ranks) if fit else _zeros(weight, ranks)
        self.core = nn.Parameter(core)
        self.out_factor = None if v1 is None else nn.Parameter(v1)
        self.in_factor = None if v2 is None else nn.Parameter(v2)
        bias: Any = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.error = errors[-1]
        self.options: dict[str, Any] = {
            name: getattr(layer, name) for name in ("stride", "padding", "dilation") if self.dims
        }

    @property
    def dims(self) -> int:
        """Dimensions of the kernel: 0 for a linear layer."""
        return self.core.dim() - 2

    @property
    def ranks(self) -> Ranks:
        """(r_out, r_in); None for a mode that is not factored."""
        return (
            None if self.out_factor is None else self.out_factor.shape[1],
            None if self.in_factor is None else self.in_factor.shape[1],
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, *length), or (…, in) for a linear layer → (n, out, *length), or (…, out)."""
        apply = CONVOLUTIONS[self.dims][1]
        if self.in_factor is not None:
            x = apply(x, self._thin(self.in_factor.T))
        last = self.out_factor is None
        x = apply(x, self.core, self.bias if last else None, **self.options)
        return x if self.out_factor is None else apply(x, self._thin(self.out_factor), self.bias)

    def _thin(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(*matrix.shape, *[1] * self.dims)

    @property
    def weight(self) -> Tensor:
        """T ×₁ V₁ ×₂ V₂ (out, in, *kernel): the weight that this layer applies."""
        return compose(self.core, (self.out_factor, self.in_factor))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The plain layer that computes the same."""
        weight = self.weight
        kind, sizes = CONVOLUTIONS[self.dims][0], (weight.shape[1], weight.shape[0])
        options = {**self.options, "kernel_size": tuple(weight.shape[2:])} if self.dims else {}
        plain: Any = kind(*sizes, bias=self.bias is not None, **options).to(weight)
        plain.weight.copy_(weight)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain.train(self.training)

    def macs(self, x: Tensor, y: Tensor) -> int:
        """Multiplications of one call: L_in·in·r_in + L_out·K·r_in·r_out + L_out·r_out·out."""
        places_in, places_out = _places(x, self.dims), _places(y, self.dims)
        first = 0 if self.in_factor is None else places_in * self.in_factor.numel()
        last = 0 if self.out_factor is None else places_out * self.out_factor.numel()
        return first + places_out * self.core.numel() + last


def tuckerize(
    model: nn.Module,
    *,
    rank_factor: int | None = None,
    ranks: Mapping[str, Sequence[int | None]] | None = None,
    energy: float | None = None,
    layers: str = "all",
    fit: bool = True,
) -> dict[str, Ranks]:
    """Puts layers of a model into Tucker-2 form, in place; its head stays as it is.

    Left alone: convolutions of several groups (their channels do not mix, so no one basis serves
    them), those that do not pad with zeros, and a mode of one channel. With `rank_factor` the first
    convolution keeps the rank of its input, which are the channels of the data.

    Args:
        model: The model.
        rank_factor: RF: a mode of C channels gets the rank C // RF, at least 1.
        ranks: Or (r_out, r_in) by layer name; only these are factored.
        energy: Or the share of ‖W‖² that each mode's basis keeps of its unfolding.
        layers: "convolutions", "linear" or "all" of what the model has.
        fit: False leaves zeros, for weights that are read from a file afterwards.

    Returns:
        (r_out, r_in) of every layer that was put into this form.

    Raises:
        UserError: Not one of the three ways to say the ranks, or nothing to put into this form.
    """
    if sum(way is not None for way in (rank_factor, ranks, energy)) != 1:
        raise UserError("give one of rank_factor, ranks and energy")
    check_int("rank_factor", rank_factor, 1, optional=True)
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy is a share above 0 and up to 1, got {energy!r}")
    check_one_of("layers", layers, ("all", "convolutions", "linear"))
    found = dict(_factorable(model, layers))
    if not found:
        raise UserError(
            f"{type(model).__name__} has no layer to factor: Conv1d or Conv2d of one group, or a "
            f"linear layer besides its head (layers={layers})"
        )
    for name in ranks or ():
        if name not in found:
            raise UserError(
                f'ranks names "{name}", which is no layer to factor; there are '
                f"{', '.join(found)}.{did_you_mean(name, found)}"
            )
    first = next((name for name, layer in found.items() if _dims(layer)), None)
    made: dict[str, Ranks] = {}
    for name, layer in found.items():
        if ranks is not None and name not in ranks:
            continue
        wanted = _ranks(layer, rank_factor, energy, name == first) if ranks is None else ranks[name]
        tucker = TuckerLayer(layer, _factored(layer, wanted), fit=fit).train(layer.training)
        _put(model, name, tucker)
        made[name] = tucker.ranks
    return made


def tucker_layers(model: nn.Module) -> dict[str, TuckerLayer]:
    """Name → layer of those in Tucker-2 form."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TuckerLayer)}


def core_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → T of each layer in Tucker-2 form; what a target domain tunes."""
    return {f"{name}.core": layer.core for name, layer in tucker_layers(model).items()}


def merge(model: nn.Module) -> nn.Module:
    """A copy of the model with plain layers that compute the same."""
    plain = copy.deepcopy(model)
    for name, layer in tucker_layers(plain).items():
        _put(plain, name, layer.merge())
    return plain


def count_macs(model: nn.Module, *inputs: Any, **named: Any) -> dict[str, int]:
    """Multiplications of convolutions and linear layers in one call of the model, by layer."""
    found: Counter[str] = Counter()

    def counter(name: str) -> Any:
        def count(layer: Any, given: tuple[Any, ...], y: Tensor) -> None:
            if isinstance(layer, TuckerLayer):
                found[name] += layer.macs(given[0], y)
            else:
                found[name] += _places(y, _dims(layer)) * layer.weight.numel()

        return count

    kinds = (TuckerLayer, nn.Conv1d, nn.Conv2d, nn.Linear, Conv1D)
    hooks = [
        m.register_forward_hook(counter(name))
        for name, m in model.named_modules()
        if isinstance(m, kinds)
    ]
    try:
        with eval_no_grad(model):
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)


def _factorable(model: nn.Module, layers: str) -> Iterator[tuple[str, nn.Module]]:
    heads = head_modules(model)
    for name, m in model.named_modules():
        if any(name == head or name.startswith(f"{head}.") for head in heads) or not name:
            continue
        if isinstance(m, (nn.Conv1d, nn.Conv2d)) and layers != "linear":
            if m.groups == 1 and m.padding_mode == "zeros" and max(m.weight.shape[:2]) > 1:
                yield name, m
        elif isinstance(m, (nn.Linear, Conv1D)) and layers != "convolutions":
            yield name, m


def _dims(layer: nn.Module) -> int:
    return 1 if isinstance(layer, nn.Conv1d) else 2 if isinstance(layer, nn.Conv2d) else 0


def _channels(layer: Any) -> tuple[int, int]:
    shape = layer.weight.shape
    return (shape[1], shape[0]) if isinstance(layer, Conv1D) else (shape[0], shape[1])


def _ranks(
    layer: Any, rank_factor: int | None, energy: float | None, first: bool
) -> tuple[int, int]:
    if energy is not None:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        out, inner = ranks_of_energy(weight, energy)
        return out, inner
    assert rank_factor is not None
    out, inner = _channels(layer)
    return max(1, out // rank_factor), inner if first else max(1, inner // rank_factor)


def _zeros(weight: Tensor, ranks: Ranks) -> tuple[Tensor, list[Tensor | None], list[float]]:
    cut = possible(weight, ranks)
    sizes = zip(weight.shape, cut, strict=False)
    factors = [None if rank is None else weight.new_zeros(size, rank) for size, rank in sizes]
    core = [size if r is None else r for size, r in zip(weight.shape, cut, strict=False)]
    return weight.new_zeros(*core, *weight.shape[2:]), factors, [1.0]


def _factored(layer: Any, ranks: Sequence[int | None]) -> Ranks:
    """The ranks, None for a mode of one channel."""
    out, inner = (
        None if size == 1 else rank for size, rank in zip(_channels(layer), ranks, strict=True)
    )
    return out, inner


def _places(tensor: Tensor, dims: int) -> int:
    """Positions at which a layer is applied, over the whole batch."""
    channels = tensor.shape[-1] if dims == 0 else tensor.shape[-1 - dims]
    return tensor.numel() // channels


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
