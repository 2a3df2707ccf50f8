"""The first sentence of a report: which base to take, or that the data cannot tell.

The rule, at one number of shots:

- A difference is *clear* when its 95 % interval excludes zero and its Holm-corrected p-value is
  below 0.05. (The interval covers tasks and repeats; the correction guards against picking the
  luckiest of many pairs, and the signed-rank test in the p-value against too few tasks.)
- A base is *proven* when it is clearly above every control other than itself: above the model as it
  is and above standard retraining. Without controls, it must beat all other bases.
- The proven base with the highest mean is taken.
- If none is proven and the model as it is has the highest mean, it is kept.
- Otherwise the data cannot tell.

Whatever the verdict, it names every base with its difference, losing bases included.

With one repeat, each method is a single checkpoint. Another seed, or another outcome of the
searches, may rank the methods differently, and by how much the data cannot say. The sentence then
is about these checkpoints and never about a method.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from foretune.evaluation.wording import AS_IT_IS, Scale, counted, p_text, shots_order, shots_phrase

UNTOUCHED = "none"
CONTROLS = (UNTOUCHED, "standard")
ALPHA = 0.05
REPEAT = "another retraining may rank them differently: run with seeds=3"


def tasks_needed(num_pairs: int) -> int:
    """The fewest tasks with which one of `num_pairs` pairs can be clear.

    The smallest p-value of a two-sided signed-rank test of n tasks is 2 / 2ⁿ, and Holm's correction
    multiplies the smallest of all p-values by their number.

    >>> tasks_needed(1), tasks_needed(6), tasks_needed(28)
    (6, 8, 11)
    """
    return math.floor(math.log2(2 * num_pairs / ALPHA)) + 1


@dataclasses.dataclass(frozen=True)
class Contrast:
    """One pair, read from base `a`."""

    a: str
    b: str
    difference: float
    low: float
    high: float
    p_holm: float
    wins: int
    losses: int
    ties: int
    num_tasks: int
    num_seeds: int

    @property
    def better(self) -> bool:
        """Whether a is clearly above b."""
        return self.low > 0 and self.p_holm < ALPHA

    @property
    def worse(self) -> bool:
        """Whether a is clearly below b."""
        return self.high < 0 and self.p_holm < ALPHA

    def flipped(self) -> Contrast:
        """The same pair read from b."""
        return dataclasses.replace(
            self,
            a=self.b,
            b=self.a,
            difference=-self.difference,
            low=-self.high,
            high=-self.low,
            wins=self.losses,
            losses=self.wins,
        )


def contrast(
    pairs: Sequence[Mapping[str, Any]], a: str, b: str, shots: int | None
) -> Contrast | None:
    """The pair of `a` and `b` read as a − b, in whichever order it is stored; None if missing."""
    names = [field.name for field in dataclasses.fields(Contrast)]
    for pair in pairs:
        if pair["shots"] == shots and {pair["a"], pair["b"]} == {a, b}:
            stored = Contrast(**{name: pair[name] for name in names})
            return stored if stored.a == a else stored.flipped()
    return None


def verdict(
    pairs: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, Any]],
    bases: Sequence[Mapping[str, Any]],
    shots: int | None = None,
    *,
    metric: str = "accuracy",
    shots_unit: str = "rows",
) -> dict[str, Any]:
    """Judges the comparison at one number of shots by the rule above.

    Args:
        pairs: The comparison's `pairs`.
        means: The comparison's `means`.
        bases: The comparison's `bases`, of which `name`, `method` and `label` are read.
        shots: Number of shots to judge at; None for the largest finite one, or all examples if
            nothing else was measured.
        metric: The metric's name; accuracy is written in points.
        shots_unit: "rows" or "rows per class".

    Returns:
        best (the name of a base, or None), shots, sentence, and what it is about: "methods", or
        "checkpoints" where each method was retrained once.

    Raises:
        ValueError: Nothing was measured at `shots`.
    """
    measured = sorted({row["shots"] for row in means}, key=shots_order)
    if shots is None:
        shots = max((k for k in measured if k), default=None if None in measured else 0)
    if shots not in measured:
        raise ValueError(f"nothing was measured at {shots} shots; there are {measured}")
    return _Judge(pairs, means, bases, shots, Scale(metric), shots_unit).verdict()


class _Judge:
    """The verdict at one number of shots."""

    def __init__(
        self,
        pairs: Sequence[Mapping[str, Any]],
        means: Sequence[Mapping[str, Any]],
        bases: Sequence[Mapping[str, Any]],
        shots: int | None,
        scale: Scale,
        shots_unit: str,
    ) -> None:
        self.pairs, self.shots, self.scale, self.shots_unit = pairs, shots, scale, shots_unit
        self.num_pairs = sum(pair["shots"] == shots for pair in pairs)
        self.retrained_once = {p["num_seeds"] for p in pairs if p["shots"] == shots} == {1}
        self.tasks_needed = tasks_needed(max(self.num_pairs, 1))
        rows = {row["base"]: row for row in means if row["shots"] == shots}
        measured = {base["name"]: base for base in bases if base["name"] in rows}
        methods = {name: base["method"] for name, base in measured.items()}
        self.rows = rows
        self.labels = {
            name: AS_IT_IS if base["method"] == "none" else base["label"]
            for name, base in measured.items()
        }
        self.ranked = sorted(measured, key=lambda name: -rows[name]["mean"])
        self.as_it_is = [name for name in measured if methods[name] == "none"]
        self.controls = [
            name for control in CONTROLS for name in measured if methods[name] == control
        ]

    def verdict(self) -> dict[str, Any]:
        """The best base (or None), the number of shots and the sentence."""
        best, sentence = self._decide()
        subject = "checkpoints" if self.retrained_once else "methods"
        return {"best": best, "shots": self.shots, "about": subject, "sentence": sentence}

    def _decide(self) -> tuple[str | None, str]:
        top = self.ranked[0]
        if len(self.ranked) == 1:
            return None, self._alone(top)
        for name in self.ranked:
            if name not in self.as_it_is and self._proven(name):
                start = "Of these checkpoints take" if self.retrained_once else "Take"
                return name, f"{start} {self._subject(name)}: {self._margins(name)}"
        if top in self.as_it_is:
            none = "none of these checkpoints" if self.retrained_once else "no retraining"
            sentence = f"Keep the model as it is: {none} beats it {self._where(top)}."
            return top, sentence + self._others(top, self.ranked)
        start = "The data cannot tell: " + "of these checkpoints " * self.retrained_once
        return None, f"{start}{self._subject(top)} has the highest mean, {self._margins(top)}"

    def _subject(self, name: str) -> str:
        """A base in the verdict: a method, or the one checkpoint of it that was measured."""
        of = "the one of " if self.retrained_once and name not in self.as_it_is else ""
        return f"{of}{self.labels[name]}"

    def _rivals(self, name: str) -> list[str]:
        """The bases that `name` has to beat."""
        controls = [control for control in reversed(self.controls) if control != name]
        return controls or [rival for rival in self.ranked if rival != name]

    def _contrasts(self, name: str, rivals: Sequence[str]) -> list[Contrast]:
        pairs = [contrast(self.pairs, name, rival, self.shots) for rival in rivals]
        return [pair for pair in pairs if pair is not None]

    def _proven(self, name: str) -> bool:
        rivals = self._rivals(name)
        pairs = self._contrasts(name, rivals)
        return len(pairs) == len(rivals) and all(pair.better for pair in pairs)

    def _margins(self, name: str) -> str:
        """'+5.5 points over Standard (95 % interval …), with 16 rows ….' and all other bases."""
        rivals = self._rivals(name)
        parts: list[str] = []
        for pair in self._contrasts(name, rivals):
            first = not parts
            difference = self.scale.signed(pair.difference, unit=first)
            interval = "95 % interval " * first + self._interval(pair)
            parts.append(f"{difference} over {self._subject(pair.b)} ({interval})")
        others = [base for base in self.ranked if base not in rivals]
        return f"{' and '.join(parts)}, {self._where(name)}.{self._others(name, others)}"

    def _others(self, name: str, others: Sequence[str]) -> str:
        """' Clearly behind it: …. Not clearly different from it: ….', with the differences."""
        pairs = self._contrasts(name, [rival for rival in others if rival != name])
        behind = [pair for pair in pairs if pair.better]
        level = [pair for pair in pairs if not pair.better]
        text = ""
        for title, members in (("Clearly behind it", behind), ("Not clearly different", level)):
            listed = [
                f"{self.labels[pair.b]} {self.scale.signed(-pair.difference, unit=index == 0)} "
                f"({self._interval(pair.flipped())})"
                for index, pair in enumerate(members)
            ]
            text += f" {title}: {', '.join(listed)}." if listed else ""
        return text

    def _interval(self, pair: Contrast) -> str:
        """The interval; with the p-value if the two disagree on whether the difference is clear."""
        text = self.scale.interval(pair.low, pair.high)
        excludes_zero = pair.low > 0 or pair.high < 0
        if excludes_zero and pair.p_holm >= ALPHA and pair.num_tasks >= self.tasks_needed:
            text += f", but p = {p_text(pair.p_holm)} after Holm's correction"
        return text

    def _where(self, name: str) -> str:
        """'with 16 rows per task, 24 unseen tasks, 3 repeats'."""
        pairs = self._contrasts(name, [rival for rival in self.ranked if rival != name])
        where = shots_phrase(self.shots, self.shots_unit)
        if not pairs:
            return where
        tasks = min(pair.num_tasks for pair in pairs)
        repeats = min(pair.num_seeds for pair in pairs)
        few = (
            f" (fewer than {self.tasks_needed}: with {counted(self.num_pairs, 'pair')} compared, "
            "too few to be sure of anything)"
        )
        return (
            f"{where}, {counted(tasks, 'unseen task')}{few if tasks < self.tasks_needed else ''}, "
            f"{counted(repeats, 'repeat')}" + f"; {REPEAT}" * self.retrained_once
        )

    def _alone(self, name: str) -> str:
        row = self.rows[name]
        mean, low, high = (self.scale.level(row[key]) for key in ("mean", "low", "high"))
        return (
            f"Only {self.labels[name]} was measured, so there is nothing to compare: mean "
            f"{self.scale.axis} {mean} (95 % interval {low} to {high}), "
            f"{shots_phrase(self.shots, self.shots_unit)}."
        )
