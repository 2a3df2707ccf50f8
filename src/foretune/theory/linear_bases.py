"""The linear experiment: the problems and retrained bases that its panels share."""

from __future__ import annotations

from functools import cache
from typing import Any

from foretune.theory import linear
from foretune.theory.linear import Array, Offsets, Problems, Solution
from foretune.theory.panel import Settings

DEFAULTS = {"d": 10, "T": 3, "N": 5000, "n": 100, "k": 1}
LONGER = 5  # times the outer steps, to tell slow from stuck


@cache
def problems(
    seeds: int, d: int, num_tasks: int, rows: int, k: int, noise: float, offsets: Offsets = "psd"
) -> Problems:
    """`linear.draw_problems` under the seeds 0, 1, …; remembered, since panels share them."""
    return linear.draw_problems(
        range(seeds), d=d, num_tasks=num_tasks, rows=rows, k=k, noise=noise, offsets=offsets
    )


def problem_of(settings: Settings, offsets: Offsets = "psd", /, **changed: int) -> Problems:
    """The default problem with some of d, T, N, k changed."""
    at = DEFAULTS | changed
    return problems(
        settings["seeds"], at["d"], at["T"], at["N"], at["k"], settings["noise"], offsets
    )


@cache
def retrained(problem: Any, k: int, steps: int, symmetric: bool = True) -> Solution:
    """`linear.peft_ml`, remembered: the panels share bases. Problems are compared by identity."""
    return linear.peft_ml(problem, k, steps, symmetric=symmetric)


def bases(settings: Settings, problem: Problems, k: int) -> dict[str, Array]:
    """The two bases that are compared everywhere."""
    return {
        "peft-ml": retrained(problem, k, settings["outer_steps"]).a,
        "standard": linear.standard(problem.seen),
    }


def adapted_error(base: Array, problem: Problems, shots: linear.Moments, rank: int) -> Array:
    """Error on the unseen task after the best change of that rank, (B,)."""
    change = linear.adapt_exactly(base, shots, rank)
    return linear.error(base + change, problem.unseen_weight)
