"""Calling a model once per group of rows of similar length, where padding cannot be removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foretune.models.calls import cache_among, replaced_forward
from foretune.models.layout import RowSlots, rows_by_length
from foretune.models.routing import current_rows, routed, stays_padded


def lengths_of(kwargs: Mapping[str, Any]) -> tuple[list[int], int]:
    """Tokens of each row and the padded length; ([], 0) unless all padding is on the right."""
    mask = kwargs.get("attention_mask")
    ids = kwargs.get("input_ids")
    if not isinstance(mask, Tensor) or not isinstance(ids, Tensor):
        return [], 0
    if mask.dim() != 2 or mask.shape != ids.shape:
        return [], 0
    if cache_among(kwargs.values()) is not None:
        return [], 0
    mask = mask.cpu() > 0
    lengths = mask.sum(1)
    on_the_right = torch.arange(mask.shape[1])[None, :] < lengths[:, None]
    if not torch.equal(mask, on_the_right) or int(lengths.min()) == 0:
        return [], 0
    return lengths.tolist(), mask.shape[1]


class PackedForward:
    """A replaced `forward` that computes nothing for padding, recognised by its type.

    Args:
        call: What a call of the module runs.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the replaced forward."""
        return self.call(*args, **kwargs)


@contextlib.contextmanager
def grouped_calls(model: nn.Module) -> Iterator[None]:
    """Inside the block one call of the model becomes one per group of rows of similar length."""
    real: Callable[..., Any] = model.forward
    busy = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal busy
        lengths, width = ([], 0) if busy or args or stays_padded() else lengths_of(kwargs)
        groups = rows_by_length(lengths)
        if len(groups) < 2:
            return real(*args, **kwargs)
        rows = current_rows()
        busy = True
        outputs = []
        try:
            for group in groups:
                slots = None if rows is None else RowSlots(tuple(rows.slots[i] for i in group))
                longest = max(lengths[i] for i in group)
                with routed(slots, None):
                    outputs.append(model(**_some_rows(kwargs, group, len(lengths), longest)))
        finally:
            busy = False
        original_order = torch.argsort(torch.tensor([i for group in groups for i in group]))
        return _joined(outputs, original_order, width)

    with replaced_forward(model, PackedForward(forward)):
        yield


def _some_rows(
    kwargs: Mapping[str, Any], group: list[int], num_rows: int, longest: int
) -> dict[str, Any]:
    """The arguments of a call for the rows in `group`, cut to their longest."""
    index = torch.tensor(group)
    selected = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == num_rows:
            value = value[index.to(value.device)]
            if name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
                value = value[:, :longest]
        selected[name] = value
    return selected


def _joined(outputs: list[Any], order: Tensor, width: int) -> Any:
    """The outputs of the groups as one, rows in the order of the call, padded with zeros again."""
    if isinstance(outputs[0], Tensor):
        return _stacked(outputs, order, width)
    names = [k for k, v in outputs[0].items() if isinstance(v, Tensor) and v.dim() > 1]
    return type(outputs[0])(**{k: _stacked([o[k] for o in outputs], order, width) for k in names})


def _stacked(parts: list[Tensor], order: Tensor, width: int) -> Tensor:
    """(n, width, …) rows of all parts, permuted by `order`."""
    if len({part.shape[1:] for part in parts}) > 1:
        parts = [
            nn.functional.pad(part, (0, 0) * (part.dim() - 2) + (0, width - part.shape[1]))
            for part in parts
        ]
    return torch.cat(parts)[order.to(parts[0].device)]
