"""Does a variant of a method beat every rival? From the committed results `claims-*.json`.

A cell is one collection at one number of shots. A point is one per cent of accuracy, or a hundredth
of a nat for a language model, which is one per cent of its perplexity. Intervals are paired over
unseen tasks and seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foretune.evaluation.statistics import paired_difference
from foretune.evaluation.wording import counted

RESULTS = Path(__file__).resolve().parent.parent / "results"
RIVALS = ("standard", "peft-ml", "reptile", "fomaml")
PUBLISHED = {"none", "standard", "peft-ml", "peft-ml-last-layer", "reptile", "fomaml"}
Scores = dict[str, np.ndarray]  # base -> (tasks, seeds)


def cells() -> Iterator[tuple[str, int | None, Scores]]:
    """(collection, shots, scores of each base) of every committed collection."""
    for path in sorted(RESULTS.glob("claims-*.json")):
        result = json.loads(path.read_text("utf-8"))
        for shots in sorted({s["shots"] for s in result["scores"]} - {0}, key=order):
            yield path.stem.removeprefix("claims-"), shots, matrices(result, shots)


def order(shots: int | None) -> float:
    return float("inf") if shots is None else shots


def matrices(result: dict[str, Any], shots: int | None) -> Scores:
    """The scores of each base as (tasks, seeds), tasks and seeds in one order for all."""
    rows = [s for s in result["scores"] if s["shots"] == shots]
    tasks, seeds = sorted({s["task"] for s in rows}), sorted({s["seed"] for s in rows})
    scores = {base["name"]: np.full((len(tasks), len(seeds)), np.nan) for base in result["bases"]}
    for s in rows:
        scores[s["base"]][tasks.index(s["task"]), seeds.index(s["seed"])] = s["score"]
    return scores


def variant_row(name: str, shots: int | None, scores: Scores) -> dict[str, Any]:
    """The best foretune variant of one cell against each published rival."""
    variants = {b: float(m.mean()) for b, m in scores.items() if b not in PUBLISHED}
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


def variants_table() -> str:
    """The best variant of each cell minus each rival, as Markdown."""
    rows = [variant_row(*cell) for cell in cells() if set(cell[2]) - PUBLISHED]
    if not rows:
        return "No result has a variant yet."
    lines = [
        "| collection | shots | best variant | "
        + " | ".join(f"− {r}" for r in RIVALS)
        + " | all |",
        "|---|---|---|" + "---|" * (len(RIVALS) + 1),
    ]
    for row in rows:
        differences = [points(row["against"][r]) if r in row["against"] else "" for r in RIVALS]
        lines.append(
            f"| {row['collection']} | {shown(row['shots'])} | {row['variant']} "
            f"{100 * row['score']:.1f} | {' | '.join(differences)} "
            f"| {'yes' if row['beats_all'] else 'no'} |"
        )
    beaten = [row["collection"] for row in rows if row["beats_all"]]
    lines += [
        "",
        "Above all four rivals, with every interval above zero: "
        f"{len(beaten)} of {len(rows)} cells, in {counted(len(set(beaten)), 'collection')}. The "
        "variant of a row is the best one of that row in hindsight, which favours it; the "
        "intervals are not corrected for that.",
    ]
    return "\n".join(lines)


def shown(shots: int | None) -> str:
    return "all" if shots is None else str(shots)


def points(difference: tuple[float, float, float]) -> str:
    middle, low, high = (100 * v for v in difference)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"
