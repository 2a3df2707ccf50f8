"""The linear experiment: panels on what the paper leaves open (offsets, symmetry, recovery)."""

from __future__ import annotations

from typing import Any

import numpy as np

from foretune.theory import linear
from foretune.theory.linear import Offsets, Problems, Solution
from foretune.theory.linear_bases import (
    DEFAULTS,
    LONGER,
    adapted_error,
    peft_ml_solution,
    problems_of,
)
from foretune.theory.panel import PanelRows, Settings, Table, median, numbers, short, spread

AWAY = 1e-2  # ‖A_hat − A*‖² above which A* counts as not recovered
ABOVE_NOISE = 1e-3  # loss minus that of the ground truth, at a spurious minimum
AT_REST = 1e-6  # largest entry of a gradient at a stationary point


def offsets_rows(settings: Settings) -> PanelRows:
    """Errors of both bases per kind of offsets and number of tasks."""
    rows: PanelRows = []
    d, k = DEFAULTS["d"], 1
    kinds: tuple[Offsets, ...] = ("psd", "zero-mean")
    for kind in kinds:
        for num_tasks in settings["num_tasks"]:
            problems = problems_of(settings, kind, T=num_tasks)
            shots = linear.draw_shots(problems, DEFAULTS["n"], settings["noise"])
            sr = linear.standard(problems.seen)
            ml = peft_ml_solution(problems, k, settings["outer_steps"], kind == "psd").a
            free = d - k  # dimensions that a rank-k change cannot reach
            spread_term = free * (free + 1) if kind == "psd" else free * free
            rows.append(
                {
                    **{"offsets": kind, "T": num_tasks},
                    "peft-ml": numbers(adapted_error(ml, problems, shots, k)),
                    "standard": numbers(adapted_error(sr, problems, shots, k)),
                    "standard_off": numbers(linear.error(sr, problems.shared)),
                    # The mean offset is kI for positive offsets and 0 otherwise. The first term
                    # is exact, the second of leading order in 1/T.
                    "limit": (k * k * free if kind == "psd" else 0) + k * spread_term / num_tasks,
                }
            )
    return rows


def offsets_table(rows: PanelRows) -> Table:
    """One line per kind of offsets and number of tasks, with the large-T value for SR."""
    return Table(
        ["offsets", "T", "LoRA-ML", "SR", "large-T value for SR", "‖A_SR − A*‖²"],
        [
            [
                *(row["offsets"], str(row["T"]), spread(row["peft-ml"]), spread(row["standard"])),
                *(short(row["limit"]), short(median(row["standard_off"]))),
            ]
            for row in rows
        ],
    )


def offsets_finding(rows: PanelRows) -> str:
    """How the error of SR falls with the number of tasks, for either kind of offsets."""
    last = {row["offsets"]: row for row in rows}
    psd, zero = last["psd"], last["zero-mean"]
    return (
        f"With T = {psd['T']} the error of SR is {short(median(psd['standard']))} for positive "
        f"offsets and {short(median(zero['standard']))} for zero-mean ones: it falls as 1/T in "
        "the second case and levels off in the first, where the mean offset kI remains. That of "
        f"LoRA-ML is {short(median(psd['peft-ml']))} and {short(median(zero['peft-ml']))}."
    )


def symmetry_rows(settings: Settings) -> PanelRows:
    """Errors of PEFT-ML per kind of offsets, kind of adapters and number of tasks."""
    rows: PanelRows = []
    cases: list[tuple[Offsets, bool]] = [("psd", True), ("psd", False), ("zero-mean", False)]
    for offsets, symmetric in [*cases, ("zero-mean", True)]:
        for num_tasks in (2, 3, 5):
            problems = problems_of(settings, offsets, T=num_tasks)
            shots = linear.draw_shots(problems, DEFAULTS["n"], settings["noise"])
            base = peft_ml_solution(problems, 1, settings["outer_steps"], symmetric).a
            rows.append(
                {
                    **{"offsets": offsets, "adapters": "U Uᵀ" if symmetric else "U Vᵀ"},
                    **{"T": num_tasks, "off": numbers(linear.error(base, problems.shared))},
                    "error": numbers(adapted_error(base, problems, shots, 1)),
                }
            )
    return rows


def symmetry_table(rows: PanelRows) -> Table:
    """One line per kind of offsets, kind of adapters and number of tasks."""
    return Table(
        ["offsets", "adapters in retraining", "T", "error at rank k", "off A*"],
        [
            [
                *(row["offsets"], row["adapters"], str(row["T"])),
                *(spread(row["error"]), short(median(row["off"]))),
            ]
            for row in rows
        ],
    )


