"""Layers in Tucker-2 form: a thin projection, a small core and a thin projection.

    y = V₁ · (T ∗ (V₂ᵀ x)) + b

A convolution becomes one of kernel size 1 (V₂ᵀ), one of the original kernel size, stride, padding
and dilation on few channels (T), and one of kernel size 1 (V₁); a linear layer becomes V₁ T V₂ᵀ.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D

from foretune.errors import UserError, did_you_mean
from foretune.models.calls import eval_no_grad
from foretune.models.surgery import head_modules
from foretune.run import check_int, check_one_of
from foretune.source_free.hooi import compose, feasible_ranks, hooi, ranks_of_energy

CONVOLUTIONS: dict[int, tuple[type[nn.Module], Any]] = {
    0: (nn.Linear, F.linear),
    1: (nn.Conv1d, F.conv1d),
    2: (nn.Conv2d, F.conv2d),
}
TuckerRanks = tuple[int | None, int | None]  # (r_out, r_in); None for a mode not factored


class TuckerLayer(nn.Module):
    """A `Conv1d`, `Conv2d` or linear layer in Tucker-2 form; all its parts are parameters.

    Args:
        layer: The layer; it is not changed.
        ranks: (r_out, r_in); None for a mode that is not factored.
        fit: Whether to decompose the weight; False fills zeros, to be overwritten from a file.

    Attributes:
        core: T (r_out, r_in, *kernel).
        out_factor: V₁ (out, r_out); None if that mode is not factored.
        in_factor: V₂ (in, r_in); None if that mode is not factored.
        bias: (out,), or None for a layer without bias.
        error: ‖W − Ŵ‖ / ‖W‖ of the decomposition.
    """

    def __init__(self, layer: nn.Module, ranks: TuckerRanks, *, fit: bool = True) -> None:
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
        """Number of kernel dimensions: 0 for a linear layer."""
        return self.core.dim() - 2

    @property
    def ranks(self) -> TuckerRanks:
        """(r_out, r_in); None for a mode that is not factored."""
        return (
            None if self.out_factor is None else self.out_factor.shape[1],
            None if self.in_factor is None else self.in_factor.shape[1],
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, in, *length) → (n, out, *length); for a linear layer (…, in) → (…, out)."""
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
        """The full weight T ×₁ V₁ ×₂ V₂, of shape (out, in, *kernel)."""
        return compose(self.core, (self.out_factor, self.in_factor))

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The equivalent plain layer."""
        weight = self.weight
        kind, sizes = CONVOLUTIONS[self.dims][0], (weight.shape[1], weight.shape[0])
        options = {**self.options, "kernel_size": tuple(weight.shape[2:])} if self.dims else {}
        plain: Any = kind(*sizes, bias=self.bias is not None, **options).to(weight)
        plain.weight.copy_(weight)
        if self.bias is not None:
            plain.bias.copy_(self.bias)
        return plain.train(self.training)

    def macs(self, x: Tensor, y: Tensor) -> int:
        """Multiply-accumulates of one call: L_in·in·r_in + L_out·K·r_in·r_out + L_out·r_out·out.

        Args:
            x: Input (n, in, *length), or (…, in) for a linear layer.
            y: Output (n, out, *length), or (…, out).
        """
        num_inputs, num_outputs = _num_positions(x, self.dims), _num_positions(y, self.dims)
        first = 0 if self.in_factor is None else num_inputs * self.in_factor.numel()
        last = 0 if self.out_factor is None else num_outputs * self.out_factor.numel()
        return first + num_outputs * self.core.numel() + last


def tuckerize(
    model: nn.Module,
    *,
    rank_factor: int | None = None,
    ranks: Mapping[str, Sequence[int | None]] | None = None,
    energy: float | None = None,
    layers: str = "all",
    fit: bool = True,
) -> dict[str, TuckerRanks]:
    """Puts layers of a model, except its head, into Tucker-2 form in place.

    Skipped: grouped convolutions (their channels do not mix, so no single basis fits them),
    convolutions with non-zero padding modes, and modes of one channel. With `rank_factor` the input
    mode of the first convolution, which holds the channels of the data, keeps its full rank.

    Args:
        model: The model.
        rank_factor: RF: a mode of C channels gets rank C // RF, at least 1.
        ranks: Alternatively (r_out, r_in) by layer name; only these layers are factored.
        energy: Alternatively the share of ‖W‖² that each mode's basis keeps in its unfolding.
        layers: "convolutions", "linear" or "all".
        fit: Whether to decompose the weights; False fills zeros, to be overwritten from a file.

    Returns:
        (r_out, r_in) of every factored layer, by name.

    Raises:
        UserError: Not exactly one of `rank_factor`, `ranks` and `energy`, a value out of range, a
            name in `ranks` that cannot be factored, or no layer to factor.
    """
    if sum(choice is not None for choice in (rank_factor, ranks, energy)) != 1:
        raise UserError("give exactly one of rank_factor, ranks and energy")
    check_int("rank_factor", rank_factor, 1, optional=True)
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"energy must be above 0 and at most 1, got {energy!r}")
    check_one_of("layers", layers, ("all", "convolutions", "linear"))
    factorable = dict(_factorable(model, layers))
    if not factorable:
        raise UserError(
            f"{type(model).__name__} has no layer to factor with layers={layers}: it needs a "
            "Conv1d or Conv2d without groups, or a linear layer outside its head"
        )
    for name in ranks or ():
        if name not in factorable:
            raise UserError(
                f'ranks names "{name}", which cannot be factored; choose from '
                f"{', '.join(factorable)}.{did_you_mean(name, factorable)}"
            )
    first = next((name for name, layer in factorable.items() if _dims(layer)), None)
    factored: dict[str, TuckerRanks] = {}
    for name, layer in factorable.items():
        if ranks is None:
            layer_ranks = _choose_ranks(layer, rank_factor, energy, name == first)
        elif name in ranks:
            layer_ranks = ranks[name]
        else:
            continue
        tucker = TuckerLayer(layer, _skip_single_channels(layer, layer_ranks), fit=fit)
        _replace(model, name, tucker.train(layer.training))
        factored[name] = tucker.ranks
    return factored


def tucker_layers(model: nn.Module) -> dict[str, TuckerLayer]:
    """The layers in Tucker-2 form by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, TuckerLayer)}


