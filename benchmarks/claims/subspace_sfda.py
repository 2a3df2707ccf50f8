"""Subspace SFDA: cores alone against all parameters, LoRA and batch normalisation, without labels.

    python benchmarks/claims/subspace_sfda.py FOLDER/har/har_subjects.npz

Part "synthetic": windows of three triaxial sensors in six classes; a domain is a rotation of the
sensors, a speed, noise and a gain. One source, three targets, 5 % (20 windows) or all (400).
Part "har": UCI HAR, AdaTime's five scenarios (subject → subject) in its split, windows as
recorded, 0.5 %, 5 % and all of the target's training windows, without their labels. Scores are of
the target's test windows. Three seeds; the losses besides SHOT on the first scenario.

Nothing was chosen on test windows: rate and steps are the same for all ways to adapt, but for
"full, rate 1e-4", which has the suite's rate. What is in the result file is not measured again;
`--again` begins anew. About ten minutes of one free core.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import foretune
from foretune import Classification, Run, Standard, SubspaceSFDA, Task, TaskCollection, Unlabelled
from foretune.source_free.classes import class_report
from foretune.source_free.learner import SourceFreeLearner, add_imputer
from foretune.source_free.losses import Shot
from foretune.source_free.time_series_cnn import TimeSeriesCNN
from foretune.source_free.tucker import core_parameters, count_macs, tuckerize
from foretune.tasks.objectives.accuracy import picks
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parent.parent / "results" / "subspace_sfda.json"
SEEDS = (0, 1, 2)
SCENARIOS = ((2, 11), (6, 23), (7, 13), (9, 18), (12, 16))
RATE, BATCH, FACTORS = 1e-3, 32, (2, 4, 8)
STEPS = {
    "synthetic": {"source": 228, "prepare": 57, "adapt": 80},  # 12 and 3 epochs of the source
    "har": {"source": 56, "prepare": 14, "adapt": 24},  # 8 and 2
}
FEWER = 14  # steps on all windows of a HAR target: 2 epochs
# (rotation in radians, speed, noise, gain)
SOURCE = (0.0, 1.0, 1.0, 1.0)
TARGETS = ((0.95, 1.18, 1.5, 1.1), (-1.05, 0.85, 1.6, 0.9), (0.7, 1.25, 1.7, 1.2))
TILT = 0.75  # share of the rotation that is also about the second axis
CLASSES, CHANNELS, LENGTH = 6, 9, 128
CONVOLUTIONS = ["blocks.0.0", "blocks.1.0", "blocks.2.0"]
SHOT = {"entropy": 0.6709, "diversity": 0.8969, "labels": 0.3312}


def world(seed: int) -> Callable[[tuple[float, ...], int, int], list[dict[str, Any]]]:
    """A generator of labelled windows of a domain: (domain, number, part) → rows."""
    rng = np.random.default_rng([seed, 99])
    amplitude = rng.normal(size=(CLASSES, CHANNELS, 3)) * 0.8
    phase = rng.uniform(0, 2 * np.pi, size=(CLASSES, CHANNELS, 3))
    cycles = np.array([3.0, 6.0, 11.0])

    def rows(domain: tuple[float, ...], number: int, part: int) -> list[dict[str, Any]]:
        rotation, speed, noise, gain = domain
        draw = np.random.default_rng([seed, part])
        cos, sin = np.cos(rotation), np.sin(rotation)
        turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1.0]])
        cos, sin = np.cos(TILT * rotation), np.sin(TILT * rotation)
        turn = turn @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
        made = []
        for i in range(number):
            y = i % CLASSES
            time_ = (np.arange(LENGTH) / LENGTH + draw.uniform()) * speed
            waves = np.sin(2 * np.pi * cycles[:, None] * time_ + phase[y][:, :, None])
            scale = amplitude[y][:, :, None] * draw.normal(1, 0.2, size=(CHANNELS, 3, 1))
            x = (scale * waves).sum(1).reshape(3, 3, LENGTH)
            x = gain * np.einsum("ab,sbt->sat", turn, x).reshape(CHANNELS, LENGTH)
            x = x + noise * draw.normal(size=x.shape)
            made.append({"x": x.astype(np.float32), "y": y})
        return made

    return rows


@dataclass(frozen=True)
class Lora:
    """SHOT on an adapter of PEFT's at the convolutions; everything else as in SubspaceSFDA."""

    kind: str = "LoRA"
    learning_rate: float = RATE

    name = "peft"
    verb = "adapt"
    shares_base = pooled = False

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.kind, "learning_rate": self.learning_rate}

    def learner(self, model: nn.Module, objective: Any, keys: Any, run: Run) -> SourceFreeLearner:
        from peft import LoKrConfig, LoraConfig, inject_adapter_in_model

        config = (
            LoraConfig(r=8, lora_alpha=16, target_modules=CONVOLUTIONS)
            if self.kind == "LoRA"
            else LoKrConfig(r=8, alpha=16, target_modules=CONVOLUTIONS)
        )
        inject_adapter_in_model(config, model)  # leaves only the adapter to train
        loss = Shot(**SHOT)
        return SourceFreeLearner(model, objective, learning_rate=self.learning_rate, loss=loss)


