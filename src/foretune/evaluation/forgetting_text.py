"""What became of general texts and benchmarks, as tables and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

QUESTION = "Did retraining hurt what the model could do?"
ADVICE = (
    "A base between the model as it was and the retrained one may keep more of both: standard and "
    "peft-ml take interpolate, such as {interpolate: 0.5}."
)


def forgetting_rows(measure: Mapping[str, Any], labels: Mapping[str, str]) -> list[list[str]]:
    """The table: a header, the model as it was, and a row per base.

    Args:
        measure: One of the measures in the record of a comparison.
        labels: Name of a base → its label.
    """
    header = [f"{measure['name']}, {measure['metric']}", "base", "change", "adapted", "change"]
    before = ["the model as it was", _level(measure["before"]), "", "", ""]
    rows = [
        [
            labels.get(row["name"], row["name"]),
            _level(row["base"]),
            _interval(row["base_change"]),
            _level(row["adapted"]) if "adapted" in row else "",
            _interval(row["adapted_change"]) if "adapted" in row else "",
        ]
        for row in measure["bases"]
    ]
    return [header, before, *rows]


def forgetting_sentences(
    measures: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> list[str]:
    """Which bases became worse at what, a sentence for each measure, and what may be done.

    >>> worse = {"name": "standard", "base_change": {"mean": -0.2, "low": -0.3, "high": -0.1}}
    >>> about = {"name": "general texts", "metric": "log-likelihood per token"}
    >>> forgetting_sentences([{**about, "higher_is_better": True, "bases": [worse]}], {})[0]
    'On general texts standard became worse (log-likelihood per token −0.2).'
    """
    sentences, any_worse = [], False
    for measure in measures:
        worse = [
            f"{labels.get(row['name'], row['name'])} became worse ({measure['metric']} "
            f"{_signed(row['base_change']['mean'], '.2g')})"
            for row in measure["bases"]
            if is_worse(measure, row["base_change"])
        ]
        any_worse = any_worse or bool(worse)
        what = ", ".join(worse) or "no base clearly became worse"
        sentences.append(f"On {measure['name']} {what}.")
    return [*sentences, ADVICE] if any_worse else sentences


def is_worse(measure: Mapping[str, Any], change: Mapping[str, Any]) -> bool:
    """Whether a change is clearly for the worse: its interval does not reach zero."""
    if change["low"] is None:
        return False
    return bool(change["high"] < 0 if measure["higher_is_better"] else change["low"] > 0)


def _level(score: float) -> str:
    return f"{score:.3f}".replace("-", "−")


def _signed(value: float, digits: str = ".3f") -> str:
    return f"{value:+{digits}}".replace("-", "−")


def _interval(change: Mapping[str, Any]) -> str:
    mean = _signed(change["mean"])
    if change["low"] is None:
        return mean
    return f"{mean} ({_signed(change['low'])} to {_signed(change['high'])})"
