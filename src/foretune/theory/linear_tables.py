"""The linear experiment: rows, table and finding of the panels on the paper's own claims."""

from __future__ import annotations

from typing import Any

import numpy as np

from foretune.theory import linear
from foretune.theory.linear import Array, Problems
from foretune.theory.linear_bases import (
    DEFAULTS,
    LONGER,
    adapted_error,
    bases,
    problem_of,
    retrained,
)
from foretune.theory.panel import Rows, Settings, Table, median, numbers, short, spread

ADAPT_STEPS = {"d": 1400, "T": 10_000, "N": 1000, "n": 1000, "k": 10_000}  # of the authors' code
LABELS = {"peft-ml": "LoRA-ML", "standard": "SR", "none": "none (A = 0)"}


def sweep_rows(settings: Settings) -> Rows:
    rows: Rows = [_sweep_row(settings, "", 0)]
    for key, values in settings["vary"].items():
        rows += [_sweep_row(settings, key, v) for v in values if v != DEFAULTS[key]]
    return rows


def _sweep_row(settings: Settings, key: str, value: int) -> dict[str, Any]:
    at = DEFAULTS | ({key: value} if key else {})
    k = at["k"]
    problem = problem_of(settings, **{name: at[name] for name in "dTNk"})
    shots = linear.draw_shots(problem, at["n"], settings["noise"])
    every = bases(settings, problem, k) | {"none": np.zeros_like(problem.shared)}
    first = retrained(problem, k, settings["outer_steps"])
    further = (LONGER - 1) * settings["outer_steps"]
    longer = linear.peft_ml(problem, k, further, start=first)
    every["longer"] = longer.a
    row: dict[str, Any] = {"setting": f"{key}={value}" if key else "defaults", **at}
    for name, base in every.items():
        row[name] = numbers(adapted_error(base, problem, shots, k))
        row[f"{name}_off"] = numbers(linear.error(base, problem.shared))
    row["floor"] = numbers(linear.floor(every["standard"], problem.unseen_weight, k))
    row["expected"] = linear.expected_error(at["d"], k, at["n"], settings["noise"])
    return row


def sweep_table(rows: Rows) -> Table:
    header = ["setting", "LoRA-ML", "theory", f"LoRA-ML, {LONGER} × steps", "SR", "floor of SR"]
    header += ["none", "off A*: LoRA-ML", "SR"]
    return Table(
        header,
        [
            [
                *(row["setting"], spread(row["peft-ml"]), short(row["expected"])),
                *(spread(row["longer"]), spread(row["standard"]), short(median(row["floor"]))),
                *(short(median(row[k])) for k in ("none", "peft-ml_off", "standard_off")),
            ]
            for row in rows
        ],
    )


def sweep_finding(rows: Rows) -> str:
    ratios = [median(row["standard"]) / median(row["peft-ml"]) for row in rows]
    worst = rows[int(np.argmin(ratios))]
    clear = sum(min(row["standard"]) > max(row["peft-ml"]) for row in rows)
    return (
        f"In {clear} of {len(rows)} settings the best seed of SR is worse than the worst of "
        f"LoRA-ML; the ratio of the medians SR : LoRA-ML is {short(min(ratios))} "
        f"({worst['setting']}) to {short(max(ratios))}. SR sits on its floor: more shots do not "
        f"help. Where LoRA-ML is well above the theory, the column '{LONGER} × steps' tells "
        "whether it is slow."
    )


