"""Calling a model once for each group of rows of like lengths, where padding cannot be removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from foretune.models.calls import cache_among, replaced_forward
from foretune.models.routing import Rows, current_rows, routed

STEP = 16  # rows whose lengths round up to the same multiple of it go together


def rows_by_length(lengths: Collection[int]) -> list[list[int]]:
    """Indices of the rows whose lengths round up to the same multiple of `STEP`, shortest first.

    >>> rows_by_length([3, 40, 16, 33])
    [[0, 2], [1, 3]]
    """
    found: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        found.setdefault(-(-length // STEP), []).append(i)
    return [found[key] for key in sorted(found)]


def lengths_of(kwargs: Mapping[str, Any]) -> tuple[list[int], int]:
    """Tokens of each row and the length they are padded to; none where padding is not plain."""
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


@contextlib.contextmanager
def grouped_calls(model: nn.Module) -> Iterator[None]:
    """Inside the block one call of the model becomes one for each group of rows of like lengths."""
    real: Callable[..., Any] = model.forward
    busy = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal busy
        lengths, width = ([], 0) if busy or args else lengths_of(kwargs)
        groups = rows_by_length(lengths)
        if len(groups) < 2:
            return real(*args, **kwargs)
        rows = current_rows()
        busy = True
        outputs = []
        try:
            for group in groups:
                slots = None if rows is None else Rows(tuple(rows.slots[i] for i in group))
                longest = max(lengths[i] for i in group)
                with routed(slots, None):
                    outputs.append(model(**_some_rows(kwargs, group, len(lengths), longest)))
        finally:
            busy = False
        back = torch.argsort(torch.tensor([i for group in groups for i in group]))
        return _joined(outputs, back, width)

    forward.packed = True  # type: ignore[attr-defined]
    with replaced_forward(model, forward):
        yield


def _some_rows(
    kwargs: Mapping[str, Any], group: list[int], num_rows: int, longest: int
) -> dict[str, Any]:
    index = torch.tensor(group)
    found = {}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == num_rows:
            value = value[index.to(value.device)]
            if name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
                value = value[:, :longest]
        found[name] = value
    return found


def _joined(outputs: list[Any], back: Tensor, width: int) -> Any:
    """The outputs of the groups as one, rows in their old order, padded with zeros again."""
    if isinstance(outputs[0], Tensor):
        return _stacked(outputs, back, width)
    names = [k for k, v in outputs[0].items() if isinstance(v, Tensor) and v.dim() > 1]
    return type(outputs[0])(**{k: _stacked([o[k] for o in outputs], back, width) for k in names})


def _stacked(parts: list[Tensor], back: Tensor, width: int) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        parts = [
            nn.functional.pad(part, (0, 0) * (part.dim() - 2) + (0, width - part.shape[1]))
            for part in parts
        ]
    return torch.cat(parts)[back.to(parts[0].device)]
