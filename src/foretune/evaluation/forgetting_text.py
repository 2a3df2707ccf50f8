"""What became of general texts, as a table and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUESTION = "Did retraining hurt what the model could do?"


def forgetting_rows(forgetting: Mapping[str, Any], labels: Mapping[str, str]) -> list[list[str]]:
    """The table: a header, the model as it was, and a row per base.

    Args:
        forgetting: The record in a comparison.
        labels: Name of a base → its label.
    """
    header = ["general texts, log-likelihood per token", "base", "change", "adapted", "change"]
    before = ["the model as it was", _level(forgetting["before"]), "", "", ""]
    rows = [
        [
            labels.get(row["name"], row["name"]),
            _level(row["base"]),
            _interval(row["base_change"]),
            _level(row["adapted"]) if "adapted" in row else "",
            _interval(row["adapted_change"]) if "adapted" in row else "",
        ]
        for row in forgetting["bases"]
    ]
    return [header, before, *rows]


def forgetting_sentence(forgetting: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Which bases fell, and what may be done about it.

    >>> fell = {"name": "standard", "base_change": {"mean": -0.2, "low": -0.3, "high": -0.1}}
    >>> forgetting_sentence({"bases": [fell]}, {})[:55]
    'On general texts standard fell (by 0.2 nats per token).'
    """
    fallen = [row for row in forgetting["bases"] if row["base_change"]["high"] < 0]
    if not fallen:
        return "On general texts no base clearly fell."
    names = ", ".join(
        f"{labels.get(row['name'], row['name'])} fell (by {-row['base_change']['mean']:.2g} nats "
        "per token)"
        for row in fallen
    )
    return (
        f"On general texts {names}. A base between the model as it was and the retrained one may "
        "keep more of both: standard and peft-ml take interpolate, such as {interpolate: 0.5}."
    )


def _level(score: float) -> str:
    return f"{score:.3f}".replace("-", "−")


def _interval(interval: Mapping[str, float]) -> str:
    mean, low, high = (f"{interval[k]:+.3f}".replace("-", "−") for k in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"
