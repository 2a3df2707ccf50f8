"""How often does the verdict say "Take" where no base is better, and do its intervals cover?

    python benchmarks/evidence/verdict_simulation.py    # writes results/verdict-simulation.json

Accuracies are drawn as level + task × base (3 points) + luck of the repeat × base + noise (3
points), and judged as a comparison is. `none` is the model as it is, `standard` a control, the
others are rivals of both. What luck is differs by situation:

    alike     four bases, each with the luck of its column: the search of how to adapt has luck too
    retrained four bases, the model as it is has none
    uneven    four bases, one with the luck of its column, the others with a fifth of it
    gamble    as alike, but luck is a search that goes wrong once in four
    behind    as alike, but the model as it is is far behind, so only `standard` has to be beaten
    pair      two bases: the model as it is, and one that was retrained

With one repeat the verdict is about checkpoints, so their luck belongs to what is true. Cells that
are in the result already are not drawn again, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Mapping
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foretune.evaluation.statistics import compare_pairs, verdict
from foretune.files import write_whole

RESULT = Path(__file__).resolve().parents[1] / "results" / "verdict-simulation.json"
COMMAND = "python benchmarks/evidence/verdict_simulation.py"
TASK, NOISE, BETTER, BEHIND = 0.03, 0.03, 0.05, 0.2
NUM_TASKS, NUM_REPEATS, LUCK = (6, 16, 40), (1, 2, 3, 5), (0.0, 0.004, 0.02)
FOUR = ("none", "standard", "peft-ml", "reptile")
SITUATIONS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    # names of the bases, and the share of the cell's luck that each has
    "alike": (FOUR, (1, 1, 1, 1)),
    "retrained": (FOUR, (0, 1, 1, 1)),
    "uneven": (FOUR, (0.2, 0.2, 1, 0.2)),
    "gamble": (FOUR, (1, 1, 1, 1)),
    "behind": (FOUR, (1, 1, 1, 1)),
    "pair": (FOUR[::2], (1, 1)),
}
GOES_WRONG = 0.25


def simulate(
    num_tasks: int,
    num_repeats: int,
    luck: float,
    *,
    situation: str = "alike",
    better: float = 0.0,
    trials: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Draws and judges `trials` comparisons.

    Args:
        num_tasks: Unseen tasks.
        num_repeats: Repeats, each with its own luck.
        luck: Standard deviation of the luck, in accuracy.
        situation: Which of `SITUATIONS`.
        better: By how much PEFT-ML truly is better than all others.
        trials: Number of comparisons.
        seed: Random seed.

    Returns:
        Shares of comparisons: `take` of any base, `false_take` of one that is not better than every
        control, `clear` for any pair that is not different or the other way round; and `coverage`
        of the intervals of all pairs, with `coverage_worst` of the pair that has the lowest.
    """
    rng = np.random.default_rng([seed, zlib.crc32(situation.encode()), num_tasks, num_repeats])
    names, shares = SITUATIONS[situation]
    bases = [{"name": name, "method": name, "label": name} for name in names]
    effect = np.array([better * (name == "peft-ml") for name in names])
    effect[0] -= BEHIND * (situation == "behind")
    counts = dict.fromkeys(("take", "false_take", "clear"), 0)
    covered: dict[tuple[str, str], list[bool]] = {}
    for _ in range(trials):
        lucky = (
            luck * np.array(shares)[:, None] * _draw_luck(rng, situation, len(names), num_repeats)
        )
        truth = effect + (lucky[:, 0] if num_repeats == 1 else 0)
        scores = 0.7 + (effect[:, None] + lucky)[:, None, :]
        scores = scores + rng.normal(0, TASK, (len(names), num_tasks, 1))
        scores = scores + rng.normal(0, NOISE, (len(names), num_tasks, num_repeats))
        pairs, said = _judged(names, bases, scores)
        value = dict(zip(names, truth, strict=True))
        for pair in pairs:
            true = value[pair["a"]] - value[pair["b"]]
            covers = pair["low"] <= true <= pair["high"]
            covered.setdefault((pair["a"], pair["b"]), []).append(covers)
        counts["clear"] += any(
            pair["p_holm"] < 0.05
            and (
                pair["low"] > 0 >= value[pair["a"]] - value[pair["b"]]
                or pair["high"] < 0 <= value[pair["a"]] - value[pair["b"]]
            )
            for pair in pairs
        )
        best = said["best"]
        if best not in (None, "none"):
            rivals = [
                value[name] for name in ("none", "standard") if name in value and name != best
            ]
            counts["take"] += 1
            counts["false_take"] += int(value[best] <= max(rivals))
    return {
        **{name: count / trials for name, count in counts.items()},
        "coverage": float(np.mean([*covered.values()])),
        "coverage_worst": float(min(map(np.mean, covered.values()))),
    }