def curves_rows(settings: Settings) -> Rows:
    rows: Rows = []
    for key, values in settings["vary"].items():
        last = ADAPT_STEPS[key]
        steps = np.unique(np.geomspace(1, last, 30).astype(int))
        for value in values:
            at = DEFAULTS | {key: value}
            rank = 3 * at["k"] if key == "T" and value == 2 else at["k"]
            problem = problem_of(settings, **{name: at[name] for name in "dTNk"})
            shots = linear.draw_shots(problem, at["n"], settings["noise"])
            for name, base in bases(settings, problem, at["k"]).items():
                changes = linear.adapt_by_descent(base, shots, rank, steps.tolist(), problem.seeds)
                found = np.stack([linear.error(base + c, problem.unseen_weight) for c in changes])
                exact = adapted_error(base, problem, shots, rank)
                rows.append(
                    {
                        **{"key": key, "value": value, "rank": rank, "base": name},
                        **{"steps": steps.tolist(), "median": numbers(np.median(found, 1))},
                        **{"low": numbers(found.min(1)), "high": numbers(found.max(1))},
                        **{"last": numbers(found[-1]), "exact": numbers(exact)},
                    }
                )
    return rows


def curves_table(rows: Rows) -> Table:
    header = ["setting", "rank", "base", "steps", "by descent", "closed form"]
    return Table(
        header,
        [
            [
                *(f"{row['key']}={row['value']}", str(row["rank"]), LABELS[row["base"]]),
                *(str(row["steps"][-1]), spread(row["last"]), spread(row["exact"])),
            ]
            for row in rows
        ],
    )


def curves_finding(rows: Rows) -> str:
    gaps = [median(row["last"]) / median(row["exact"]) - 1 for row in rows]
    far = [row for row, gap in zip(rows, gaps, strict=True) if gap > 0.01]
    slow = "; ".join(
        f"{row['key']}={row['value']}, rank {row['rank']}, {LABELS[row['base']]}: "
        f"{short(median(row['last']))} against {short(median(row['exact']))}"
        for row in far
    )
    return (
        f"Descent ends within 1 % of the closed form in {len(rows) - len(far)} of {len(rows)} "
        "cells, so the closed form stands for it in the other tables. The others are slow: "
        f"{slow or 'none'}."
    )


def rank_rows(settings: Settings) -> Rows:
    rows: Rows = []
    for k in settings["ranks_for"]:
        problem = problem_of(settings, k=k)
        shots = linear.draw_shots(problem, DEFAULTS["n"], settings["noise"])
        for name, base in bases(settings, problem, k).items():
            for rank in range(1, min(DEFAULTS["d"], k * (DEFAULTS["T"] + 1) + 1) + 1):
                error = numbers(adapted_error(base, problem, shots, rank))
                floor = numbers(linear.floor(base, problem.unseen_weight, rank))
                rows.append({"k": k, "base": name, "rank": rank, "error": error, "floor": floor})
    return rows


def rank_table(rows: Rows) -> Table:
    cells = {(row["k"], row["rank"], row["base"]): row for row in rows}
    keys = dict.fromkeys((row["k"], row["rank"]) for row in rows)
    return Table(
        ["k", "rank at test", "LoRA-ML", "SR", "floor of SR"],
        [
            [
                *(str(k), str(rank)),
                *(spread(cells[k, rank, name]["error"]) for name in ("peft-ml", "standard")),
                short(median(cells[k, rank, "standard"]["floor"])),
            ]
            for k, rank in keys
        ],
    )


def rank_finding(rows: Rows) -> str:
    parts = []
    for k in dict.fromkeys(row["k"] for row in rows):
        need = {
            name: [r["rank"] for r in rows if (r["k"], r["base"]) == (k, name) and _fits(r)]
            for name in ("peft-ml", "standard")
        }
        first = {name: str(min(ranks)) if ranks else "more" for name, ranks in need.items()}
        parts.append(f"k = {k}: LoRA-ML needs rank {first['peft-ml']}, SR {first['standard']}")
    return f"Rank at which the median error is below 1e-3, with T = 3. {'; '.join(parts)}."


def _fits(row: dict[str, Any]) -> bool:
    return median(row["error"]) < 1e-3


def values_rows(settings: Settings) -> Rows:
    rows: Rows = []
    for num_tasks in (3, 2):
        problem = problem_of(settings, T=num_tasks)
        for name, base in bases(settings, problem, 1).items():
            found = np.linalg.svd(base - problem.shared, compute_uv=False)
            middle = numbers(np.median(found, 0))
            each = [numbers(one) for one in found]
            rows.append({"T": num_tasks, "base": name, "values": middle, "each": each})
    return rows


