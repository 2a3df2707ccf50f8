"""RTD on SmolLM2 and on MiniLM: intents of CLINC150, beside what reads the same states or trains.

    python benchmarks/claims/rtd_smollm2.py ../shared/data/clinc150/clinc150.jsonl.gz
    python benchmarks/publish.py                              # tables in docs/results/rtd.md

About ten minutes of one core. It writes `results/rtd_smollm2.json`; what is in there is not
measured again (`--again` does).

*Bank.* The 15 intents of CLINC150's domain banking, with "bank" before each name, so that all
labels begin alike: *bank bill balance*, *bank bill due*. They stand in for banking77, which is not
at hand. Each seed draws its references and its test rows.
*Others.* The 15 intents of another domain for each seed, named as shipped; without LoRA.

10 references of each intent are the store; K, T and λ are chosen on them by `tune`, LoRA's rate on
a fifth of them (15 batches of 16 texts in each of its three trainings); 90 test rows are scored
once. SmolLM2 (135 million parameters, bfloat16) is a decoder: its state is that of the last token
of the text; MiniLM (22 million) is an encoder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from claims.rtd import grid, points

from foretune.decoding.classify import states_and_model
from foretune.decoding.datastore_folders import rows_of
from foretune.decoding.lookup import Lookup
from foretune.decoding.model_scores import states_and_log_probs
from foretune.decoding.reference_store import ReferenceStore
from foretune.decoding.references import References, read_references
from foretune.decoding.store_controls import train_lora
from foretune.decoding.store_table import evaluate_store
from foretune.models.loading import load_model
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "rtd_smollm2.json"
SEEDS = (0, 1, 2)
BANK = "banking"
OTHERS = ("travel", "home", "kitchen_and_dining")  # of each seed
PER_INTENT, TESTED = 10, 90
KINDS, LORA_STEPS = ("bank", "others"), 15
READERS = {"minilm": "none", "smollm2": "causal-lm"}  # and the head of each


def drawn(file: str, domain: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(references, test rows): rows of the domain in the order of the seed."""
    rows = [row for row in rows_of(file) if row["task"] == domain]
    if domain == BANK:
        rows = [{**row, "label": f"bank {row['label']}"} for row in rows]
    order = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    counts: dict[str, int] = {}
    train = []
    for row in order:
        counts.setdefault(row["label"], 0)
        if row["split"] == "train" and counts[row["label"]] < PER_INTENT:
            counts[row["label"]] += 1
            train.append(row)
    return train, [row for row in order if row["split"] == "test"][:TESTED]


def measured(
    model: Any,
    tokenizer: Any,
    train: list[dict[str, Any]],
    test: list[dict[str, Any]],
    seed: int,
) -> dict[str, Any]:
    """Accuracies of every method but LoRA, and the settings before and after `tune`."""
    began = time.process_time()
    store = ReferenceStore.build(model, train, tokenizer=tokenizer)
    build = time.process_time() - began
    asked = read_references(
        test,
        tokenizer,
        like=References("label", store.labels),
        for_encoder=store.is_of_encoder,
    )
    untuned = store.lookup
    states, _ = states_and_model(model, store, asked, untuned)

    def by_store(lookup: Lookup) -> float:
        right = store.label_log_probs(states, None, lookup).argmax(-1) == asked.flat_values()
        return float(right.float().mean())

    scores = {
        "nearest neighbour": by_store(Lookup(neighbours=1, mix=1.0)),
        "RTD, not tuned": by_store(untuned),
    }
    began = time.process_time()
    tuned = store.tune()
    tuning = time.process_time() - began
    table = evaluate_store(model, tokenizer, store, test, shots=0, lora_steps=0, seed=seed)
    rows = {row["method"]: row["score"] for row in table["rows"]}
    scores = {"RTD, tuned": rows.pop("RTD"), **scores, **rows}
    return {
        "labels": len(store.labels),
        "entries": len(store),
        "tested": len(test),
        "scores": scores,
        "untuned": {"neighbours": untuned.neighbours, "mix": untuned.mix},
        "tuned": tuned,
        "cpu_seconds": {"store": build, "tuning": tuning},
    }


