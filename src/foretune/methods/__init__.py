"""The methods: one paper, one file. This is the table that the verbs, the CLI and the docs read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from foretune.entry_points import entry_point
from foretune.errors import UserError, did_you_mean
from foretune.method import wrong_verb

METHODS = {
    "none": "foretune.methods.none:NoRetraining",
    "standard": "foretune.methods.standard:Standard",
    "peft-ml": "foretune.methods.peft_ml:PEFTML",
    "factorised-heads": "foretune.methods.factorised_heads:FactorisedHeads",
    "reptile": "foretune.methods.reptile:Reptile",
    "fomaml": "foretune.methods.fomaml:FOMAML",
    "auto": "foretune.methods.auto:Auto",
    "full": "foretune.methods.full:Full",
    "head": "foretune.methods.head:Head",
    "lora": "foretune.methods.lora:LoRA",
    "basis": "foretune.methods.basis:FromBasis",
    "fd-align": "foretune.methods.fd_align:FDAlign",
    "subspace-sfda": "foretune.source_free.subspace_sfda:SubspaceSFDA",
    "sara": "foretune.methods.sara:SaRA",
    "forecast-peft": "foretune.forecasting.forecast_peft:ForecastPEFT",
    "eft": "foretune.decoding.eft:EFT",
    "rtd": "foretune.decoding.rtd:RTD",
    "uncurl": "foretune.pruning.uncurl:UNCURL",
    "random-experts": "foretune.pruning.random_experts:RandomExperts",
    "frequency": "foretune.pruning.frequency:Frequency",
    "hc-smoe": "foretune.pruning.hc_smoe:HCSMoE",
    "reap": "foretune.pruning.reap:REAP",
    "smile": "foretune.fusion.smile:SMILE",
    "average": "foretune.fusion.average:Average",
    "task-arithmetic": "foretune.fusion.task_arithmetic:TaskArithmetic",
    "ties": "foretune.fusion.ties:TIES",
}


def method_class(name: str) -> type:
    """The record class of a method.

    Raises:
        UserError: There is no method of that name.

    >>> method_class("peft-ml").label
    'PEFT-ML'
    """
    if name not in METHODS:
        raise UserError(
            f'no method "{name}"; known: {", ".join(METHODS)}.{did_you_mean(name, METHODS)}'
        )
    record_class: type = entry_point(METHODS[name])
    return record_class


def methods_of(verb: str) -> list[str]:
    """The names of the methods that a verb takes.

    >>> methods_of("retrain")[:2]
    ['none', 'standard']
    """
    classes: dict[str, Any] = {name: method_class(name) for name in METHODS}
    return [name for name, record_class in classes.items() if record_class.verb == verb]


def method_class_of(name: str, verb: str) -> Any:
    """The record class of a method that `verb` takes.

    Raises:
        UserError: No method of that name, or one of another verb.

    >>> method_class_of("lora", "adapt").label
    'LoRA'
    """
    if name not in METHODS:
        names = methods_of(verb)
        raise UserError(
            f'no method "{name}" for {verb}; methods for {verb}: {", ".join(names)}.'
            f"{did_you_mean(name, names)}"
        )
    record_class: Any = method_class(name)
    if record_class.verb != verb:
        message = wrong_verb(name, record_class.verb, verb)
        raise UserError(f"{message}; methods for {verb}: {', '.join(methods_of(verb))}")
    return record_class


def make(name: str, **fields: Any) -> Any:
    """A method's record with some fields set.

    Raises:
        UserError: No such method, no such field, or a value out of range.

    >>> make("peft-ml", learning_rate=1e-4).learning_rate
    0.0001
    """
    record_class = method_class(name)
    field_names = [f.name for f in dataclasses.fields(record_class)]
    for field in fields:
        if field not in field_names:
            have = f"it has {', '.join(field_names)}" if field_names else "it has none"
            raise UserError(
                f'{name} has no field "{field}"; {have}.{did_you_mean(field, field_names)}'
            )
    return record_class(**fields)


def fields_of(method: Any) -> dict[str, Any]:
    """The name and the fields of a method's record that differ from its defaults.

    Args:
        method: The record, or a mapping of its "name" and fields, which is returned as it is.

    Raises:
        UserError: It is neither.

    >>> fields_of(make("peft-ml", learning_rate=1e-4, penalty=0.1))
    {'name': 'peft-ml', 'penalty': 0.1}
    """
    if dataclasses.is_dataclass(method) and not isinstance(method, type):
        record: Any = method
        default = type(record)().to_dict()
        return {k: v for k, v in record.to_dict().items() if k == "name" or v != default.get(k)}
    if not isinstance(method, Mapping) or not isinstance(method.get("name"), str):
        raise UserError(f'a method is a record, or a mapping with its "name"; got {method!r}')
    return dict(method)
