"""Tensors in nested arguments and outputs: tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]  # keys that lead to a tensor, from the outside in


def tensors_in(value: Any) -> dict[Path, Tensor]:
    """The tensors in a nested value, by path; anything else is left out.

    >>> list(tensors_in({"a": (1, Tensor([2.0])), "b": None}))
    [('a', 1)]
    """
    if isinstance(value, Tensor):
        return {(): value}
    return {
        (key, *path): tensor
        for key, part in _parts(value)
        for path, tensor in tensors_in(part).items()
    }


def with_tensors(value: Any, change: Callable[[Path, Tensor], Any], path: Path = ()) -> Any:
    """The same nested value with `change(path, tensor)` in the place of each of its tensors."""
    if isinstance(value, Tensor):
        return change(path, value)
    parts = {key: with_tensors(part, change, (*path, key)) for key, part in _parts(value)}
    if not parts:
        return value
    if isinstance(value, Mapping):
        return type(value)(**parts) if dataclasses.is_dataclass(value) else type(value)(parts)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **parts)  # type: ignore[type-var]
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*parts.values())
    return type(value)(parts.values())


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """(key, part) of a tuple, list, mapping or dataclass; nothing of anything else."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield f.name, getattr(value, f.name)
