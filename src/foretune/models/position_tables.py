"""Layers that read a table shared by all rows, in a batch that mixes tasks.

DeBERTa and its relatives project one table of relative positions by adapted layers and add the
result to the scores of all rows. Only that part is computed for each task on its own: everything
else runs on the rows of all tasks together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foretune.models.layout import RowSlots
from foretune.models.routing import current_packing, current_rows, routed
from foretune.models.row_dropout import draws_of_parts

# Methods (queries, keys, …) → scores. DeBERTa has the first; v2, v3 and SEW-D have the second.
METHODS = ("disentangled_att_bias", "disentangled_attention_bias")


@contextlib.contextmanager
def table_per_slot(model: nn.Module) -> Iterator[None]:
    """Inside the block each task's rows get position scores by the task's own adapters."""
    patched: list[tuple[nn.Module, str]] = []
    try:
        for module in model.modules():
            for name in METHODS:
                if callable(getattr(type(module), name, None)) and name not in vars(module):
                    setattr(module, name, _per_slot(getattr(module, name)))
                    patched.append((module, name))
        yield
    finally:
        for module, name in patched:
            delattr(module, name)


def _per_slot(scores: Callable[..., Any]) -> Callable[..., Any]:
    """The same method, called once for each slot with the rows of it."""

    def call(queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = current_rows()
        if rows is None or current_packing() is not None:
            return scores(queries, keys, *args, **kwargs)
        if len(rows.present) == 1:
            with routed(RowSlots(rows.present), None), draws_of_parts()(None):
                return scores(queries, keys, *args, **kwargs)
        queries, keys = (x.unflatten(0, (len(rows.slots), -1)) for x in (queries, keys))
        outputs, part_of = [], draws_of_parts()
        for slot, index in rows.places.items():
            part = index.to(queries.device)
            with routed(RowSlots((slot,)), None), part_of(None):
                outputs.append(
                    scores(queries[part].flatten(0, 1), keys[part].flatten(0, 1), *args, **kwargs)
                )
        back = torch.argsort(torch.cat(list(rows.places.values()))).to(queries.device)
        by_row = [
            y.unflatten(0, (len(i), -1)) for y, i in zip(outputs, rows.places.values(), strict=True)
        ]
        return torch.cat(by_row)[back].flatten(0, 1)

    return call