@torch.no_grad()
def report(model: nn.Module, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and macro-F1 on labelled rows."""
    x = torch.from_numpy(np.stack([row["x"] for row in rows]).astype(np.float32))
    picked = torch.cat([picks(model.eval()(part)) for part in x.split(64)])
    found = class_report([row["y"] for row in rows], picked.tolist(), range(CLASSES))
    return {key: round(found[key], 5) for key in ("accuracy", "macro_f1")}


@torch.no_grad()
def statistics_only(model: nn.Module, rows: Sequence[dict[str, Any]], steps: int) -> nn.Module:
    """A copy whose batch normalisation has seen the rows; no weight moves."""
    model = copy.deepcopy(model).train()
    rng = np.random.default_rng(0)
    for _ in range(steps):
        chosen = rng.permutation(len(rows))[:BATCH]
        model(torch.from_numpy(np.stack([rows[i]["x"] for i in chosen]).astype(np.float32)))
    return model


class Bench:
    """One source with its prepared models; adapts them and scores.

    Args:
        part: "synthetic" or "har".
        seed: Of everything.
        source: (training rows, test rows), labelled.
        factors: Rank factors to prepare.
    """

    def __init__(self, part: str, seed: int, source: Any, factors: Sequence[int]) -> None:
        self.part, self.seed, self.steps = part, seed, STEPS[part]
        train, test = source
        tasks = TaskCollection((Task("source", train, (), test),), Classification())
        fitted = Classification().fit(tasks)
        self.objective = Unlabelled(source=fitted)
        self.tasks = tasks.with_objective(fitted)
        torch.manual_seed(seed)
        self.models = {"full": self._fit(TimeSeriesCNN(CHANNELS, CLASSES), "source")}
        for factor in factors:
            model = copy.deepcopy(self.models["full"])
            tuckerize(model, rank_factor=factor)
            self.models[f"RF{factor}"] = self._fit(model, "prepare")

    def _fit(self, model: nn.Module, stage: str) -> nn.Module:
        run = self.run(self.steps[stage])
        return foretune.retrain(model, self.tasks, Standard(learning_rate=RATE), run).model

    def run(self, steps: int) -> Run:
        return Run(seed=self.seed, steps=steps, batch_size=BATCH, eval_every=0, weight_decay=1e-4)

    def imputers(self) -> None:
        """Gives every model an imputer."""
        for model in self.models.values():
            add_imputer(model, self.tasks, self.run(self.steps["prepare"]))

    def adapted(
        self,
        arm: str,
        base: str,
        method: Any,
        target: str,
        rows: Any,
        test: Any,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """One row of the result."""
        run = self.run(steps or self.steps["adapt"])
        began = time.process_time()
        tasks = TaskCollection((Task(target, rows),), self.objective)
        result = foretune.adapt(self.models[base], tasks, method, run)
        seconds = time.process_time() - began
        model = result.models[target, 0]
        return self.row(arm, target, len(rows), report(model, test)) | {
            "tuned": result.cost["trainable_parameters"],
            "seconds": round(seconds, 2),
        }

    def row(self, arm: str, target: str, rows: int, scores: dict[str, float]) -> dict[str, Any]:
        return {
            "part": self.part,
            "seed": self.seed,
            "target": target,
            "arm": arm,
            "rows": rows,
            **scores,
        }


def arms(factors: Sequence[int]) -> Iterator[tuple[str, str, Any]]:
    """(name, base, method) of the ways to adapt."""
    yield "full", "full", SubspaceSFDA(tuned="all", rank_factor=None, learning_rate=RATE)
    for factor in factors:
        yield f"core RF{factor}", f"RF{factor}", SubspaceSFDA(learning_rate=RATE)
    yield "RF4, all parameters", "RF4", SubspaceSFDA(tuned="all", learning_rate=RATE)


def more_arms() -> Iterator[tuple[str, str, Any]]:
    yield "full, rate 1e-4", "full", SubspaceSFDA(tuned="all", rank_factor=None, learning_rate=1e-4)
    yield (
        "batch normalisation",
        "full",
        SubspaceSFDA(tuned="batch-norm", rank_factor=None, learning_rate=RATE),
    )
    yield "LoRA r=8", "full", Lora("LoRA")
    yield "LoKr r=8", "full", Lora("LoKr")
    yield "core RF4, statistics frozen", "RF4", SubspaceSFDA(bn="frozen", learning_rate=RATE)


def synthetic(seed: int) -> Iterator[dict[str, Any]]:
    """The generated domains of one seed."""
    rows = world(seed)
    bench = Bench("synthetic", seed, (rows(SOURCE, 600, 0), rows(SOURCE, 300, 1)), (4, 8))
    for number, domain in enumerate(TARGETS):
        target, train = f"target {number + 1}", rows(domain, 400, 10 + number)
        test = rows(domain, 300, 20 + number)
        for base, model in bench.models.items():
            yield bench.row(f"source only {base}", target, 0, report(model, test))
        order = np.random.default_rng([seed, number]).permutation(len(train))
        for share, count in (("5 %", 20), ("100 %", 400)):
            few = [train[i] for i in order[:count]]
            for arm, base, method in arms((4, 8)):
                if share == "5 %" or arm != "RF4, all parameters":
                    row = bench.adapted(arm, base, method, target, few, test)
                    yield row | {"share": share}


def har(seed: int, data: Any, pair: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """One scenario of UCI HAR with one seed."""

    def windows(split: str, subject: int) -> list[dict[str, Any]]:
        x, y = data[f"x_{split}_{subject}"], data[f"y_{split}_{subject}"]
        return [{"x": a.astype(np.float32), "y": int(b)} for a, b in zip(x, y, strict=True)]

    source, subject = pair
    bench = Bench("har", seed, (windows("train", source), windows("test", source)), FACTORS)
    target, train, test = f"{source}→{subject}", windows("train", subject), windows("test", subject)
    for base, model in bench.models.items():
        yield bench.row(f"source only {base}", target, 0, report(model, test))
    order = np.random.default_rng([seed, subject]).permutation(len(train))
    for share, part in (("0.5 %", 0.005), ("5 %", 0.05), ("100 %", 1.0)):
        few = [train[i] for i in order[: max(1, round(part * len(train)))]]
        steps = FEWER if part == 1 else bench.steps["adapt"]
        moved = statistics_only(bench.models["full"], few, steps)
        yield bench.row("statistics alone", target, len(few), report(moved, test)) | {
            "share": share
        }
        for arm, base, method in (*arms(FACTORS), *more_arms()):
            row = bench.adapted(arm, base, method, target, few, test, steps)
            yield row | {"share": share}
    if pair != SCENARIOS[0]:
        return
    few = [train[i] for i in order[: round(0.05 * len(train))]]
    bench.imputers()
    for loss in ("nrc", "aad", "mapu"):
        for arm, base, tuned in (("full", "full", "all"), ("core RF4", "RF4", "core")):
            factor = None if base == "full" else 4
            method = SubspaceSFDA(loss=loss, tuned=tuned, rank_factor=factor, learning_rate=RATE)
            row = bench.adapted(f"{arm}, {loss}", base, method, target, few, test)
            yield row | {"share": "5 %"}


def sizes() -> list[dict[str, Any]]:
    """Parameters and multiplications of the convolutions, for each rank factor."""
    model, x = TimeSeriesCNN(CHANNELS, CLASSES), torch.zeros(1, CHANNELS, LENGTH)
    weights = sum(p.numel() for n, p in model.named_parameters() if n in NAMES)
    found = [{"factor": None, "tuned": weights, "stored": weights, "macs": _macs(model, x)}]
    for factor in FACTORS:
        small = copy.deepcopy(model)
        tuckerize(small, rank_factor=factor)
        cores = sum(p.numel() for p in core_parameters(small).values())
        stored = sum(p.numel() for n, p in small.named_parameters() if n.startswith(PLACES))
        entry = {"factor": factor, "tuned": cores, "stored": stored, "macs": _macs(small, x)}
        found.append(entry)
    return found


NAMES = {f"{name}.weight" for name in CONVOLUTIONS}
PLACES = tuple(f"{name}." for name in CONVOLUTIONS)


def _macs(model: nn.Module, x: torch.Tensor) -> int:
    return sum(n for name, n in count_macs(model, x).items() if name in CONVOLUTIONS)


# --- tables ---------------------------------------------------------------------------------------


def _mean(rows: list[dict[str, Any]], key: str = "macro_f1") -> float | None:
    return statistics.mean(row[key] for row in rows) if rows else None


def _of(result: dict[str, Any], part: str, arm: str, share: str | None) -> list[dict[str, Any]]:
    """The rows of one cell, of targets that every seed has."""
    whole = _targets(result, part)
    rows = result["scores"]
    found = [r for r in rows if r["part"] == part and r["arm"] == arm and r["target"] in whole]
    return [r for r in found if r.get("share") == share]


def _targets(result: dict[str, Any], part: str) -> list[str]:
    seeds: dict[str, set[int]] = {}
    for row in result["scores"]:
        if row["part"] == part:
            seeds.setdefault(row["target"], set()).add(row["seed"])
    return [target for target, known in seeds.items() if known == set(SEEDS)]


def _seeds(rows: list[dict[str, Any]]) -> list[float]:
    """The mean over targets of each seed."""
    seeds = sorted({row["seed"] for row in rows})
    return [statistics.mean(r["macro_f1"] for r in rows if r["seed"] == s) for s in seeds]


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    means = _seeds(rows)
    spread = f" ± {100 * statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{100 * statistics.mean(means):.1f}{spread}"


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(cells) + " |" for cells in [head, *lines]]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def _tuned(result: dict[str, Any], part: str, arm: str) -> str:
    counts = {r["tuned"] for r in result["scores"] if r["part"] == part and r["arm"] == arm}
    return f"{max(counts):,}" if counts else "0"


def size_table(result: dict[str, Any]) -> str:
    whole = result["sizes"][0]
    lines = []
    for entry in result["sizes"]:
        name = "as it is" if entry["factor"] is None else f"RF {entry['factor']}"
        cuts = [f"{100 * (1 - entry[k] / whole[k]):.1f} %" for k in ("tuned", "macs")]
        lines.append([name, f"{entry['tuned']:,}", cuts[0], f"{entry['macs']:,}", cuts[1]])
        lines[-1].append(f"{entry['stored']:,}")
    head = [
        "convolutions",
        "tuned parameters",
        "cut",
        "MACs per window",
        "cut",
        "stored parameters",
    ]
    said = (
        "The backbone for windows of 9 × 128; only convolutions are counted, not batch "
        "normalisation and head. The abstract says over 90 % fewer tuned parameters and MACs."
    )
    return f"{_markdown(head, lines)}\n\n{said}"


def synthetic_table(result: dict[str, Any]) -> str:
    lines = []
    for base in ("full", "RF4", "RF8"):
        row = _of(result, "synthetic", f"source only {base}", None)
        lines.append([f"source only, {base}", "0", _cell(row), _cell(row)])
    for arm, _, _ in arms((4, 8)):
        cells = [_cell(_of(result, "synthetic", arm, share)) for share in ("5 %", "100 %")]
        lines.append([arm, _tuned(result, "synthetic", arm), *cells])
    said = "Generated domains: macro-F1, %, mean of 3 targets, ± standard deviation over 3 seeds."
    head = ["adapting by SHOT", "tuned", "5 % (20 windows)", "100 % (400)"]
    return f"{_markdown(head, lines)}\n\n{said}"


def mark_table(result: dict[str, Any]) -> str:
    """The targets set before the run, what was measured, whether they are met."""

    def f1(arm: str, share: str | None) -> float:
        return _mean(_of(result, "synthetic", arm, share)) or float("nan")

    core, largest = f1("core RF4", "5 %"), result["sizes"][-1]
    whole = result["sizes"][0]
    at_all = [f1(f"core RF{k}", "100 %") - f1("full", "100 %") for k in (4, 8)]
    marks = [
        ("core RF4 − full, 5 %", core - f1("full", "5 %"), 0.05),
        ("core RF4 − source only RF4, 5 %", core - f1("source only RF4", None), 0.03),
        ("core RF4 − source only full, 5 %", core - f1("source only full", None), 0.03),
        ("core RF4 − RF4 all parameters, 5 %", core - f1("RF4, all parameters", "5 %"), 0.0),
        ("core RF4 − full, 100 %", at_all[0], -0.02),
        ("core RF8 − full, 100 %", at_all[1], -0.02),
        ("tuned parameters, cut at RF 8", 1 - largest["tuned"] / whole["tuned"], 0.95),
        ("MACs, cut at RF 8", 1 - largest["macs"] / whole["macs"], 0.9),
    ]
    lines = [
        [name, f"{value:+.3f}", f"{least:+.2f}", "yes" if value >= least else "**missed**"]
        for name, value, least in marks
    ]
    return _markdown(["generated domains, mean of 3 seeds", "measured", "target", "met"], lines)


def har_table(result: dict[str, Any]) -> str:
    shares = ("0.5 %", "5 %", "100 %")
    lines = []
    for base in ("full", *[f"RF{factor}" for factor in FACTORS]):
        cell = _cell(_of(result, "har", f"source only {base}", None))
        lines.append([f"source only, {base}", "0", *[cell] * 3])
    for arm in ("statistics alone", *[a for a, _, _ in (*arms(FACTORS), *more_arms())]):
        tuned = "0" if arm == "statistics alone" else _tuned(result, "har", arm)
        lines.append([arm, tuned, *[_cell(_of(result, "har", arm, share)) for share in shares]])
    pairs = _targets(result, "har")
    said = (
        f"UCI HAR: macro-F1, %, mean of {len(pairs)} scenarios ({', '.join(pairs)}), ± standard "
        f"deviation over {len(SEEDS)} seeds. 0.5 % is one window, 5 % eleven to thirteen."
    )
    head = ["adapting by SHOT", "tuned", "0.5 %", "5 %", "100 %"]
    return f"{_markdown(head, lines)}\n\n{said}"


def scenario_table(result: dict[str, Any]) -> str:
    names = _targets(result, "har")
    rows = [
        ("source only", "source only full", None),
        ("full, 5 %", "full", "5 %"),
        ("core RF4, 5 %", "core RF4", "5 %"),
        ("RF4 all parameters, 5 %", "RF4, all parameters", "5 %"),
        ("batch normalisation, 5 %", "batch normalisation", "5 %"),
        ("full, 100 %", "full", "100 %"),
        ("core RF4, 100 %", "core RF4", "100 %"),
    ]
    lines = []
    for label, arm, share in rows:
        found = _of(result, "har", arm, share)
        lines.append([label, *[_cell([r for r in found if r["target"] == n]) for n in names]])
    said = "UCI HAR by scenario: macro-F1, %, mean ± standard deviation over 3 seeds."
    return f"{_markdown(['', *names], lines)}\n\n{said}"


def loss_table(result: dict[str, Any]) -> str:
    first = f"{SCENARIOS[0][0]}→{SCENARIOS[0][1]}"
    lines: list[list[str]] = []
    for loss in ("shot", "nrc", "aad", "mapu"):
        names = [arm if loss == "shot" else f"{arm}, {loss}" for arm in ("full", "core RF4")]
        rows = [_of(result, "har", name, "5 %") for name in names]
        lines.append([loss, *[_cell([r for r in found if r["target"] == first]) for found in rows]])
    said = f"UCI HAR {first}, 5 % of the target's windows: macro-F1, %, mean ± deviation, 3 seeds."
    return f"{_markdown(['loss', 'full', 'core RF4'], lines)}\n\n{said}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "sizes": size_table,
    "synthetic": synthetic_table,
    "marks": mark_table,
    "har": har_table,
    "scenarios": scenario_table,
    "losses": loss_table,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="har_subjects.npz")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with np.load(given.data) as stored:
        data = {name: stored[name] for name in stored.files}
    known = given.out.is_file() and not given.again
    result: dict[str, Any] = (
        json.loads(given.out.read_text("utf-8"))
        if known
        else {
            "claim": "subspace_sfda",
            "steps": STEPS,
            "fewer": FEWER,
            "cpu_seconds": 0.0,
            "scores": [],
        }
    )
    result |= {"steps": STEPS, "fewer": FEWER, "sizes": sizes(), "environment": environment()}
    jobs = [("synthetic", seed, None) for seed in SEEDS]
    jobs += [("har", seed, pair) for pair in SCENARIOS for seed in SEEDS]
    done = [tuple(job) for job in result.get("jobs", [])]
    for part, seed, pair in jobs:
        job = (part, seed, None if pair is None else f"{pair[0]}→{pair[1]}")
        if job in done:
            continue
        began = time.process_time()
        rows = list(synthetic(seed) if pair is None else har(seed, data, pair))
        result["scores"] += rows
        result["jobs"] = [*done, job]
        done.append(job)
        result["cpu_seconds"] = round(result["cpu_seconds"] + time.process_time() - began, 1)
        given.out.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
        print(job, f"{result['cpu_seconds']:.0f} s", flush=True)
    print("\n\n".join(write(result) for write in TABLES.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