def values_table(rows: Rows) -> Table:
    shown = 5
    return Table(
        ["T", "base", *(f"σ{i + 1}" for i in range(shown)), "rank (σ > 0.01)"],
        [
            [
                *(str(row["T"]), LABELS[row["base"]], *map(short, row["values"][:shown])),
                ", ".join(str(sum(v > 0.01 for v in one)) for one in row["each"]),
            ]
            for row in rows
        ],
    )


def values_finding(rows: Rows) -> str:
    return "Ranks over the seeds: " + "; ".join(
        f"T = {row['T']}, {LABELS[row['base']]}: "
        f"{', '.join(str(sum(v > 0.01 for v in one)) for one in row['each'])}"
        for row in rows
    )


def rate_rows(settings: Settings) -> Rows:
    rows: Rows = []
    problem = problem_of(settings)
    base = retrained(problem, 1, settings["outer_steps"]).a
    for n in settings["shots"]:
        found: dict[str, list[Array]] = {"peft-ml": [], "exact": []}
        for draw in range(settings["draws"]):
            shots = linear.draw_shots(problem, n, settings["noise"], draw)
            found["peft-ml"].append(adapted_error(base, problem, shots, 1))
            found["exact"].append(adapted_error(problem.shared, problem, shots, 1))
        means = {name: numbers(np.mean(each, 0)) for name, each in found.items()}
        theory = linear.expected_error(DEFAULTS["d"], 1, n, settings["noise"])
        rows.append({"n": n, "theory": theory, "floor": median(_floors(base, problem)), **means})
    return rows


def _floors(base: Array, problem: Problems) -> list[float]:
    return numbers(linear.floor(base, problem.unseen_weight, 1))


def rate_table(rows: Rows) -> Table:
    header = ["n", "LoRA-ML", "from A* itself", "noise²(2dk − k²)/n", "LoRA-ML : line", "A* : line"]
    return Table(
        header,
        [
            [
                *(str(row["n"]), spread(row["peft-ml"]), spread(row["exact"])),
                *(short(row["theory"]), short(median(row["peft-ml"]) / row["theory"])),
                short(median(row["exact"]) / row["theory"]),
            ]
            for row in rows
        ],
    )


def rate_finding(rows: Rows) -> str:
    close = [row["n"] for row in rows if median(row["peft-ml"]) < 2 * row["theory"]]
    return (
        f"LoRA-ML is within a factor of 2 of the line for n = {', '.join(map(str, close))}. For "
        "large n the retraining data's own error remains: its floor is "
        f"{short(rows[-1]['floor'])}. For small n the line, which holds for n well above d, is "
        "too low even from A* itself."
    )


def two_rows(settings: Settings) -> Rows:
    rows: Rows = []
    problem = problem_of(settings, T=2)
    shots = linear.draw_shots(problem, DEFAULTS["n"], settings["noise"])
    for rank in (1, 2, 3):
        for name, base in bases(settings, problem, 1).items():
            error = numbers(adapted_error(base, problem, shots, rank))
            rows.append({"k": 1, "base": name, "rank": rank, "error": error})
            rows[-1]["floor"] = numbers(linear.floor(base, problem.unseen_weight, rank))
    return rows


def two_finding(rows: Rows) -> str:
    at = {(row["rank"], row["base"]): median(row["error"]) for row in rows}
    return (
        f"At rank k LoRA-ML leaves {short(at[1, 'peft-ml'])} and SR {short(at[1, 'standard'])}. "
        f"At rank 3k they leave {short(at[3, 'peft-ml'])} and {short(at[3, 'standard'])}: since "
        "k(T+1) = 3k, that comparison cannot tell them apart. T = 2 does not recover A*, but is "
        "far better than SR."
    )