def _draw_luck(
    rng: np.random.Generator, situation: str, num_bases: int, num_repeats: int
) -> NDArray[np.float64]:
    """Luck (num_bases, num_repeats) of mean 0 and variance 1."""
    if situation != "gamble":
        return rng.normal(size=(num_bases, num_repeats))
    wrong = rng.random((num_bases, num_repeats)) < GOES_WRONG
    return (GOES_WRONG - wrong) / (GOES_WRONG * (1 - GOES_WRONG)) ** 0.5


def _judged(
    names: tuple[str, ...], bases: list[dict[str, str]], scores: NDArray[np.float64]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The pairs and the verdict of scores (num_bases, num_tasks, num_repeats)."""
    tables = {  # the first control is on the right of all its pairs, as in a comparison
        (names[b], names[a]): (scores[b], scores[a]) for a, b in combinations(range(len(names)), 2)
    }
    compared = compare_pairs(tables)
    pairs = [{"a": a, "b": b, "shots": 8, **pair} for (a, b), pair in compared.items()]
    means = [
        {"base": name, "shots": 8, "mean": float(table.mean()), "low": 0, "high": 1}
        for name, table in zip(names, scores, strict=True)
    ]
    return pairs, verdict(pairs, means, bases)


def cells() -> list[dict[str, Any]]:
    """The settings of every cell of the result."""
    grid = [
        {"num_tasks": t, "num_repeats": r, "luck": luck}
        for t, r, luck in product(NUM_TASKS, NUM_REPEATS, LUCK)
    ]
    return [{"situation": name, **cell} for name in SITUATIONS for cell in grid]


def run(path: Path, trials: int) -> dict[str, Any]:
    """Draws the cells that the result at `path` lacks; writes it after each."""
    result: dict[str, Any] = {
        "claim": "evidence.verdict_simulation",
        "command": COMMAND,
        "settings": {
            **{"trials": trials, "task": TASK, "noise": NOISE, "better": BETTER},
            "luck": "of each pair",
        },
        "cells": [],
    }
    if path.exists():
        earlier = json.loads(path.read_text("utf-8"))
        if earlier["settings"] == result["settings"]:
            result["cells"] = earlier["cells"]
    done = [{key: row[key] for key in cells()[0]} for row in result["cells"]]
    for cell in cells():
        if cell not in done:
            drawn = simulate(**cell, trials=trials)
            power = simulate(**cell, better=BETTER, trials=trials // 4, seed=1)
            row = {key: round(value, 4) for key, value in drawn.items() if key != "take"}
            result["cells"].append({**cell, **row, "true_take": round(power["take"], 4)})
            write_whole(path, json.dumps(result, indent=1) + "\n")
    return result


def worst_table(result: Mapping[str, Any]) -> str:
    """One line per situation and number of repeats: the worst over tasks and luck."""
    lines = [
        '| luck | repeats | false "Take", at most | coverage, from | to | of the worst pair '
        f'| "Take" where {100 * result["settings"]["better"]:.0f} points better |',
        "|---|---|---|---|---|---|---|",
    ]
    for situation, repeats in product(SITUATIONS, NUM_REPEATS):
        rows = [
            row
            for row in result["cells"]
            if (row["situation"], row["num_repeats"]) == (situation, repeats)
        ]
        false = max(row["false_take"] for row in rows)
        low, high = (end(row["coverage"] for row in rows) for end in (min, max))
        worst = min(row["coverage_worst"] for row in rows)
        power = [row["true_take"] for row in rows]
        lines.append(
            f"| {situation} | {repeats} | {percent(false)} | {percent(low)} | {percent(high)} "
            f"| {percent(worst)} | {percent(min(power))} to {percent(max(power))} |"
        )
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.1f} %"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {"worst": worst_table}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    print(worst_table(run(arguments.out, arguments.trials)))


if __name__ == "__main__":
    main()