def with_lora(
    model: Any,
    tokenizer: Any,
    train: list[dict[str, Any]],
    test: list[dict[str, Any]],
    seed: int,
) -> float:
    """The accuracy of LoRA trained on the references, among all labels."""
    learnt = read_references(train, tokenizer)
    asked = read_references(test, tokenizer, like=learnt)
    adapted = train_lora(model, learnt, steps=LORA_STEPS, seed=seed)
    right = states_and_log_probs(adapted, asked)[1].argmax(-1) == asked.flat_values()
    return float(right.float().mean())


def measure(arguments: list[str]) -> None:
    """Measures what is not in the result yet."""
    torch.set_num_threads(1)
    [file] = [argument for argument in arguments if argument != "--again"]
    result: dict[str, Any] = {"claim": "rtd_smollm2", "runs": []}
    if RESULT.is_file() and "--again" not in arguments:
        result = json.loads(RESULT.read_text("utf-8"))
    done = {(run["rows"], run["model"], run["seed"]) for run in result["runs"]}
    for reader, head in READERS.items():
        # bfloat16 is three times as fast here as float32
        dtype = torch.float32 if reader == "minilm" else torch.bfloat16
        model, tokenizer = load_model(reader, head=head, dtype=dtype)  # type: ignore[arg-type]
        for rows, seed in ((rows, seed) for rows in KINDS for seed in SEEDS):
            if (rows, reader, seed) in done:
                continue
            domain = BANK if rows == "bank" else OTHERS[seed]
            found = measured(model, tokenizer, *drawn(file, domain, seed), seed)
            head_of = {"rows": rows, "model": reader, "seed": seed, "domain": domain}
            result["runs"].append({**head_of, **found})
            save(result)
            print(json.dumps(result["runs"][-1]), flush=True)
    for run in result["runs"]:  # what takes longest, last
        if (run["rows"], run["model"]) == ("bank", "smollm2") and "LoRA" not in run["scores"]:
            parts = drawn(file, BANK, run["seed"])
            run["scores"]["LoRA"] = with_lora(model, tokenizer, *parts, run["seed"])
            save(result)
            print(f"LoRA, seed {run['seed']}: {run['scores']['LoRA']}", flush=True)


def save(result: dict[str, Any]) -> None:
    """Writes what there is, figures cut to what they are good for."""
    short = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.5g}"))
    short["environment"] = environment()
    RESULT.write_text(json.dumps(short, separators=(",", ":")) + "\n", encoding="utf-8")


# --- tables ---------------------------------------------------------------------------------------


def methods_table(result: dict[str, Any], reader: str) -> str:
    """Every method on both kinds of rows, the mean and the ends over seeds."""
    runs = [run for run in result["runs"] if run["model"] == reader]
    scores: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, score in run["scores"].items():
            scores.setdefault(name, {}).setdefault(run["rows"], []).append(score)
    table = []
    for name, by_kind in sorted(scores.items(), key=lambda item: -mean(item[1]["bank"])):
        cells = []
        for kind in KINDS:
            part = by_kind.get(kind, [])
            few = "" if len(part) in (0, len(SEEDS)) else f", {len(part)} of {len(SEEDS)} seeds"
            cells.append(f"{points(part)}{few}" if part else "")
        table.append([name, *cells])
    return grid(["accuracy, %", *KINDS], table)


def settings_table(result: dict[str, Any]) -> str:
    """What `tune` chose, and its score on entries left out, by model, rows and seed."""
    rows = []
    for run in result["runs"]:
        found, scores = run["tuned"], run["scores"]
        alone = found["model_alone"]
        rows.append(
            [
                run["model"],
                run["rows"],
                str(run["seed"]),
                f"{run['untuned']['neighbours']} → {found['neighbours']}",
                f"{run['untuned']['mix']:g} → {found['mix']:g}",
                f"{100 * found['untuned']:.1f} → {100 * found['score']:.1f}",
                "" if alone is None else f"{100 * alone:.1f}",
                f"{100 * scores['RTD, not tuned']:.1f} → {100 * scores['RTD, tuned']:.1f}",
            ]
        )
    head = ["states of", "rows", "seed", "K", "λ", "left out, %", "model alone, %", "test, %"]
    return grid(head, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "smollm2": partial(methods_table, reader="smollm2"),
    "minilm": partial(methods_table, reader="minilm"),
    "settings": settings_table,
}


if __name__ == "__main__":
    measure(sys.argv[1:])
