"""Was `auto` ever the wrong choice, and does a variant beat every rival? From committed results.

    python benchmarks/claims/regret.py        # prints the tables that docs/reproduce.md holds

A cell is one collection at one number of shots. Regret is how far `auto` is below the fixed method
that turned out best there, in points: per cent of accuracy, or hundredths of a nat for a language
model, which are per cent of its perplexity. Intervals are paired over unseen tasks and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foretune.evaluation.statistics import paired_difference
from foretune.evaluation.verdict import CONTROLS
from foretune.evaluation.wording import counted

RESULTS = Path(__file__).resolve().parent.parent / "results"
RIVALS = ("standard", "peft-ml", "reptile", "fomaml")
PUBLISHED = {"none", "standard", "peft-ml", "peft-ml-last-layer", "reptile", "fomaml"}
RESAMPLES = 4000
POWER = (1.96 + 0.84) ** 2  # of a two-sided test at 5 % with power 80 %
Scores = dict[str, np.ndarray]  # base -> (tasks, seeds)


def cells() -> Iterator[tuple[str, int | None, Scores]]:
    """(collection, shots, scores of each base) of every committed collection."""
    for path in sorted(RESULTS.glob("claims-*.json")):
        if path.stem.endswith("-auto"):
            continue
        result = json.loads(path.read_text("utf-8"))
        chosen = path.with_name(f"{path.stem}-auto.json")
        if chosen.exists():  # the same tasks and seeds, run apart because the trials take hours
            other = json.loads(chosen.read_text("utf-8"))
            result["bases"] += [base for base in other["bases"] if base["name"] == "auto"]
            result["scores"] += [s for s in other["scores"] if s["base"] == "auto"]
        for shots in sorted({s["shots"] for s in result["scores"]} - {0}, key=order):
            yield path.stem.removeprefix("claims-"), shots, matrices(result, shots)


def order(shots: int | None) -> float:
    return float("inf") if shots is None else shots


def matrices(result: dict[str, Any], shots: int | None) -> Scores:
    """The scores of each base as (tasks, seeds), tasks and seeds in one order for all."""
    rows = [s for s in result["scores"] if s["shots"] == shots]
    tasks, seeds = sorted({s["task"] for s in rows}), sorted({s["seed"] for s in rows})
    found = {base["name"]: np.full((len(tasks), len(seeds)), np.nan) for base in result["bases"]}
    for s in rows:
        found[s["base"]][tasks.index(s["task"]), seeds.index(s["seed"])] = s["score"]
    return found


def regret_row(name: str, shots: int | None, scores: Scores) -> dict[str, Any]:
    """How `auto` did in one cell."""
    auto = scores["auto"]
    others = {base: m for base, m in scores.items() if base != "auto"}
    fixed = {base: float(m.mean()) for base, m in others.items()}
    best = max(fixed, key=lambda base: fixed[base])
    differences = {c: paired_difference(auto, scores[c]) for c in CONTROLS if c in scores}
    return {
        "collection": name,
        "shots": shots,
        "auto": float(auto.mean()),
        "best": best,
        "best_score": fixed[best],
        "regret": fixed[best] - float(auto.mean()),
        "regret_without": best_without(others) - float(auto.mean()),
        "regret_by_luck": leads(others)[1],
        **{f"minus_{c}": (d.difference, d.low, d.high) for c, d in differences.items()},
    }


def best_without(scores: Scores) -> float:
    """What the best fixed method reaches on a task when that task has no say in which it is.

    The best of many in hindsight owes a part of its lead to luck on these very tasks; here it is
    picked on all unseen tasks but one, and counts on that one. That errs the other way: a task left
    out is missed by those who are good at it.
    """
    total = {base: m.sum() for base, m in scores.items()}
    found = []
    for task in range(len(next(iter(scores.values())))):
        best = max(scores, key=lambda base: total[base] - scores[base][task].sum())
        found.append(scores[best][task].mean())
    return float(np.mean(found))


def leads(scores: Scores) -> tuple[float, float]:
    """(how far the best is above the mean of those near it, what luck alone would give).

    Near the best are the methods that are not below it by their whole interval. If they were all
    equally good, the best of so many on so few tasks would still be ahead; by how much the
    bootstrap says, from their scores without their means.
    """
    by_task = {base: m.mean(axis=1) for base, m in scores.items()}
    best = max(by_task, key=lambda base: by_task[base].mean())
    near = [b for b in scores if b == best or paired_difference(scores[best], scores[b]).low <= 0]
    rows = np.stack([by_task[base] for base in near])
    lead = float(rows.mean(axis=1).max() - rows.mean())
    alike = rows - rows.mean(axis=0)
    alike -= alike.mean(axis=1, keepdims=True)
    tasks = alike.shape[1]
    drawn = np.random.default_rng(0).integers(0, tasks, (RESAMPLES, tasks))
    luck = alike[:, drawn].mean(axis=2).max(axis=0).mean()
    return lead, float(luck) * (tasks / (tasks - 1)) ** 0.5  # a bootstrap's spread is too small


def spread(scores: Scores) -> float:
    """Standard deviation over tasks of (a method − the best one), median over methods."""
    by_task = {base: m.mean(axis=1) for base, m in scores.items()}
    best = by_task.pop(max(by_task, key=lambda base: by_task[base].mean()))
    return float(np.median([(own - best).std(ddof=1) for own in by_task.values()]))


def variant_row(name: str, shots: int | None, scores: Scores) -> dict[str, Any]:
    """The best foretune variant of one cell against each published rival."""
    variants = {b: float(m.mean()) for b, m in scores.items() if b not in PUBLISHED | {"auto"}}
    best = max(variants, key=lambda base: variants[base])
    against = {r: paired_difference(scores[best], scores[r]) for r in RIVALS if r in scores}
    return {
        "collection": name,
        "shots": shots,
        "variant": best,
        "score": variants[best],
        "against": {r: (d.difference, d.low, d.high) for r, d in against.items()},
        "beats_all": len(against) == len(RIVALS) and all(d.low > 0 for d in against.values()),
    }


def regret_table() -> str:
    rows = [regret_row(*cell) for cell in cells() if "auto" in cell[2]]
    lines = [
        "| collection | shots | `auto` | best fixed method | regret | by luck alone "
        "| picked on the other tasks | − none | − standard |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['collection']} | {shown(row['shots'])} | {100 * row['auto']:.1f} "
            f"| {row['best']} {100 * row['best_score']:.1f} | {100 * row['regret']:z.1f} "
            f"| {100 * row['regret_by_luck']:.1f} | {100 * row['regret_without']:z.1f} "
            f"| {points(row['minus_none'])} "
            f"| {points(row['minus_standard'])} |"
        )
    if not rows:
        return "No result has `auto` yet."
    mean, luck, without = (
        100 * float(np.mean([row[key] for row in rows]))
        for key in ("regret", "regret_by_luck", "regret_without")
    )
    worse = {c: sum(row[f"minus_{c}"][2] < 0 for row in rows) for c in CONTROLS}
    better = {c: sum(row[f"minus_{c}"][1] > 0 for row in rows) for c in CONTROLS}
    collections = len({row["collection"] for row in rows})
    lines += [
        "",
        f"{len(rows)} cells of {collections} collections. Mean regret {mean:.2f} points, "
        f"{luck:.2f} by luck alone, {without:.2f} where the fixed method is picked on the other "
        "unseen tasks. The whole interval is below standard retraining in "
        f"{worse['standard']} cells, below none in {worse['none']}; above them in "
        f"{better['standard']} and {better['none']}.",
    ]
    return "\n".join(lines)


def variants_table() -> str:
    lines = [
        "| collection | shots | best variant | "
        + " | ".join(f"− {r}" for r in RIVALS)
        + " | all |",
        "|---|---|---|" + "---|" * (len(RIVALS) + 1),
    ]
    rows, ahead, spreads = [], [], []
    for name, shots, scores in cells():
        if set(scores) - PUBLISHED - {"auto"}:
            rows.append(variant_row(name, shots, scores))
            fixed = {b: m for b, m in scores.items() if b != "auto"}
            ahead.append(leads(fixed))
            spreads.append(100 * spread(fixed))
    for row in rows:
        differences = [points(row["against"][r]) if r in row["against"] else "" for r in RIVALS]
        lines.append(
            f"| {row['collection']} | {shown(row['shots'])} | {row['variant']} "
            f"{100 * row['score']:.1f} | {' | '.join(differences)} "
            f"| {'yes' if row['beats_all'] else 'no'} |"
        )
    if not rows:
        return "No result has a variant yet."
    beaten = [row["collection"] for row in rows if row["beats_all"]]
    lead, luck = (100 * float(np.mean(column)) for column in zip(*ahead, strict=True))
    more = sum(one > by_luck for one, by_luck in ahead)
    middle = float(np.median(spreads))
    lines += [
        "",
        "Above all four rivals, with every interval above zero: "
        f"{len(beaten)} of {len(rows)} cells, in {counted(len(set(beaten)), 'collection')}. The "
        "variant of a row is the best one of that row in hindsight, which favours it; the "
        "intervals are not corrected for that. The best of all methods is on average "
        f"{lead:.2f} points above the mean of those not clearly below it; if these were equally "
        f"good, luck alone would put the best {luck:.2f} above their mean. It leads by more than "
        f"that in {more} of {len(rows)} cells. Across tasks, the difference between two methods "
        f"has a standard deviation of {middle:.1f} points (median over cells), so that detecting "
        f"one point between them takes {POWER * middle**2:.0f} unseen tasks (5 % level, power "
        "80 %).",
    ]
    return "\n".join(lines)


def shown(shots: int | None) -> str:
    return "all" if shots is None else str(shots)


def points(difference: tuple[float, float, float]) -> str:
    middle, low, high = (100 * v for v in difference)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    print(regret_table(), variants_table(), sep="\n\n")
