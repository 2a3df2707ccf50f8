"""The methods: one paper, one file. This is the table that the verbs, the CLI and the docs read."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from foretune.errors import UserError, did_you_mean

METHODS = {
    "none": "foretune.methods.none:NoRetraining",
    "standard": "foretune.methods.standard:Standard",
    "peft-ml": "foretune.methods.peft_ml:PEFTML",
    "reptile": "foretune.methods.reptile:Reptile",
    "fomaml": "foretune.methods.fomaml:FOMAML",
    "auto": "foretune.methods.auto:Auto",
    "full": "foretune.methods.full:Full",
    "head": "foretune.methods.head:Head",
    "lora": "foretune.methods.lora:LoRA",
    "fd-align": "foretune.methods.fd_align:FDAlign",
    "subspace-sfda": "foretune.methods.subspace_sfda:SubspaceSFDA",
    "sara": "foretune.methods.sara:SaRA",
    "forecast-peft": "foretune.methods.forecast_peft:ForecastPEFT",
    "eft": "foretune.methods.eft:EFT",
    "rtd": "foretune.methods.rtd:RTD",
    "uncurl": "foretune.methods.uncurl:UNCURL",
    "random-experts": "foretune.methods.random_experts:RandomExperts",
    "frequency": "foretune.methods.frequency:Frequency",
    "hc-smoe": "foretune.methods.hc_smoe:HCSMoE",
    "reap": "foretune.methods.reap:REAP",
    "smile": "foretune.methods.smile:SMILE",
    "average": "foretune.methods.average:Average",
    "task-arithmetic": "foretune.methods.task_arithmetic:TaskArithmetic",
    "ties": "foretune.methods.ties:TIES",
}


def method_class(name: str) -> type:
    """The record class of a method.

    Raises:
        UserError: No method of that name.

    >>> method_class("peft-ml").label
    'PEFT-ML'
    """
    if name not in METHODS:
        raise UserError(
            f'no method "{name}"; known: {", ".join(METHODS)}.{did_you_mean(name, METHODS)}'
        )
    module, _, cls = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def make(name: str, **fields: Any) -> Any:
    """A method's record with some fields set.

    Raises:
        UserError: No such method, no such field, or a value out of range.

    >>> make("peft-ml", learning_rate=1e-4).learning_rate
    0.0001
    """
    cls = method_class(name)
    known = [f.name for f in dataclasses.fields(cls)]
    for field in fields:
        if field not in known:
            have = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f'{name} has no field "{field}"; {have}.{did_you_mean(field, known)}')
    return cls(**fields)
