"""Every form of each retrain method, with learning rates that suit the linear family."""

from __future__ import annotations

import pytest

EPISODIC = [{"inner": "all", "inner_steps": 3}, {"inner": "adapter", "inner_steps": 3}]
FAST = {"learning_rate": 0.03}
PEFT_ML = {**FAST, "adapter_learning_rate": 0.03, "lora": {"r": 1, "lora_alpha": 1}}
PEFT_ML_BOTH = ("peft-ml", {**PEFT_ML, "form": "both"})
PEFT_ML_SPARSE = ("peft-ml", {**PEFT_ML, "form": "sparse", "fraction": 0.3})
FORMS = [
    ("none", {}),
    ("standard", FAST),
    ("peft-ml", {**FAST, "adapter_learning_rate": 0.03, "lora": {"r": 1, "lora_alpha": 1}}),
    ("peft-ml", {**FAST, "adapter_learning_rate": 0.03, "form": "last-layer"}),
    PEFT_ML_BOTH,
    PEFT_ML_SPARSE,
    ("peft-ml", {**PEFT_ML, "penalty": 0.1}),
    ("factorised-heads", {**FAST, "adapter_learning_rate": 0.03, "num_factors": 3}),
    ("peft-ml", {**PEFT_ML, "adapter_dropout": 0.5}),
    ("peft-ml", {**PEFT_ML, "restart_every": 3}),
    ("peft-ml", {**PEFT_ML, "interpolate": 0.5}),
    ("standard", {**FAST, "interpolate": 0.5}),
    ("standard", {**FAST, "average": 0.5}),
    ("peft-ml", {**PEFT_ML, "average": 0.5}),
    ("fomaml", {**FAST, "inner_learning_rate": 0.03, "inner_steps": 3, "average": 0.5}),
    (
        "auto",
        {
            "candidates": [{"name": "none"}, {"name": "standard", **FAST}],
            "rounds": 1,
            "shots": [4],
            "adapt_run": {"steps": 2, "device": "cpu"},
        },
    ),
    *[
        (name, {**FAST, "inner_learning_rate": 0.03, "lora": {"r": 1, "lora_alpha": 1}, **form})
        for name in ("reptile", "fomaml")
        for form in EPISODIC
    ],
]
TRAINED_FORMS = FORMS[1:]

VARIANTS = ("penalty", "adapter_dropout", "restart_every", "interpolate", "average")


def named(forms):
    return [
        pytest.param(
            name,
            fields,
            id="-".join(
                [name, *[str(fields[k]) for k in ("form", "inner") if k in fields]]
                + [k for k in VARIANTS if k in fields]
            ),
        )
        for name, fields in forms
    ]
