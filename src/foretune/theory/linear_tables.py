"""The linear experiment: rows, table and finding of the panels on the paper's own claims."""

from __future__ import annotations

from typing import Any

import numpy as np

from foretune.theory import linear
from foretune.theory.linear import Array
from foretune.theory.linear_bases import (
    DEFAULTS,
    LONGER,
    adapted_error,
    compared_bases,
    peft_ml_solution,
    problems_of,
)
from foretune.theory.panel import PanelRows, Settings, Table, median, numbers, short, spread

ADAPT_STEPS = {"d": 1400, "T": 10_000, "N": 1000, "n": 1000, "k": 10_000}  # as in the authors' code
LABELS = {"peft-ml": "LoRA-ML", "standard": "SR", "none": "none (A = 0)"}


def sweep_rows(settings: Settings) -> PanelRows:
    """Errors of every base, for the defaults and for each changed setting."""
    rows: PanelRows = [_sweep_row(settings, "", 0)]
    for key, values in settings["vary"].items():
        rows += [_sweep_row(settings, key, v) for v in values if v != DEFAULTS[key]]
    return rows


def _sweep_row(settings: Settings, key: str, value: int) -> dict[str, Any]:
    sizes = DEFAULTS | ({key: value} if key else {})
    k = sizes["k"]
    problems = problems_of(settings, **{name: sizes[name] for name in "dTNk"})
    shots = linear.draw_shots(problems, sizes["n"], settings["noise"])
    bases = compared_bases(settings, problems, k) | {"none": np.zeros_like(problems.shared)}
    first = peft_ml_solution(problems, k, settings["outer_steps"])
    further_steps = (LONGER - 1) * settings["outer_steps"]
    bases["longer"] = linear.peft_ml(problems, k, further_steps, start=first).a
    row: dict[str, Any] = {"setting": f"{key}={value}" if key else "defaults", **sizes}
    for name, base in bases.items():
        row[name] = numbers(adapted_error(base, problems, shots, k))
        row[f"{name}_off"] = numbers(linear.error(base, problems.shared))
    row["floor"] = numbers(linear.floor(bases["standard"], problems.unseen_weight, k))
    row["expected"] = linear.expected_error(sizes["d"], k, sizes["n"], settings["noise"])
    return row


def sweep_table(rows: PanelRows) -> Table:
    """One line per setting, with the theory and the floor of SR."""
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


def sweep_finding(rows: PanelRows) -> str:
    """In how many settings SR is worse than LoRA-ML for all seeds, and by what ratio."""
    ratios = [median(row["standard"]) / median(row["peft-ml"]) for row in rows]
    worst = rows[int(np.argmin(ratios))]
    clear = sum(min(row["standard"]) > max(row["peft-ml"]) for row in rows)
    return (
        f"In {clear} of {len(rows)} settings the best seed of SR is worse than the worst of "
        f"LoRA-ML; the ratio of the medians SR : LoRA-ML is {short(min(ratios))} "
        f"({worst['setting']}) to {short(max(ratios))}. SR stays at its floor: more shots do not "
        f"help. Where LoRA-ML is well above the theory, the column '{LONGER} × steps' shows "
        "whether it converges slowly."
    )


def curves_rows(settings: Settings) -> PanelRows:
    """Errors along gradient descent, per changed setting and base."""
    rows: PanelRows = []
    for key, values in settings["vary"].items():
        last = ADAPT_STEPS[key]
        steps = np.unique(np.geomspace(1, last, 30).astype(int))
        for value in values:
            sizes = DEFAULTS | {key: value}
            rank = 3 * sizes["k"] if key == "T" and value == 2 else sizes["k"]
            problems = problems_of(settings, **{name: sizes[name] for name in "dTNk"})
            shots = linear.draw_shots(problems, sizes["n"], settings["noise"])
            for name, base in compared_bases(settings, problems, sizes["k"]).items():
                changes = linear.adapt_by_descent(base, shots, rank, steps.tolist(), problems.seeds)
                errors = np.stack([linear.error(base + c, problems.unseen_weight) for c in changes])
                exact = adapted_error(base, problems, shots, rank)
                rows.append(
                    {
                        **{"key": key, "value": value, "rank": rank, "base": name},
                        **{"steps": steps.tolist(), "median": numbers(np.median(errors, 1))},
                        **{"low": numbers(errors.min(1)), "high": numbers(errors.max(1))},
                        **{"last": numbers(errors[-1]), "exact": numbers(exact)},
                    }
                )
    return rows


def curves_table(rows: PanelRows) -> Table:
    """One line per setting and base: the last error and that of the closed form."""
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


def curves_finding(rows: PanelRows) -> str:
    """Where gradient descent reaches the closed form."""
    gaps = [median(row["last"]) / median(row["exact"]) - 1 for row in rows]
    unconverged = [row for row, gap in zip(rows, gaps, strict=True) if gap > 0.01]
    slow = "; ".join(
        f"{row['key']}={row['value']}, rank {row['rank']}, {LABELS[row['base']]}: "
        f"{short(median(row['last']))} against {short(median(row['exact']))}"
        for row in unconverged
    )
    return (
        "Descent ends within 1 % of the closed form in "
        f"{len(rows) - len(unconverged)} of {len(rows)} cells, so the other tables use the closed "
        "form. Cells where descent is slow: "
        f"{slow or 'none'}."
    )


