"""The linear experiment: the problems and retrained bases that its panels share."""

from __future__ import annotations

from functools import cache
from typing import Any

from foretune.theory import linear
from foretune.theory.linear import Array, Offsets, Problems, Solution
from foretune.theory.panel import Settings

DEFAULTS = {"d": 10, "T": 3, "N": 5000, "n": 100, "k": 1}
LONGER = 5  # factor on the outer steps that tells slow from stuck descent


@cache
def cached_problems(
    seeds: int,
    d: int,
    num_tasks: int,
    num_examples: int,
    k: int,
    noise: float,
    offsets: Offsets = "psd",
) -> Problems:
    """`linear.draw_problems` with seeds 0 to `seeds` − 1, cached since panels share problems."""
    return linear.draw_problems(
        range(seeds),
        d=d,
        num_tasks=num_tasks,
        num_examples=num_examples,
        k=k,
        noise=noise,
        offsets=offsets,
    )


def problems_of(settings: Settings, offsets: Offsets = "psd", /, **changed: int) -> Problems:
    """The default problems with some of d, T, N and k changed."""
    sizes = DEFAULTS | changed
    return cached_problems(
        settings["seeds"],
        sizes["d"],
        sizes["T"],
        sizes["N"],
        sizes["k"],
        settings["noise"],
        offsets,
    )


@cache
def peft_ml_solution(problems: Any, k: int, steps: int, symmetric: bool = True) -> Solution:
    """`linear.peft_ml`, cached since panels share bases. Problems are compared by identity."""
    return linear.peft_ml(problems, k, steps, symmetric=symmetric)


def compared_bases(settings: Settings, problems: Problems, k: int) -> dict[str, Array]:
    """The bases (B, d, d) of PEFT-ML at rank k and of standard retraining."""
    return {
        "peft-ml": peft_ml_solution(problems, k, settings["outer_steps"]).a,
        "standard": linear.standard(problems.seen),
    }


def adapted_error(base: Array, problems: Problems, shots: linear.Moments, rank: int) -> Array:
    """(B,) error on the unseen task after the best change of rank `rank`."""
    change = linear.adapt_exactly(base, shots, rank)
    return linear.error(base + change, problems.unseen_weight)
