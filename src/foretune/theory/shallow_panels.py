"""The panel of the shallow experiment: rows, table and finding."""

from __future__ import annotations

import json
from typing import Any

from foretune.files import write_whole
from foretune.formats import read_json
from foretune.theory import figures, shallow
from foretune.theory.panel import Panel, PanelRows, Settings, Table, median, numbers, short, spread

DEFAULTS = {"d": 10, "T": 3, "N": 1000, "n": 100, "k": 1}
LABELS = {
    "peft-ml": "LoRA-ML",
    "standard": "SR",
    "none": "none",
    "full": "SR, all weights",
}


def _rows(settings: Settings) -> PanelRows:
    cells: list[tuple[int, int]] = []
    for key, values in settings["vary"].items():
        for value in values:
            sizes = DEFAULTS | {key: value}
            if (sizes["d"], sizes["T"]) not in cells:
                cells.append((sizes["d"], sizes["T"]))
    return [row for d, num_tasks in cells for row in _stored_cell(settings, d, num_tasks)]


def _stored_cell(settings: Settings, d: int, num_tasks: int) -> PanelRows:
    """The rows of a cell, which takes long: stored in the run's folder once computed."""
    path = settings["folder"] / "panels" / "cells" / f"d{d}-T{num_tasks}.json"
    if not path.is_file():
        settings["say"](f"d={d} T={num_tasks}")
        write_whole(path, json.dumps(_cell(settings, d, num_tasks)))
    return read_json(path, PanelRows)


def _cell(settings: Settings, d: int, num_tasks: int) -> PanelRows:
    """Errors of all bases for one d and T, adapted at rank k and, for T = 2, also at rank 3k."""
    seeds, k, epochs = range(settings["seeds"]), DEFAULTS["k"], settings["adapt_epochs"]
    trials = shallow.draw_trials(
        seeds,
        d=d,
        num_tasks=num_tasks,
        num_examples=DEFAULTS["N"],
        num_shots=DEFAULTS["n"],
        k=k,
        noise=settings["noise"],
    )
    bases = {
        "none": shallow.fresh_network(seeds, d),
        "standard": shallow.standard(trials, settings["retrain_epochs"]),
        "peft-ml": shallow.peft_ml(trials, k, settings["retrain_epochs"]),
    }
    # The figure's axes (d or T) that this cell is on: those whose other size is the default.
    on_axis = {"d": num_tasks == DEFAULTS["T"], "T": d == DEFAULTS["d"]}
    varies = [key for key, is_on in on_axis.items() if is_on]
    rows: PanelRows = []
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


def _table(rows: PanelRows) -> Table:
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
    """(trials in which LoRA-ML has a lower error than SR, all trials)."""
    pairs = list(zip(errors["peft-ml"], errors["standard"], strict=True))
    return sum(ml < sr for ml, sr in pairs), len(pairs)


def _finding(rows: PanelRows) -> str:
    cells = [row for row in rows if row["rank"] == row["k"]]
    held_out = [{name: median(v) for name, v in cell["held_out"].items()} for cell in cells]
    on_shots = [{name: median(v) for name, v in cell["on_shots"].items()} for cell in cells]
    better = sum(error["peft-ml"] < error["standard"] for error in held_out)
    full_better = sum(error["full"] < error["peft-ml"] for error in held_out)
    wins = [_wins(cell["held_out"]) for cell in cells]
    ratios = [error["standard"] / error["peft-ml"] for error in held_out]
    gaps = [h["peft-ml"] / s["peft-ml"] for h, s in zip(held_out, on_shots, strict=True)]
    full_first = sum(min(error, key=lambda name: error[name]) == "full" for error in on_shots)
    return (
        f"At rank k, on new inputs, LoRA-ML has the lower median in {better} of {len(cells)} "
        f"cells and the lower error in {sum(w for w, _ in wins)} of {sum(n for _, n in wins)} "
        f"trials; the ratio SR : LoRA-ML of the medians is {short(min(ratios))} to "
        f"{short(max(ratios))}. Fine-tuning all weights of the SR base is better than LoRA-ML in "
        f"{full_better} of {len(cells)} cells. On the fine-tuning inputs, which the paper shows, "
        f"the error of LoRA-ML is lower than on new ones by a factor of up to {short(max(gaps))}, "
        f"and fine-tuning all weights would rank first in {full_first} of {len(cells)} cells: that "
        "measure rewards overfitting."
    )


PANELS = [
    Panel(
        name="error",
        title="Squared error on the unseen task",
        paper="LoRA-ML is better than SR for every d and T (curves only, no numbers), on the "
        "fine-tuning inputs; T = 2 is fine-tuned at rank 3k; 40000 epochs of retraining, 15000 of "
        "fine-tuning, 10 trials.",
        here="Defaults d = 10, T = 3, N = 1000, n = 100, k = 1; errors against noise-free targets. "
        "'none' adapts the first layer of a randomly initialised network. 'SR, all weights' "
        "fine-tunes all weights of the SR base, including the head: the result without LoRA. "
        "T = 2 is adapted at rank k as well as 3k. Learning rates and full batches are the "
        "paper's. Scale pocket has 12000 + 6000 epochs and 5 trials, scale paper the paper's "
        "numbers.",
        rows=_rows,
        table=_table,
        finding=_finding,
        figure=figures.shallow,
    )
]
