"""The linear experiment: panels on what the paper leaves open (offsets, symmetry, recovery)."""

from __future__ import annotations

from typing import Any

import numpy as np

from foretune.theory import linear
from foretune.theory.linear import Offsets, Problems, Solution
from foretune.theory.linear_bases import DEFAULTS, LONGER, adapted_error, problem_of, retrained
from foretune.theory.panel import Rows, Settings, Table, median, numbers, short, spread

AWAY = 1e-2  # ‖A_hat − A*‖² from which a problem counts as not recovered
ABOVE_NOISE = 1e-3  # excess of the loss over that of the truth
AT_REST = 1e-6  # largest entry of a gradient at a stationary point


def offsets_rows(settings: Settings) -> Rows:
    rows: Rows = []
    d, k = DEFAULTS["d"], 1
    kinds: tuple[Offsets, ...] = ("psd", "zero-mean")
    for kind in kinds:
        for num_tasks in settings["num_tasks"]:
            problem = problem_of(settings, kind, T=num_tasks)
            shots = linear.draw_shots(problem, DEFAULTS["n"], settings["noise"])
            sr = linear.standard(problem.seen)
            ml = retrained(problem, k, settings["outer_steps"], kind == "psd").a
            left = d - k
            rest = left * (left + 1) if kind == "psd" else left * left
            rows.append(
                {
                    **{"offsets": kind, "T": num_tasks},
                    "peft-ml": numbers(adapted_error(ml, problem, shots, k)),
                    "standard": numbers(adapted_error(sr, problem, shots, k)),
                    "standard_off": numbers(linear.error(sr, problem.shared)),
                    # E R = kI for positive offsets; what a rank-k change cannot reach has d − k
                    # dimensions. Exact for the mean's part, of leading order in 1/T.
                    "limit": (k * k * left if kind == "psd" else 0) + k * rest / num_tasks,
                }
            )
    return rows


def offsets_table(rows: Rows) -> Table:
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


def offsets_finding(rows: Rows) -> str:
    last = {row["offsets"]: row for row in rows}
    psd, zero = last["psd"], last["zero-mean"]
    return (
        f"With T = {psd['T']} SR leaves {short(median(psd['standard']))} where offsets are "
        f"positive and {short(median(zero['standard']))} where their mean is zero: it catches up "
        "as 1/T in the second case, never in the first, where the mean offset kI stays. LoRA-ML "
        f"is at {short(median(psd['peft-ml']))} and {short(median(zero['peft-ml']))}."
    )


def symmetry_rows(settings: Settings) -> Rows:
    rows: Rows = []
    cases: list[tuple[Offsets, bool]] = [("psd", True), ("psd", False), ("zero-mean", False)]
    for offsets, symmetric in [*cases, ("zero-mean", True)]:
        for num_tasks in (2, 3, 5):
            problem = problem_of(settings, offsets, T=num_tasks)
            shots = linear.draw_shots(problem, DEFAULTS["n"], settings["noise"])
            base = retrained(problem, 1, settings["outer_steps"], symmetric).a
            rows.append(
                {
                    **{"offsets": offsets, "adapters": "U Uᵀ" if symmetric else "U Vᵀ"},
                    **{"T": num_tasks, "off": numbers(linear.error(base, problem.shared))},
                    "error": numbers(adapted_error(base, problem, shots, 1)),
                }
            )
    return rows


def symmetry_table(rows: Rows) -> Table:
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


def symmetry_finding(rows: Rows) -> str:
    at = {(r["offsets"], r["adapters"], r["T"]): median(r["error"]) for r in rows}
    return (
        f"T = 3, positive offsets: U Uᵀ {short(at['psd', 'U Uᵀ', 3])}, U Vᵀ "
        f"{short(at['psd', 'U Vᵀ', 3])}: adapters need not be symmetric. Where offsets are not, "
        f"symmetric adapters fail ({short(at['zero-mean', 'U Uᵀ', 3])}) and U Vᵀ does not "
        f"({short(at['zero-mean', 'U Vᵀ', 3])})."
    )


def recovery_rows(settings: Settings) -> Rows:
    rows: Rows = []
    steps, count = 2 * settings["outer_steps"], settings["num_problems"]
    for case in settings["problems"]:
        d, k, num_tasks = case["d"], case["k"], case["T"]
        problem = linear.draw_problems(
            range(count), d=d, num_tasks=num_tasks, k=k, noise=settings["noise"]
        )
        first = linear.peft_ml(problem, k, steps)
        away = np.flatnonzero(linear.error(first.a, problem.shared) > AWAY)
        row: dict[str, Any] = {"d": d, "k": k, "T": num_tasks, "problems": count}
        row |= {"away": len(away), "away_later": 0, "spurious": 0, "far": [], "steps": steps}
        if len(away):
            rest = _some(problem, away)
            start = Solution(first.a[away], first.u[away], None)
            last = linear.peft_ml(rest, k, (LONGER - 1) * steps, start=start)
            off = linear.error(last.a, rest.shared)
            in_a, in_u, _ = linear.gradients(last, rest.seen)
            top = np.maximum(np.abs(in_a).max((1, 2)), np.abs(in_u).max((1, 2, 3)))
            excess = linear.loss(linear.weights_of(last), rest.seen)
            excess = excess - linear.loss(rest.seen_weights, rest.seen)
            stuck = (top < AT_REST) & (excess > ABOVE_NOISE) & (off > AWAY)
            row |= {"away_later": int((off > AWAY).sum()), "spurious": int(stuck.sum())}
            row |= {"far": numbers(off), "excess": numbers(excess), "gradient": numbers(top)}
        rows.append(row)
    return rows


def _some(problem: Problems, chosen: Any) -> Problems:
    index = np.asarray(chosen, dtype=int)
    return Problems(
        tuple(problem.seeds[i] for i in index),
        problem.shared[index],
        problem.seen_weights[index],
        problem.unseen_weight[index],
        linear.Moments(problem.seen.s[index], problem.seen.c[index]),
    )


def recovery_table(rows: Rows) -> Table:
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


def recovery_finding(rows: Rows) -> str:
    total, away = sum(r["problems"] for r in rows), sum(r["away"] for r in rows)
    later, stuck = sum(r["away_later"] for r in rows), sum(r["spurious"] for r in rows)
    return (
        f"Of {total} random problems {away} were off A* (‖A_hat − A*‖² > {AWAY:g}) at the end, "
        f"{later} after {LONGER} times as many steps. {stuck} of these rested at a spurious "
        f"minimum (gradient below {AT_REST:g}, loss more than {ABOVE_NOISE:g} above that of the "
        f"truth); the other {later - stuck} were still on their way."
    )