def core_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The core T of every layer in Tucker-2 form by name: what is tuned on a target domain."""
    return {f"{name}.core": layer.core for name, layer in tucker_layers(model).items()}


def merge(model: nn.Module) -> nn.Module:
    """A copy of the model whose Tucker layers are merged into equivalent plain layers."""
    plain = copy.deepcopy(model)
    for name, layer in tucker_layers(plain).items():
        _replace(plain, name, layer.merge())
    return plain


def count_macs(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Multiply-accumulates of convolutions and linear layers in one call of the model, by layer."""
    macs: Counter[str] = Counter()

    def counter(name: str) -> Any:
        def count(layer: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
            if isinstance(layer, TuckerLayer):
                macs[name] += layer.macs(inputs[0], y)
            else:
                macs[name] += _num_positions(y, _dims(layer)) * layer.weight.numel()

        return count

    kinds = (TuckerLayer, nn.Conv1d, nn.Conv2d, nn.Linear, Conv1D)
    hooks = [
        m.register_forward_hook(counter(name))
        for name, m in model.named_modules()
        if isinstance(m, kinds)
    ]
    try:
        with eval_no_grad(model):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(macs)


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


def _choose_ranks(
    layer: Any, rank_factor: int | None, energy: float | None, first: bool
) -> Sequence[int | None]:
    if energy is not None:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        out, inner = ranks_of_energy(weight, energy)
        return out, inner
    assert rank_factor is not None
    out, inner = _channels(layer)
    return max(1, out // rank_factor), inner if first else max(1, inner // rank_factor)


def _zeros(weight: Tensor, ranks: TuckerRanks) -> tuple[Tensor, list[Tensor | None], list[float]]:
    clipped = feasible_ranks(weight, ranks)
    sizes = zip(weight.shape, clipped, strict=False)
    factors = [None if rank is None else weight.new_zeros(size, rank) for size, rank in sizes]
    core = [size if r is None else r for size, r in zip(weight.shape, clipped, strict=False)]
    return weight.new_zeros(*core, *weight.shape[2:]), factors, [1.0]


def _skip_single_channels(layer: Any, ranks: Sequence[int | None]) -> TuckerRanks:
    """The ranks with None for modes of one channel."""
    out, inner = (
        None if size == 1 else rank for size, rank in zip(_channels(layer), ranks, strict=True)
    )
    return out, inner


def _num_positions(tensor: Tensor, dims: int) -> int:
    """Number of positions at which a layer is applied, summed over the batch."""
    channels = tensor.shape[-1] if dims == 0 else tensor.shape[-1 - dims]
    return tensor.numel() // channels


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
