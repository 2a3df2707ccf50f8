"""The methods that a recipe's blocks name, and the blocks as the arguments of the verbs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foretune import methods
from foretune.errors import UserError
from foretune.recipes.blocks import AdaptBlock, RetrainBlock
from foretune.run import Run, check_list


@dataclass(frozen=True, kw_only=True)
class MethodEntry:
    """One item of `retrain.methods`.

    Args:
        name: The displayed name, unique within the recipe.
        method: Name of the registered method.
        fields: Fields of the method that the recipe sets.
        rates: Learning rates to try; empty for the method's default.
        search: Values to try of other fields, each with each rate; `lora.r` is a key of `lora`.
    """

    name: str
    method: str
    fields: dict[str, Any]
    rates: list[float]
    search: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """The settings to try, by field; a single one (possibly empty) if nothing is searched."""
        rates = self.rates if takes_rate(self.method) else []
        grid = {**({"learning_rate": rates} if rates else {}), **self.search}
        return [
            dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
        ]

    def record(self, settings: Mapping[str, Any] | None = None) -> Any:
        """The method with these settings beside its fields.

        Raises:
            UserError: The method has no such field, or the value is out of range.
        """
        return methods.make(self.method, **self.fields_with(settings or {}))

    def fields_with(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The fields with these settings.

        Raises:
            UserError: A dotted key is not inside a block of keys.
        """
        fields = dict(self.fields)
        for key, value in settings.items():
            name, _, inner = key.partition(".")
            if inner and name not in fields:
                fields[name] = getattr(methods.make(self.method, **self.fields), name, None)
            if inner and not isinstance(fields[name], Mapping):
                raise UserError(f'{self.name}: search has "{key}", and {name} is no block of keys')
            fields[name] = {**fields[name], inner: value} if inner else value
        return fields

    def name_with(self, settings: Mapping[str, Any]) -> str:
        """The name of a trial with these settings; that of the entry for the only one."""
        if len(self.trials) == 1:
            return self.name
        rate = [f"{settings['learning_rate']:g}"] if "learning_rate" in settings else []
        others = [f"{key}={settings[key]}" for key in settings if key != "learning_rate"]
        return " ".join([self.name, *rate, *others])


def parse_entry(item: Any, rates: list[float]) -> MethodEntry:
    """The entry of an item of `retrain.methods`.

    Args:
        item: A name, or a mapping of one name to its fields.
        rates: The learning rates of an item without any of its own.

    Raises:
        UserError: The item is neither, or its rates or search are not lists.
    """
    method, fields = _name_and_fields(item, "retrain.methods", "{peft-ml: {penalty: 0.1}}")
    name = fields.pop("as", method)
    method_rates = check_list(f"{name}.learning_rates", fields.pop("learning_rates", None) or [])
    if "learning_rate" in fields:
        method_rates = [fields.pop("learning_rate")]
    search = fields.pop("search", None) or {}
    if not isinstance(search, dict) or any(
        not isinstance(v, list) or not v for v in search.values()
    ):
        raise UserError(
            f"{name}.search must map fields to lists of values, such as {{penalty: [0, 0.1]}}; got "
            f"{search!r}"
        )
    if "learning_rate" in search:
        raise UserError(f"{name}.search has learning_rate: set {name}.learning_rates instead")
    return MethodEntry(
        name=str(name), method=method, fields=fields, rates=method_rates or rates, search=search
    )


def _name_and_fields(item: Any, key: str, example: str) -> tuple[str, dict[str, Any]]:
    """The name of a method and its fields, from a name or from a mapping with one key.

    Raises:
        UserError: It is neither.
    """
    if isinstance(item, str):
        return item, {}
    fields = next(iter(item.values()), None) if isinstance(item, dict) else None
    if not isinstance(item, dict) or len(item) != 1 or not isinstance(fields, (dict, type(None))):
        raise UserError(
            f"an item of {key} is a name, or one name with its fields ({example}); got {item!r}"
        )
    return next(iter(item)), dict(fields or {})


def adapt_methods(block: AdaptBlock) -> list[tuple[str, dict[str, Any]]]:
    """(name, fields) of the methods to choose among, or of the only one.

    Raises:
        UserError: An item is not a name, or a name with its fields.
    """
    items = [
        _name_and_fields(item, "adapt.methods", "{basis: {strength: 3}}") for item in block.items
    ]
    lora = {} if block.lora is None else {"lora": block.lora}
    return [(name, {**(lora if name == "lora" else {}), **fields}) for name, fields in items]


def adapt_record(block: AdaptBlock) -> Any:
    """The adapt method where it is fixed: LoRA, if the block does not name it."""
    lora = {} if block.lora is None else {"lora": block.lora}
    rate = {"learning_rate": block.rates[0]} if block.rates else {}
    return methods.make(block.method or "lora", **{**lora, **block.fields, **rate})


def run_of(block: RetrainBlock | AdaptBlock, **more: Any) -> Run:
    """A block as a `Run`.

    Args:
        block: The block.
        **more: Other fields of `Run`.

    Raises:
        UserError: A value is out of range.
    """
    names = set(Run.__dataclass_fields__)
    return Run(**{**block.model_dump(include=names), **more})


def takes_rate(method: str) -> bool:
    """Whether the method has a learning rate ("none" has not)."""
    return "learning_rate" in class_of(method).__dataclass_fields__


def class_of(method: str) -> Any:
    """The class of a method, with its class attributes."""
    return methods.method_class(method)
