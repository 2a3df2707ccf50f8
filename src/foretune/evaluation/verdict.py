"""The first sentence of a report: which base to take, or that the data cannot tell.

The rule, at one number of shots:

- A difference is *clear* when its 95 % interval leaves out zero and its Holm-corrected p-value is
  below 0.05. (The interval sees tasks and seeds; the test guards against picking the luckiest of
  many pairs, and against too few tasks.)
- A base is *proven* when it is clearly above every control besides itself: above the model as it
  is and above standard retraining. Where it has no control to beat, it must beat all other bases.
- Of the proven bases the one with the highest mean is taken.
- If none is proven and the model as it is has the highest mean, it is kept.
- Otherwise the data cannot tell.

Whatever is said, every base is named with its difference, the losing ones too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from foretune.evaluation.wording import AS_IT_IS, Scale, counted, p_text, shots_order, shots_phrase

CONTROLS = ("none", "standard")
ALPHA = 0.05
FEW_TASKS = 6  # With fewer, no two-sided signed-rank test can fall below 0.05.


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
    """The pair of `a` and `b` read as a − b, whichever way it is stored; None if there is none."""
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
        shots: Where to judge; None for the largest finite number of shots, or all rows where
            nothing else was measured.
        metric: The metric's name; accuracy is written in points.
        shots_unit: "rows" or "rows per class".

    Returns:
        best (a base's name or None), shots, sentence.

    Raises:
        ValueError: Nothing was measured at `shots`.
    """
    known = sorted({row["shots"] for row in means}, key=shots_order)
    if shots is None:
        shots = max((k for k in known if k), default=None if None in known else 0)
    if shots not in known:
        raise ValueError(f"nothing was measured at {shots} shots; there are {known}")
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
        rows = {row["base"]: row for row in means if row["shots"] == shots}
        kept = {base["name"]: base for base in bases if base["name"] in rows}
        self.rows = rows
        self.labels = {
            name: AS_IT_IS if base["method"] == "none" else base["label"]
            for name, base in kept.items()
        }
        self.ranked = sorted(kept, key=lambda name: -rows[name]["mean"])
        self.as_it_is = [name for name in kept if kept[name]["method"] == "none"]
        self.controls = [
            name for method in CONTROLS for name in kept if kept[name]["method"] == method
        ]

    def verdict(self) -> dict[str, Any]:
        best, sentence = self._decide()
        return {"best": best, "shots": self.shots, "sentence": sentence}

    def _decide(self) -> tuple[str | None, str]:
        top = self.ranked[0]
        if len(self.ranked) == 1:
            return None, self._alone(top)
        for name in self.ranked:
            if name not in self.as_it_is and self._proven(name):
                return name, f"Take {self.labels[name]}: {self._margins(name)}"
        if top in self.as_it_is:
            kept = f"Keep the model as it is: no retraining beats it {self._where(top)}."
            return top, kept + self._others(top, self.ranked)
        label = self.labels[top]
        return None, f"The data cannot tell: {label} has the highest mean, {self._margins(top)}"

    def _rivals(self, name: str) -> list[str]:
        """The bases that `name` has to beat."""
        controls = [control for control in reversed(self.controls) if control != name]
        return controls or [other for other in self.ranked if other != name]

    def _contrasts(self, name: str, others: Sequence[str]) -> list[Contrast]:
        found = [contrast(self.pairs, name, other, self.shots) for other in others]
        return [one for one in found if one is not None]

    def _proven(self, name: str) -> bool:
        rivals = self._rivals(name)
        found = self._contrasts(name, rivals)
        return len(found) == len(rivals) and all(one.better for one in found)

    def _margins(self, name: str) -> str:
        """'+5.5 points over Standard (95 % interval …), with 16 rows ….' and all other bases."""
        rivals = self._rivals(name)
        parts: list[str] = []
        for one in self._contrasts(name, rivals):
            first = not parts
            difference = self.scale.signed(one.difference, unit=first)
            interval = "95 % interval " * first + self._interval(one)
            parts.append(f"{difference} over {self.labels[one.b]} ({interval})")
        others = [other for other in self.ranked if other not in rivals]
        return f"{' and '.join(parts)}, {self._where(name)}.{self._others(name, others)}"

    def _others(self, name: str, others: Sequence[str]) -> str:
        """' Clearly behind it: …. Not clearly different from it: ….', with the differences."""
        found = self._contrasts(name, [other for other in others if other != name])
        behind = [one for one in found if one.better]
        level = [one for one in found if not one.better]
        text = ""
        for title, members in (("Clearly behind it", behind), ("Not clearly different", level)):
            listed = [
                f"{self.labels[one.b]} {self.scale.signed(-one.difference, unit=index == 0)} "
                f"({self._interval(one.flipped())})"
                for index, one in enumerate(members)
            ]
            text += f" {title}: {', '.join(listed)}." if listed else ""
        return text

    def _interval(self, one: Contrast) -> str:
        """The interval, with the p-value where the two disagree on whether it is clear."""
        text = self.scale.interval(one.low, one.high)
        if (one.low > 0 or one.high < 0) and one.p_holm >= ALPHA and one.num_tasks >= FEW_TASKS:
            text += f", but p = {p_text(one.p_holm)} after Holm's correction"
        return text

    def _where(self, name: str) -> str:
        """'with 16 rows a task, 24 unseen tasks, 3 repeats'."""
        found = self._contrasts(name, [other for other in self.ranked if other != name])
        where = shots_phrase(self.shots, self.shots_unit)
        if not found:
            return where
        tasks = min(one.num_tasks for one in found)
        few = f" (fewer than {FEW_TASKS}, too few to be sure of anything)"
        return (
            f"{where}, {counted(tasks, 'unseen task')}{few if tasks < FEW_TASKS else ''}, "
            f"{counted(min(one.num_seeds for one in found), 'repeat')}"
        )

    def _alone(self, name: str) -> str:
        row = self.rows[name]
        mean, low, high = (self.scale.level(row[key]) for key in ("mean", "low", "high"))
        return (
            f"Only {self.labels[name]} was measured, so there is nothing to compare: mean "
            f"{self.scale.axis} {mean} (95 % interval {low} to {high}), "
            f"{shots_phrase(self.shots, self.shots_unit)}."
        )