def rank_rows(settings: Settings) -> PanelRows:
    """Errors and floors per k, base and rank at test."""
    rows: PanelRows = []
    for k in settings["ranks_for"]:
        problems = problems_of(settings, k=k)
        shots = linear.draw_shots(problems, DEFAULTS["n"], settings["noise"])
        for name, base in compared_bases(settings, problems, k).items():
            for rank in range(1, min(DEFAULTS["d"], k * (DEFAULTS["T"] + 1) + 1) + 1):
                error = numbers(adapted_error(base, problems, shots, rank))
                floor = numbers(linear.floor(base, problems.unseen_weight, rank))
                rows.append({"k": k, "base": name, "rank": rank, "error": error, "floor": floor})
    return rows


def rank_table(rows: PanelRows) -> Table:
    """One line per k and rank at test."""
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


def rank_finding(rows: PanelRows) -> str:
    """The smallest rank that each base needs."""
    sentences = []
    for k in dict.fromkeys(row["k"] for row in rows):
        sufficient = {
            name: [r["rank"] for r in rows if (r["k"], r["base"]) == (k, name) and _fits(r)]
            for name in ("peft-ml", "standard")
        }
        least = {
            name: f"rank {min(ranks)}" if ranks else "a higher rank than tested"
            for name, ranks in sufficient.items()
        }
        sentences.append(f"k = {k}: LoRA-ML needs {least['peft-ml']}, SR {least['standard']}")
    return f"Smallest rank with a median error below 1e-3, for T = 3. {'; '.join(sentences)}."


def _fits(row: dict[str, Any]) -> bool:
    return median(row["error"]) < 1e-3


def values_rows(settings: Settings) -> PanelRows:
    """Singular values of A_hat − A* per number of tasks and base."""
    rows: PanelRows = []
    for num_tasks in (3, 2):
        problems = problems_of(settings, T=num_tasks)
        for name, base in compared_bases(settings, problems, 1).items():
            values = np.linalg.svd(base - problems.shared, compute_uv=False)
            medians = numbers(np.median(values, 0))
            by_seed = [numbers(values_of_seed) for values_of_seed in values]
            rows.append({"T": num_tasks, "base": name, "values": medians, "each": by_seed})
    return rows


def values_table(rows: PanelRows) -> Table:
    """The five largest singular values and the numerical ranks."""
    num_columns = 5
    return Table(
        ["T", "base", *(f"σ{i + 1}" for i in range(num_columns)), "rank (σ > 0.01)"],
        [
            [
                *(str(row["T"]), LABELS[row["base"]], *map(short, row["values"][:num_columns])),
                _numerical_ranks(row),
            ]
            for row in rows
        ],
    )


def values_finding(rows: PanelRows) -> str:
    """The numerical rank of A_hat − A* for each seed."""
    return "Ranks over the seeds: " + "; ".join(
        f"T = {row['T']}, {LABELS[row['base']]}: {_numerical_ranks(row)}" for row in rows
    )


def _numerical_ranks(row: dict[str, Any]) -> str:
    """The number of singular values above 0.01, seed by seed."""
    return ", ".join(str(sum(value > 0.01 for value in values)) for values in row["each"])


def rate_rows(settings: Settings) -> PanelRows:
    """Errors per number of shots from the base of LoRA-ML and from A*, means over draws."""
    rows: PanelRows = []
    problems = problems_of(settings)
    base = peft_ml_solution(problems, 1, settings["outer_steps"]).a
    for n in settings["shots"]:
        errors: dict[str, list[Array]] = {"peft-ml": [], "exact": []}
        for draw in range(settings["draws"]):
            shots = linear.draw_shots(problems, n, settings["noise"], draw)
            errors["peft-ml"].append(adapted_error(base, problems, shots, 1))
            errors["exact"].append(adapted_error(problems.shared, problems, shots, 1))
        means = {name: numbers(np.mean(by_draw, 0)) for name, by_draw in errors.items()}
        theory = linear.expected_error(DEFAULTS["d"], 1, n, settings["noise"])
        floor = median(numbers(linear.floor(base, problems.unseen_weight, 1)))
        rows.append({"n": n, "theory": theory, "floor": floor, **means})
    return rows


def rate_table(rows: PanelRows) -> Table:
    """One line per number of shots, with ratios to the theoretical line."""
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


def rate_finding(rows: PanelRows) -> str:
    """Where the error follows the theoretical rate."""
    close = [str(row["n"]) for row in rows if median(row["peft-ml"]) < 2 * row["theory"]]
    return (
        f"LoRA-ML is within a factor of 2 of the line for n = {', '.join(close) or 'none'}. For "
        "large n the error from the finite retraining data remains: its floor is "
        f"{short(rows[-1]['floor'])}. For small n the line, which holds for n well above d, is "
        "too low even from A* itself."
    )


def two_rows(settings: Settings) -> PanelRows:
    """Errors and floors of both bases with T = 2, at ranks k, 2k and 3k."""
    rows: PanelRows = []
    problems = problems_of(settings, T=2)
    shots = linear.draw_shots(problems, DEFAULTS["n"], settings["noise"])
    for rank in (1, 2, 3):
        for name, base in compared_bases(settings, problems, 1).items():
            error = numbers(adapted_error(base, problems, shots, rank))
            floor = numbers(linear.floor(base, problems.unseen_weight, rank))
            rows.append({"k": 1, "base": name, "rank": rank, "error": error, "floor": floor})
    return rows


def two_finding(rows: PanelRows) -> str:
    """The errors at rank k, where the bases differ, and at 3k, where they do not."""
    error = {(row["rank"], row["base"]): median(row["error"]) for row in rows}
    return (
        f"At rank k the error is {short(error[1, 'peft-ml'])} for LoRA-ML and "
        f"{short(error[1, 'standard'])} for SR; at rank 3k {short(error[3, 'peft-ml'])} and "
        f"{short(error[3, 'standard'])}: since k(T+1) = 3k, that comparison cannot tell them "
        "apart. LoRA-ML with T = 2 does not recover A*, but is far better than SR."
    )
