"""Which entries of a model's parameters are small: those that sparse adapters change.

Hu et al., "SaRA", ICLR 2025, arXiv:2409.06633, eq. 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from foretune.errors import UserError


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether the parameter `name` belongs to one of the modules."""
    return any(name.startswith(f"{module}.") for module in modules)


def entries_below(
    model: nn.Module, threshold: float, heads: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The entries of the trainable parameters that are below the threshold in absolute value.

    Args:
        model: Parameters with `requires_grad=False` have no entries.
        threshold: θ_t of 1[|P0| < θ_t].
        heads: Names of modules of which all entries are selected.

    Returns:
        Parameter name → (m,) positions in the flattened parameter, int32 where that suffices.
    """
    indices = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            mask = torch.ones_like(p, dtype=torch.bool) if within(name, heads) else None
            mask = p.detach().abs() < threshold if mask is None else mask
            indices[name] = _positions(mask.flatten())
    return indices


def threshold_of(model: nn.Module, fraction: float, leave_out: Sequence[str] = ()) -> float:
    """The threshold below which this share of the trainable entries lies, up to ties.

    Args:
        model: Parameters with `requires_grad=False` do not count.
        fraction: Share of the entries, above 0 and at most 1.
        leave_out: Names of modules that do not count.
    """
    sizes = [
        p.detach().abs().flatten().float()
        for name, p in model.named_parameters()
        if p.requires_grad and not within(name, leave_out)
    ]
    return threshold_among(sizes, fraction)


def threshold_among(sizes: Sequence[Tensor], fraction: float) -> float:
    """The threshold below which this share of the entries of flat tensors lies, up to ties."""
    if not sizes:
        return 0.0
    entries = torch.cat(list(sizes))
    count = round(fraction * len(entries))
    if count >= len(entries):
        return torch.nextafter(entries.max(), entries.new_tensor(torch.inf)).item()
    return entries.kthvalue(count + 1).values.item()


def smallest_entries(weights: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """The smallest entries in absolute value among all weights together.

    Args:
        weights: Name → weight, of any shape.
        fraction: Share of all entries, above 0 and at most 1.

    Returns:
        Name → (m,) positions in the flattened weight; weights without any are left out.

    Raises:
        UserError: No entry is selected: too many are equal, or the share is too small.
    """
    sizes = {name: w.detach().abs().flatten().float() for name, w in weights.items()}
    threshold = threshold_among(list(sizes.values()), fraction)
    indices = {name: _positions(size < threshold) for name, size in sizes.items()}
    indices = {name: positions for name, positions in indices.items() if len(positions)}
    if not indices:
        raise UserError(
            f"fraction {fraction:g} of the adapted layers' weights selects no entry (none is "
            f"below {threshold:g} in absolute value): raise fraction"
        )
    return indices


def _positions(mask: Tensor) -> Tensor:
    """(m,) positions where a flat mask is true, int32 where that suffices."""
    dtype = torch.int32 if len(mask) < 2**31 else torch.int64
    return torch.nonzero(mask).flatten().to(dtype)
