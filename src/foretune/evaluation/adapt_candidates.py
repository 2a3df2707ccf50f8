"""The ways to adapt among which held-out tasks choose: records of methods, the simplest first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from foretune.entry_points import entry_point
from foretune.errors import UserError
from foretune.training.methods import AdaptMethod, RetrainMethod

# What is tried of a method where nothing is set: field → values.
GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "basis": {"free": (0, 1), "strength": (10.0, 3.0, 1.0, 0.3)},
    "head": {"learning_rate": (3e-3, 1e-2, 3e-2)},
    "lora": {"learning_rate": (1e-3, 3e-3, 1e-2)},
}
SIMPLEST = ("basis", "head", "lora")  # then all others, in the order in which they are listed

Entry = str | Mapping[str, Mapping[str, Any] | None] | AdaptMethod


def candidates(
    methods: Sequence[Entry],
    learning_rates: Sequence[float] = (),
    lora: Mapping[str, Any] | None = None,
) -> list[AdaptMethod]:
    """The records to choose among, the simplest first: basis, head, LoRA, all others.

    Args:
        methods: Names of adapt methods, one-key mappings of a name to its fields, or records. A
            field `search` maps fields to the values to try, as `learning_rate` or `lora.r`; without
            it those of `GRIDS` that are not set are tried. A record is tried as it is.
        learning_rates: Learning rates of all methods without one of their own.
        lora: Fields of `peft.LoraConfig` for all that train one.

    Raises:
        UserError: An unknown method or field, or a value out of range.
    """
    records: list[AdaptMethod] = []
    for entry in methods:
        if isinstance(entry, (str, Mapping)):
            named = {entry: None} if isinstance(entry, str) else entry
            for name, fields in named.items():
                records += _grid(name, dict(fields or {}), learning_rates, lora)
        else:
            records.append(entry)
    names = list(dict.fromkeys([*SIMPLEST, *(record.name for record in records)]))
    return sorted(records, key=lambda record: (names.index(record.name), *_strength(record)))


def _grid(
    name: str,
    fields: dict[str, Any],
    learning_rates: Sequence[float],
    lora: Mapping[str, Any] | None,
) -> list[Any]:
    """The records of one entry: all combinations of the values that are tried.

    Raises:
        UserError: `search` does not map fields to lists of values.
    """
    make: Any = entry_point("foretune.methods:make")
    default = entry_point("foretune.methods:method_class_of")(name, "adapt")()
    grid = dict(GRIDS.get(name, {}))
    if learning_rates and name != "basis":
        grid["learning_rate"] = tuple(learning_rates)
    searched = fields.pop("search", None) or {}
    if not isinstance(searched, Mapping) or not all(
        isinstance(values, (list, tuple)) and values for values in searched.values()
    ):
        raise UserError(f"search of {name} maps fields to lists of values, got {searched!r}")
    grid = {key: values for key, values in grid.items() if key not in fields} | dict(searched)
    if lora is not None and hasattr(default, "lora"):
        fields = {"lora": dict(lora), **fields}
    records = []
    for values in itertools.product(*grid.values()):
        changed = dict(fields)
        for key, value in zip(grid, values, strict=True):
            outer, _, inner = key.partition(".")
            if inner:  # a field of a field, such as lora.r
                mapping = changed.get(outer, getattr(default, outer, None))
                changed[outer] = {**(mapping or {}), inner: value}
            else:
                changed[key] = value
        records.append(make(name, **changed))
    return records


def at_rates(
    adapt: AdaptMethod | Sequence[AdaptMethod], learning_rates: Sequence[float]
) -> AdaptMethod | Sequence[AdaptMethod]:
    """What `search` takes for a method and learning rates: one rate is fixed, several are tried."""
    if isinstance(adapt, Sequence) or not learning_rates:
        return adapt
    record: Any = adapt
    rates = sorted(learning_rates)
    records = [dataclasses.replace(record, learning_rate=rate) for rate in rates]
    return records if len(records) > 1 else records[0]


def _strength(record: Any) -> tuple[float, ...]:
    """Sorts the records of one method: what leaves the start less freedom comes later."""
    lora = getattr(record, "lora", None) or {}
    return (
        getattr(record, "free", 0) or 0,
        lora.get("r", 0) or 0,
        -(getattr(record, "strength", 0) or 0),
        -(getattr(record, "pull", 0) or 0),
        record.learning_rate or 0,
    )


def validation_method(methods: Sequence[AdaptMethod], retrain: RetrainMethod) -> AdaptMethod:
    """The candidate by which a base is validated while it is retrained: one that costs little.

    It is the middle one of the plain method's: of the heads for a base whose tasks differ in their
    heads alone, else of the LoRA adapters; of the other, or of all, where there are none.

    Args:
        methods: The candidates, the simplest first.
        retrain: The retraining method.
    """
    names = ("head", "lora") if retrain.only_heads else ("lora", "head")
    for name in names:
        plain = [method for method in methods if method.name == name]
        if plain:
            return plain[(len(plain) - 1) // 2]
    return methods[(len(methods) - 1) // 2]
