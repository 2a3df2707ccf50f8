"""Forecast-PEFT beside other ways to make a pretrained Forecast-MAE forecast, steps or time equal.

    python benchmarks/claims/forecast_peft.py --data FOLDER   # results/forecast_peft.json
    python benchmarks/claims/forecast_peft.py --parts junctions --seeds 0 --out FILE

junctions     made up (`foretune.forecasting.junctions`): which exits are open only the lanes tell,
              which one is taken is chance. Needs no data.
pedestrians   FOLDER/trajnet_sdd (pretraining) and FOLDER/eth_ucy (unseen scenes to adapt to):
              text files of lines `frame id x y`, in metres, 0.4 s a step. 8 history and 12 future
              steps.
places        both ideas together: drone scenes are seen tasks, a forecaster whose decoder is kept
              is retrained on them with an adapter for each place in the bank, and by the controls;
              then LoRA adapts each base to all six ETH/UCY scenes.

Small sizes: width 48, two blocks each, 8 prompts, adapters of rank 16. A seed that is in the
result file already is not run again. Rates were not searched: they are usual ones, set beforehand.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import foretune
from foretune.evaluation.statistics import paired_difference
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.forecasters import add_head, add_prompts
from foretune.forecasting.junctions import junctions
from foretune.forecasting.measures import forecast_rows, measures
from foretune.forecasting.model import ForecastMAE
from foretune.forecasting.readers import load_scenes
from foretune.methods import make
from foretune.tasks.task import Task, TaskCollection
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "forecast_peft.json"
SIZES = {
    "width": 48,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "num_heads": 4,
    "drop_path": 0.0,
    "metres": 10.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "junctions": {
        "steps": {"history_steps": 10, "future_steps": 12},
        "lane_points": 10,
        "radius": None,
        "pretrain_scenes": 6000,
        "pretrain_steps": 600,
        "train_scenes": 1500,
        "test_scenes": 1000,
        "adapt_steps": 600,
        "batch_size": 16,
    },
    "pedestrians": {
        "steps": {"history_steps": 8, "future_steps": 12},
        "lane_points": 10,
        "radius": 4.0,
        "pretrain_scenes": 2000,
        "pretrain_steps": 100,
        "train_scenes": 200,
        "test_scenes": 100,
        "adapt_steps": 40,
        "batch_size": 16,
    },
    "places": {
        "steps": {"history_steps": 8, "future_steps": 12},
        "lane_points": 10,
        "radius": 4.0,
        "pretrain_scenes": 2000,
        "pretrain_steps": 100,
        "train_scenes": 100,
        "test_scenes": 100,
        "retrain_steps": 150,
        "tasks_per_step": 8,
        "rows_a_task": 2,
        "adapt_steps": 40,
        "batch_size": 16,
        "shots": [16, None],
    },
}
PEFT = {"prompts": 8, "adapter_rank": 16}
RATES = {"pretrain": 1e-3, "forecast-peft": 2e-3, "forecast-ft": 1e-3, "full": 1e-3, "lora": 2e-3}
HELD = {"settings": SETTINGS, "sizes": SIZES, "peft": PEFT, "rates": RATES}
ARMS = {
    "Forecast-PEFT": ("forecast-peft", "pretrained", {}),
    "Forecast-FT": ("forecast-ft", "pretrained", {}),
    "Forecast-FT, not pretrained": ("forecast-ft", "scratch", {}),
    "Forecast-MAE, full": ("full", "pretrained", {"spread": False}),
    "Forecast-MAE, full, spread modes": ("full", "pretrained", {"spread": True}),
    "from scratch": ("full", "scratch", {"spread": False}),
    "from scratch, spread modes": ("full", "scratch", {"spread": True}),
    "LoRA and a head": ("lora", "pretrained", {"spread": True}),
    "full, spread modes, as long": ("full", "pretrained", {"spread": True}),
    "from scratch, spread modes, as long": ("full", "scratch", {"spread": True}),
}
# A step of an MLP head costs less: these take as much CPU time as Forecast-PEFT.
LONGER = {"full, spread modes, as long": 1.6, "from scratch, spread modes, as long": 1.6}
SPREAD_ARMS = (
    "Forecast-PEFT",
    "Forecast-FT",
    "Forecast-MAE, full, spread modes",
    "from scratch, spread modes",
    "LoRA and a head",
)
RETRAINERS = {
    "standard retraining": {"name": "standard"},
    "PEFT-ML": {"name": "peft-ml", "lora": {"r": 8, "lora_alpha": 16}},
    "Reptile": {"name": "reptile"},
    "FOMAML": {"name": "fomaml"},
}
WORLDS = {"junctions": tuple(ARMS), "pedestrians": SPREAD_ARMS}


def pretrained(part: str, scenes: TaskCollection, seed: int) -> tuple[ForecastMAE, ForecastMAE]:
    """(before, after) the pretext task on the seen scenes."""
    about = SETTINGS[part]
    torch.manual_seed(seed)
    config = ForecastMAEConfig(**SIZES, **about["steps"], lane_points=about["lane_points"])
    fresh = ForecastMAE(config)
    objective = foretune.SceneReconstruction(**about["steps"], radius=about["radius"])
    outcome = foretune.retrain(
        fresh,
        scenes.with_objective(objective),
        make("standard", learning_rate=RATES["pretrain"]),
        run_of(part, seed, about["pretrain_steps"]),
    )
    assert isinstance(outcome.model, ForecastMAE)
    return fresh, outcome.model


def run_of(part: str, seed: int, steps: int) -> foretune.Run:
    return foretune.Run(
        seed=seed,
        steps=steps,
        batch_size=SETTINGS[part]["batch_size"],
        schedule="cosine",
        weight_decay=1e-4,
        max_grad_norm=5.0,
        eval_every=0,
        device="cpu",
    )


def prepared(kind: str, model: ForecastMAE, options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """(model, method) of an arm."""
    if kind == "forecast-peft":
        return model, make("forecast-peft", **PEFT, learning_rate=RATES[kind])
    if kind == "forecast-ft":
        fields = {**PEFT, "adapter_rank": 0, "train": "all"}
        return model, make("forecast-peft", **fields, learning_rate=RATES[kind])
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    add_head(model, **options)
    if kind == "lora":
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        peft.inject_adapter_in_model(lora, model)
        for parameter in model.forecaster.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(True)
    return model, make("full", learning_rate=RATES[kind])


def adapted_rows(
    part: str, unseen: TaskCollection, models: dict[str, ForecastMAE], seed: int
) -> list[dict[str, Any]]:
    """A row for each arm and unseen task."""
    about = SETTINGS[part]
    objective = foretune.Forecast(**about["steps"], radius=about["radius"])
    tasks = unseen.with_objective(objective)
    rows = [
        {"arm": "constant velocity", "task": task.name, "trained": 0, "total": 0, "seconds": 0.0}
        | measures(forecast_rows(None, task.test, objective))
        for task in tasks
    ]
    for arm in WORLDS[part]:
        kind, start, options = ARMS[arm]
        began = time.process_time()
        model, method = prepared(kind, models[start], options, seed)
        steps = round(about["adapt_steps"] * LONGER.get(arm, 1))
        result = foretune.adapt(model, tasks, method, run_of(part, seed, steps))
        seconds = (time.process_time() - began) / len(tasks)
        for task in tasks:
            made: Any = result.models[task.name, 0]
            row = {
                "arm": arm,
                "task": task.name,
                "trained": result.cost["trainable_parameters"],
                "total": sum(p.numel() for p in made.parameters()),
                "seconds": round(seconds, 1),
            }
            rows.append(row | measures(forecast_rows(made, task.test, objective)))
        print(part, seed, arm, f"{seconds:.0f} s a task", rows[-1], file=sys.stderr, flush=True)
    return rows


def junction_world(about: dict[str, Any], seed: int, data: Path | None) -> tuple[Any, Any]:
    seen = Task("seen", junctions(about["pretrain_scenes"], 100 + seed))
    train, test = junctions(about["train_scenes"], 200 + seed), junctions(about["test_scenes"], 300)
    return TaskCollection((seen,)), TaskCollection((Task("junctions", train, (), test),))


@functools.cache
def tracks(folder: Path) -> TaskCollection:
    return load_scenes(folder, **SETTINGS["pedestrians"]["steps"], stride=8)


def pedestrian_world(about: dict[str, Any], seed: int, data: Path | None) -> tuple[Any, Any]:
    if data is None:
        raise SystemExit("pedestrians need --data FOLDER, which holds trajnet_sdd and eth_ucy")
    seen = pooled(tracks(data / "trajnet_sdd"), about["pretrain_scenes"])
    return TaskCollection((seen,)), unseen_scenes(data, about)


def pooled(places: TaskCollection, most: int) -> Task:
    """One task of all scenes of all places, for the pretext task."""
    task = places.pooled()
    every = [row for split in ("train", "validation", "test") for row in task.split(split)]
    return Task("seen", evenly(every, most))


def unseen_scenes(data: Path, about: dict[str, Any]) -> TaskCollection:
    """The six ETH/UCY scenes, a task each."""
    tasks = [
        Task(
            task.name,
            evenly(task.train, about["train_scenes"]),
            (),
            evenly(task.test, about["test_scenes"]),
        )
        for path in sorted((data / "eth_ucy").iterdir())
        for task in tracks(path)
    ]
    return TaskCollection(tuple(task for task in tasks if task.train and task.test))


def place_rows(part: str, seed: int, data: Path | None) -> tuple[float, list[dict[str, Any]]]:
    """(CPU seconds of pretraining, minFDE6 of each base, unseen scene and number of windows)."""
    about = SETTINGS[part]
    if data is None:
        raise SystemExit("places need --data FOLDER, which holds trajnet_sdd and eth_ucy")
    began = time.process_time()
    drone = tracks(data / "trajnet_sdd")
    _, model = pretrained(part, TaskCollection((pooled(drone, about["pretrain_scenes"]),)), seed)
    spent = round(time.process_time() - began, 1)
    torch.manual_seed(seed)
    add_prompts(model, modes=6, prompts=PEFT["prompts"], adapter_rank=0)
    objective = foretune.Forecast(**about["steps"], radius=about["radius"])
    unseen = unseen_scenes(data, about).with_objective(objective)
    bases = {}
    for arm, fields in RETRAINERS.items():
        began = time.process_time()
        bases[arm] = foretune.retrain(
            model,
            drone.with_objective(objective),
            make(**fields, learning_rate=1e-3),
            run_of(part, seed, about["retrain_steps"]).replace(
                tasks_per_step=about["tasks_per_step"], batch_size=about["rows_a_task"]
            ),
        )
        print(part, seed, arm, f"{time.process_time() - began:.0f} s", file=sys.stderr, flush=True)
    found = foretune.compare(
        bases,
        unseen,
        adapt=foretune.LoRA(learning_rate=RATES["lora"]),
        run=run_of(part, seed, about["adapt_steps"]),
        shots=about["shots"],
    )
    rows = [
        {"arm": s["base"], "task": s["task"], "shots": s["shots"], "minFDE6": -s["score"]}
        for s in found.to_dict()["scores"]
    ]
    return spent, rows


def evenly(rows: Sequence[Any], most: int) -> list[Any]:
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else list(rows)


WORLD: dict[str, Callable[..., tuple[Any, Any]]] = {
    "junctions": junction_world,
    "pedestrians": pedestrian_world,
}


def arm_rows(part: str, seed: int, data: Path | None) -> tuple[float, list[dict[str, Any]]]:
    """(CPU seconds of pretraining, a row for each arm and unseen task)."""
    began = time.process_time()
    seen, unseen = WORLD[part](SETTINGS[part], seed, data)
    fresh, model = pretrained(part, seen, seed)
    spent = round(time.process_time() - began, 1)
    return spent, adapted_rows(part, unseen, {"scratch": fresh, "pretrained": model}, seed)


# --- tables ---------------------------------------------------------------------------------------


def cells(result: dict[str, Any], part: str, arm: str, key: str) -> list[float]:
    """One figure for each seed: the mean over the unseen tasks."""
    found = []
    for run in result["runs"]:
        if run["part"] == part:
            values = [row[key] for row in run["rows"] if row["arm"] == arm and key in row]
            found += [statistics.mean(values)] if values else []
    return found


def part_table(result: dict[str, Any], part: str) -> str:
    """Every arm: its parameters, and minADE, minFDE and miss rate of its modes."""
    arms = [*WORLDS[part], "constant velocity"]
    best = min(statistics.mean(cells(result, part, a, "minFDE6")) for a in WORLDS[part])
    lines = [
        "| arm | trained / all parameters | minADE6 (m) | minFDE6 (m), each seed | MR6 "
        "| minFDE1 | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        single = arm == "constant velocity"
        ade, fde, mr = (
            cells(result, part, arm, f"{name}{1 if single else 6}")
            for name in ("minADE", "minFDE", "MR")
        )
        likeliest, seconds = (
            statistics.mean(cells(result, part, arm, key)) for key in ("minFDE1", "seconds")
        )
        mean = f"{statistics.mean(fde):.2f}"
        mean = f"**{mean}**" if statistics.mean(fde) == best else mean
        each = " ".join(f"{v:.2f}" for v in fde)
        trained, total = (int(cells(result, part, arm, k)[0]) for k in ("trained", "total"))
        parameters = "none, one mode" if single else f"{trained:,} / {total:,}"
        lines.append(
            f"| {arm} | {parameters} | {statistics.mean(ade):.2f} | {mean} ({each}) | "
            f"{statistics.mean(mr):.2f} | {likeliest:.2f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def junction_table(result: dict[str, Any]) -> str:
    return part_table(result, "junctions")


def pedestrian_table(result: dict[str, Any]) -> str:
    return part_table(result, "pedestrians")


def scene_table(result: dict[str, Any]) -> str:
    """minFDE6 of every arm on every pedestrian scene."""
    runs = [run for run in result["runs"] if run["part"] == "pedestrians"]
    scenes = list(dict.fromkeys(row["task"] for run in runs for row in run["rows"]))
    lines = ["| arm | " + " | ".join(scenes) + " |", "|---" * (len(scenes) + 1) + "|"]
    for arm in (*SPREAD_ARMS, "constant velocity"):
        key = "minFDE1" if arm == "constant velocity" else "minFDE6"
        means = [
            statistics.mean(
                row[key]
                for run in runs
                for row in run["rows"]
                if (row["arm"], row["task"]) == (arm, scene)
            )
            for scene in scenes
        ]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return "\n".join(lines)


def place_table(result: dict[str, Any]) -> str:
    """minFDE6 of each base before and after adapting, and against standard retraining."""
    runs = [run for run in result["runs"] if run["part"] == "places"]
    shots = SETTINGS["places"]["shots"]
    scenes = sorted({row["task"] for run in runs for row in run["rows"]})

    def matrix(arm: str, k: int | None) -> list[list[float]]:
        by_scene = {
            (run["seed"], row["task"]): row["minFDE6"]
            for run in runs
            for row in run["rows"]
            if (row["arm"], row["shots"]) == (arm, k)
        }
        return [[by_scene[run["seed"], scene] for run in runs] for scene in scenes]

    head = ["0 windows", *("all windows" if k is None else f"{k} windows" for k in shots)]
    lines = [
        f"| base | {' | '.join(head)} | − standard, {head[-1]} |",
        "|---" * (len(head) + 2) + "|",
    ]
    for arm in RETRAINERS:
        means = [statistics.mean(itertools.chain(*matrix(arm, k))) for k in (0, *shots)]
        found = paired_difference(matrix(arm, None), matrix("standard retraining", None))
        against = f"{found.difference:+.2f} ({found.low:+.2f} to {found.high:+.2f})"
        against = "" if arm == "standard retraining" else against
        lines.append(f"| {arm} | {' | '.join(f'{mean:.2f}' for mean in means)} | {against} |")
    return "\n".join(lines)


def marks_table(result: dict[str, Any]) -> str:
    """The targets set before the run, what was measured, whether they are met."""

    def mean(arm: str, key: str = "minFDE6") -> float:
        return statistics.mean(cells(result, "junctions", arm, key))

    controls = [a for a, (kind, _, _) in ARMS.items() if kind == "full" and a not in LONGER]
    best = min(controls, key=mean)
    ratio = mean("Forecast-PEFT") / mean(best)
    share = mean("Forecast-PEFT", "trained") / mean("Forecast-MAE, full", "trained")
    gain = mean("Forecast-FT") / mean("Forecast-FT, not pretrained")
    marks = [
        (f"minFDE6 of Forecast-PEFT / best of four baselines ({best})", ratio, 0.8),
        ("parameters trained / those of Forecast-MAE, full", share, 0.25),
        ("minFDE6 of Forecast-FT pretrained / not pretrained", gain, 0.6),
    ]
    lines = ["| target | at most | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {most} | {value:.2f} | {'met' if value <= most else '**missed**'} |"
        for name, value, most in marks
    ]
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "junctions": junction_table,
    "marks": marks_table,
    "pedestrians": pedestrian_table,
    "places": place_table,
    "scenes": scene_table,
}


def of_these_settings(result: dict[str, Any]) -> dict[str, Any]:
    """A result without the runs that were made under other settings than these."""
    held = json.loads(json.dumps(HELD))
    same = all(result.get(key) == held[key] for key in held if key != "settings")
    parts = [
        part for part in SETTINGS if result.get("settings", {}).get(part) == held["settings"][part]
    ]
    runs = [run for run in result["runs"] if same and run["part"] in parts]
    for part, seed in [(r["part"], r["seed"]) for r in result["runs"] if r not in runs]:
        print(f"{part}, seed {seed}: made under other settings, is run again")
    return {**result, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="holds trajnet_sdd/ and eth_ucy/")
    parser.add_argument("--parts", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"claim": "forecast_peft", "runs": []}
    if given.out.exists():
        result = of_these_settings(json.loads(given.out.read_text("utf-8")))
    for part in given.parts:
        for seed in given.seeds:
            if any((run["part"], run["seed"]) == (part, seed) for run in result["runs"]):
                continue
            run = place_rows if part == "places" else arm_rows
            spent, rows = run(part, seed, given.data)
            result["runs"].append(
                {"part": part, "seed": seed, "pretrain_seconds": spent, "rows": rows}
            )
            result |= HELD
            result["environment"] = environment() | {"threads": torch.get_num_threads()}
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
