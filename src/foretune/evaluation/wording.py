"""One wording everywhere for scores, differences and numbers of shots."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

MINUS = "−"
AS_IT_IS = "the model as it is"


@dataclasses.dataclass(frozen=True)
class Scale:
    """The unit of a metric: accuracy in percent and points, all other metrics unscaled.

    Args:
        metric: The metric's name, such as "accuracy" or "log-likelihood per token".

    >>> Scale("accuracy").signed(0.055, unit=True), Scale("accuracy").level(0.441)
    ('+5.5 points', '44.1')
    >>> Scale("negative squared error").interval(-0.25, 1.5)
    '−0.250 to +1.50'
    """

    metric: str

    @property
    def factor(self) -> float:
        """The factor between a score and its written value."""
        return 100.0 if self.metric == "accuracy" else 1.0

    @property
    def axis(self) -> str:
        """Title of an axis or table column of scores: the metric with its unit."""
        return "accuracy, %" if self.metric == "accuracy" else self.metric

    @property
    def difference_axis(self) -> str:
        """Title of an axis or table column of differences: their unit."""
        return "points of accuracy" if self.metric == "accuracy" else self.metric

    def level(self, score: float, *, unit: bool = False) -> str:
        """A score: '44.1', and with `unit` '44.1 %'."""
        text = f"{score * 100:.1f}" if self.factor != 1 else f"{score:#.4g}".rstrip(".")
        return text.replace("-", MINUS) + " %" * (unit and self.factor != 1)

    def signed(self, difference: float, *, unit: bool = False) -> str:
        """A difference with its sign: '+5.5', and with `unit` '+5.5 points'."""
        text = f"{difference * 100:+.1f}" if self.factor != 1 else f"{difference:+#.3g}".rstrip(".")
        if float(text) == 0:
            text = text.lstrip("+-")
        suffix = ("points" if self.factor != 1 else self.metric) if unit else ""
        return f"{text.replace('-', MINUS)} {suffix}".rstrip()

    def interval(self, low: float, high: float) -> str:
        """An interval of a difference: '+2.9 to +8.1'."""
        return f"{self.signed(low)} to {self.signed(high)}"


def shots_order(shots: int | None) -> float:
    """Sort key of a number of shots; None (all examples) comes last."""
    return math.inf if shots is None else shots


def shots_label(shots: int | None, unit: str = "rows") -> str:
    """A number of shots as the title of a column.

    >>> shots_label(0), shots_label(1), shots_label(5, "rows per class"), shots_label(None)
    ('before adapting', '1 row', '5 rows per class', 'all rows')
    """
    if shots is None:
        return "all rows"
    if shots == 0:
        return "before adapting"
    return f"{shots} {unit.replace('rows', 'row', 1) if shots == 1 else unit}"


def shots_phrase(shots: int | None, unit: str = "rows") -> str:
    """A number of shots inside a sentence.

    >>> shots_phrase(0), shots_phrase(16), shots_phrase(5, "rows per class")
    ('before adapting', 'with 16 rows per task', 'with 5 rows per class')
    """
    label = shots_label(shots, unit)
    if shots == 0:
        return label
    return f"with {label}" if " per " in label else f"with {label} per task"


def rows_drawn(numbers: Mapping[int | None, Collection[int]], unit: str = "rows") -> list[str]:
    """What each number of shots came to, where that is not the number itself.

    A task with fewer rows than asked for gives all that it has.

    Args:
        numbers: Training rows of a task in each draw, by the number of shots; None for all rows.
        unit: What shots count.

    >>> rows_drawn({1: [4, 6], 40: [40, 12], 8: [8]}, "rows per class")[0]
    '1 row per class: 4 to 6 rows of a task'
    >>> rows_drawn({40: [40, 12], 8: [8, 8]})
    ['40 rows: 12 to 40 rows of a task']
    """
    parts = []
    for shots, counts in numbers.items():
        low, high = min(counts), max(counts)
        if (low, high) != (shots, shots):
            span = counted(high, "row") if low == high else f"{low} to {counted(high, 'row')}"
            parts.append(f"{shots_label(shots, unit)}: {span} of a task")
    return parts


def adapting_phrase(settings: Sequence[Mapping[str, Any]], unit: str = "rows") -> str:
    """How a base is adapted at each number of shots, as held-out tasks chose.

    Args:
        settings: The settings of a plan (`AdaptPlan.to_dict`).
        unit: What shots count.

    >>> head = {"method": {"name": "head", "learning_rate": 0.01}, "steps": 20}
    >>> few = {"shots": 2, "setting": {**head, "steps": 0}}
    >>> adapting_phrase([few, {"shots": 8, "setting": head}, {"shots": None, "setting": head}])
    'not at all with 2 rows; by head (learning_rate 0.01, 20 steps) with 8 rows, all rows'
    """
    shots_of: dict[str, list[str]] = {}
    for planned in settings:
        label = shots_label(planned["shots"], unit)
        shots_of.setdefault(setting_phrase(planned["setting"]), []).append(label)
    return "; ".join(f"{phrase} with {', '.join(labels)}" for phrase, labels in shots_of.items())


def setting_phrase(setting: Mapping[str, Any]) -> str:
    """A way to adapt (`Setting.to_dict`): its method with the numbers that matter, and its steps.

    >>> basis = {"name": "basis", "strength": 1.0, "free": 0.0, "learning_rate": 0.1}
    >>> setting_phrase({"method": basis, "steps": 40})
    'by basis (strength 1, learning_rate 0.1, 40 steps)'
    >>> setting_phrase({"method": basis, "steps": 0})
    "by the mean of the seen tasks' adapters"
    """
    method, steps = setting["method"], setting["steps"]
    if steps == 0:
        at_mean = method["name"] == "basis"
        return "by the mean of the seen tasks' adapters" if at_mean else "not at all"
    numbers = [
        f"{name} {value:g}"
        for name, value in method.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value
    ]
    return f"by {method['name']} ({', '.join([*numbers, counted(steps, 'step')])})"


def choice_sentences(bases: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each base that `auto` chose: the method that it took, and how clear the choice was.

    >>> above = {"over": "none", "difference": 0.02, "low": -0.01, "high": 0.05, "num_tasks": 9}
    >>> choice_sentences([{"label": "auto", "choices": [{"chosen": "standard", "above": [above]}]}])
    ['auto took standard: not clearly better on 9 held-out seen tasks than none.']
    >>> choice = {"chosen": "standard", "above": [above]}
    >>> choice_sentences([{"label": "auto", "choices": [choice, choice]}])[0][:48]
    'auto took, in 2 retrainings, standard in 2; in 0'
    """
    sentences = []
    for base in bases:
        choices = base.get("choices") or []
        if len(choices) == 1:
            sureness = _sureness(choices[0])
            sentences.append(f"{base['label']} took {choices[0]['chosen']}: {sureness}.")
        elif choices:
            counts = Counter(choice["chosen"] for choice in choices)
            which = ", ".join(f"{name} in {number}" for name, number in counts.most_common())
            clear = sum(all(row["low"] > 0 for row in choice["above"]) for choice in choices)
            sentences.append(
                f"{base['label']} took, in {len(choices)} retrainings, {which}; in {clear} of "
                "them it was clearly better than all others on the held-out seen tasks."
            )
    return sentences


