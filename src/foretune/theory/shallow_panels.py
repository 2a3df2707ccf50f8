"""The panels of the shallow experiment."""

from __future__ import annotations

import json
from typing import Any

from foretune.files import write_whole
from foretune.theory import figures, shallow
from foretune.theory.panel import Panel, Rows, Settings, Table, median, numbers, short, spread

DEFAULTS = {"d": 10, "T": 3, "N": 1000, "n": 100, "k": 1}
LABELS = {
    "peft-ml": "LoRA-ML",
    "standard": "SR",
    "none": "none",
    "full": "SR, all weights",
}


def _rows(settings: Settings) -> Rows:
    cells: list[tuple[int, int]] = []
    for key, values in settings["vary"].items():
        for value in values:
            at = DEFAULTS | {key: value}
            if (at["d"], at["T"]) not in cells:
                cells.append((at["d"], at["T"]))
    return [row for d, num_tasks in cells for row in _remembered(settings, d, num_tasks)]


def _remembered(settings: Settings, d: int, num_tasks: int) -> Rows:
    """A cell takes long: each is kept in the run's folder as soon as it is done."""
    path = settings["folder"] / "panels" / "cells" / f"d{d}-T{num_tasks}.json"
    if not path.is_file():
        settings["say"](f"d={d} T={num_tasks}")
        write_whole(path, json.dumps(_cell(settings, d, num_tasks)))
    rows: Rows = json.loads(path.read_text("utf-8"))
    return rows


def _cell(settings: Settings, d: int, num_tasks: int) -> Rows:
    """All bases of one d and T, adapted at rank k and with T = 2 at rank 3k too."""
    seeds, k, epochs = range(settings["seeds"]), DEFAULTS["k"], settings["adapt_epochs"]
    trials = shallow.draw_trials(
        seeds,
        d=d,
        num_tasks=num_tasks,
        rows=DEFAULTS["N"],
        shots=DEFAULTS["n"],
        k=k,
        noise=settings["noise"],
    )
    bases = {
        "none": shallow.fresh_network(seeds, d),
        "standard": shallow.standard(trials, settings["retrain_epochs"]),
        "peft-ml": shallow.peft_ml(trials, k, settings["retrain_epochs"]),
    }
    varies = [
        key for key, rest in (("d", num_tasks == DEFAULTS["T"]), ("T", d == DEFAULTS["d"])) if rest
    ]
    rows: Rows = []
    for rank in (k, 3 * k) if num_tasks == 2 else (k,):
        row: dict[str, Any] = {"d": d, "T": num_tasks, "k": k, "rank": rank, "varies": varies}
        row |= {"held_out": {}, "on_shots": {}}
        adapted = {
            name: shallow.adapt(base, trials.shots, seeds, rank, epochs)
            for name, base in bases.items()
        }
        adapted["full"] = shallow.adapt_fully(bases["standard"], trials.shots, epochs)
        for name, predict in adapted.items():
            for kind, data in (("held_out", trials.held_out), ("on_shots", trials.shots_clean)):
                row[kind][name] = numbers(((predict(data.x) - data.y) ** 2).mean((1, 2)))
        rows.append(row)
    return rows


def _table(rows: Rows) -> Table:
    header = ["d", "T", "rank", "inputs", *LABELS.values(), "LoRA-ML below SR"]
    return Table(
        header,
        [
            [
                *(str(row["d"]), str(row["T"]), str(row["rank"])),
                "new" if kind == "held_out" else "the shots",
                *(spread(row[kind][name]) for name in LABELS),
                "{} of {}".format(*_wins(row[kind])),
            ]
            for row in rows
            for kind in ("held_out", "on_shots")
        ],
    )


def _wins(errors: dict[str, list[float]]) -> tuple[int, int]:
    pairs = list(zip(errors["peft-ml"], errors["standard"], strict=True))
    return sum(ml < sr for ml, sr in pairs), len(pairs)


def _finding(rows: Rows) -> str:
    own = [row for row in rows if row["rank"] == row["k"]]
    better = [
        r for r in own if median(r["held_out"]["peft-ml"]) < median(r["held_out"]["standard"])
    ]
    wins = [_wins(row["held_out"]) for row in own]
    full = [r for r in own if median(r["held_out"]["full"]) < median(r["held_out"]["peft-ml"])]
    ratios = [median(r["held_out"]["standard"]) / median(r["held_out"]["peft-ml"]) for r in own]
    gaps = [median(r["held_out"]["peft-ml"]) / median(r["on_shots"]["peft-ml"]) for r in own]
    lowest = sum(min(r["on_shots"], key=lambda n: median(r["on_shots"][n])) == "full" for r in own)
    return (
        f"At rank k, on new inputs, LoRA-ML has the lower median in {len(better)} of {len(own)} "
        f"cells and is lower in {sum(w for w, _ in wins)} of {sum(n for _, n in wins)} trials; "
        f"the ratio SR : LoRA-ML of the medians is {short(min(ratios))} to {short(max(ratios))}. "
        f"Fine-tuning all weights of the SR base is better than LoRA-ML in {len(full)} of "
        f"{len(own)} cells. On the fine-tuning inputs, which the paper shows, LoRA-ML looks better "
        f"than on new ones by a factor of up to {short(max(gaps))}, and fine-tuning all weights "
        f"would come first in {lowest} of {len(own)} cells: that measure rewards overfitting."
    )


PANELS = [
    Panel(
        name="error",
        title="Squared error on the unseen task",
        paper="LoRA-ML is better than SR for every d and T (curves only, no numbers), on the "
        "fine-tuning inputs; T = 2 is fine-tuned at rank 3k; 40000 epochs of retraining, 15000 of "
        "fine-tuning, 10 trials.",
        here="Defaults d = 10, T = 3, N = 1000, n = 100, k = 1; noise-free targets. 'none' is a "
        "network of random weights whose first layer alone is adapted. 'SR, all weights' "
        "fine-tunes everything, head included: what is possible without LoRA. T = 2 at rank k as "
        "well as 3k. Rates and batches are the paper's. At pocket size 12000 + 6000 epochs and 5 "
        "trials, at paper size its own.",
        rows=_rows,
        table=_table,
        finding=_finding,
        figure=figures.shallow,
    )
]