def symmetry_finding(rows: PanelRows) -> str:
    """When symmetric adapters are enough in retraining."""
    error = {(r["offsets"], r["adapters"], r["T"]): median(r["error"]) for r in rows}
    return (
        f"T = 3, positive offsets: U Uᵀ {short(error['psd', 'U Uᵀ', 3])}, U Vᵀ "
        f"{short(error['psd', 'U Vᵀ', 3])}: adapters need not be symmetric. For zero-mean offsets, "
        f"which are not symmetric, U Uᵀ fails ({short(error['zero-mean', 'U Uᵀ', 3])}) and U Vᵀ "
        f"works ({short(error['zero-mean', 'U Vᵀ', 3])})."
    )


def recovery_rows(settings: Settings) -> PanelRows:
    """Random problems per size, and how many of them do not recover A*, even with more steps."""
    rows: PanelRows = []
    steps, count = 2 * settings["outer_steps"], settings["num_problems"]
    for case in settings["problems"]:
        d, k, num_tasks = case["d"], case["k"], case["T"]
        problems = linear.draw_problems(
            range(count), d=d, num_tasks=num_tasks, k=k, noise=settings["noise"]
        )
        first = linear.peft_ml(problems, k, steps)
        away = np.flatnonzero(linear.error(first.a, problems.shared) > AWAY)
        row: dict[str, Any] = {"d": d, "k": k, "T": num_tasks, "problems": count}
        row |= {"away": len(away), "away_later": 0, "spurious": 0, "far": [], "steps": steps}
        if len(away):
            unrecovered = _subset(problems, away)
            start = Solution(first.a[away], first.u[away], None)
            last = linear.peft_ml(unrecovered, k, (LONGER - 1) * steps, start=start)
            distance = linear.error(last.a, unrecovered.shared)
            grad_a, grad_u, _ = linear.gradients(last, unrecovered.seen)
            largest = np.maximum(np.abs(grad_a).max((1, 2)), np.abs(grad_u).max((1, 2, 3)))
            excess = linear.loss(linear.weights_of(last), unrecovered.seen)
            excess = excess - linear.loss(unrecovered.seen_weights, unrecovered.seen)
            stuck = (largest < AT_REST) & (excess > ABOVE_NOISE) & (distance > AWAY)
            row |= {"away_later": int((distance > AWAY).sum()), "spurious": int(stuck.sum())}
            row |= {"far": numbers(distance), "excess": numbers(excess)}
            row |= {"gradient": numbers(largest)}
        rows.append(row)
    return rows


def _subset(problems: Problems, index: np.ndarray) -> Problems:
    """The problems at the indices."""
    return Problems(
        tuple(problems.seeds[i] for i in index),
        problems.shared[index],
        problems.seen_weights[index],
        problems.unseen_weight[index],
        linear.Moments(problems.seen.s[index], problems.seen.c[index]),
    )


def recovery_table(rows: PanelRows) -> Table:
    """One line per size of problem."""

    def share(part: int, row: dict[str, Any]) -> str:
        return f"{100 * part / row['problems']:.0f} %"

    steps = rows[0]["steps"]
    header = ["d", "k", "T", "k(T+1) ≤ d", "problems", f"off A* after {steps} steps"]
    header += [f"after {LONGER * steps}", "of these at rest above the noise"]
    return Table(
        header,
        [
            [
                *(str(row[key]) for key in "dkT"),
                "yes" if row["k"] * (row["T"] + 1) <= row["d"] else "no",
                *(str(row["problems"]), share(row["away"], row), share(row["away_later"], row)),
                str(row["spurious"]),
            ]
            for row in rows
        ],
    )


def recovery_finding(rows: PanelRows) -> str:
    """How often A* is not recovered, and whether descent is then slow or stuck."""
    total, away = sum(r["problems"] for r in rows), sum(r["away"] for r in rows)
    later, stuck = sum(r["away_later"] for r in rows), sum(r["spurious"] for r in rows)
    return (
        f"Of {total} random problems {away} had not recovered A* (‖A_hat − A*‖² > {AWAY:g}) at "
        f"the end, {later} after {LONGER} times as many steps. {stuck} of these were at a spurious "
        f"minimum (gradient below {AT_REST:g}, loss more than {ABOVE_NOISE:g} above that of the "
        f"ground truth); the other {later - stuck} were still converging."
    )