def edge_sentences(bases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which bases took the lowest or the highest learning rate that was tried.

    >>> tried = [{"learning_rate": 1e-4, "score": 0.5}, {"learning_rate": 1e-3, "score": 0.6}]
    >>> retrain = {"learning_rate": 1e-3, "searched": tried}
    >>> edge_sentences([{"label": "A", "retrain": retrain}, {"label": "B", "retrain": retrain}])
    ['A and B took the highest learning rate that was tried, 0.001: a higher one may be better.']
    """
    labels: dict[str, list[str]] = {}
    for base in bases:
        record = base.get("retrain") or {}
        rates = {trial["learning_rate"] for trial in record.get("searched") or []}
        if len(rates) < 2:
            continue
        for extreme, word, beyond in ((min, "lowest", "lower"), (max, "highest", "higher")):
            if record.get("learning_rate") == extreme(rates):
                took = (
                    f"took the {word} learning rate that was tried, {extreme(rates):g}: "
                    f"a {beyond} one may be better."
                )
                labels.setdefault(took, []).append(base["label"])
    return [f"{listed(names)} {took}" for took, names in labels.items()]


def _sureness(choice: Mapping[str, Any]) -> str:
    level = [row["over"] for row in choice["above"] if row["low"] <= 0]
    number = max((row["num_tasks"] for row in choice["above"]), default=0)
    on = f"on {counted(number, 'held-out seen task')}"
    if level:
        return f"not clearly better {on} than {', '.join(level)}"
    return f"clearly better {on} than all others"


def counted(number: int, noun: str) -> str:
    """A number with its noun, in the singular or plural.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names as a list in a sentence: the first ones, and the number of further ones.

    >>> listed(["a", "b", "c"]), listed(["a", "b", "c"], most=2)
    ('a, b and c', 'a, b and 1 more')
    """
    *others, last = names if len(names) <= most else [*names[:most], f"{len(names) - most} more"]
    return f"{', '.join(others)} and {last}" if others else last


def p_text(p_value: float) -> str:
    """A p-value: '0.031', or '<0.001' for all smaller ones."""
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"
