"""Where a forecaster of pedestrians pays: trained until held-out scenes say so, or not at all.

    python benchmarks/claims/forecast_pays.py --data FOLDER     # results/forecast_pays.json

FOLDER/trajnet_sdd (27 places) and FOLDER/eth_ucy (six scenes): tracks `frame id x y` in metres,
0.4 s a step, 8 history and 12 future steps, windows and splits as `foretune forecast` makes them.
A Forecast-MAE is pretrained on the 27 places for 1,000 steps and adapted to each of the six scenes
with the settings of `foretune forecast adapt`, which ends training by held-out scenes and chooses
between forecaster and constant velocity there. Controls: a full encoder with an
MLP head, adapted to each scene likewise; such a model of the 27 places, not adapted at all; and
constant velocity. A seed that is in the result file is not run again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import foretune
from foretune.forecasting.choosing import choose, with_held_out
from foretune.forecasting.displacement import displacements, likeliest
from foretune.forecasting.folders import adapt_settings, pretrain_settings
from foretune.forecasting.forecasters import add_head
from foretune.forecasting.measures import forecast_rows
from foretune.forecasting.model import ForecastMAE
from foretune.forecasting.readers import load_scenes
from foretune.forecasting.scenes import in_focal_frame
from foretune.methods import make
from foretune.models.seeding import seed_generators
from foretune.tasks.task import Task, TaskCollection
from foretune.training.record import environment

RESULT = Path(__file__).resolve().parents[1] / "results" / "forecast_pays.json"
STEPS = {"history_steps": 8, "future_steps": 12}
RADIUS = 4.0
SIZES = (
    "width=32",
    "encoder_depth=2",
    "decoder_depth=2",
    "num_heads=4",
    "drop_path=0",
    "lane_points=10",
    "metres=10",
    f"radius={RADIUS}",
    *(f"{name}={value}" for name, value in STEPS.items()),
)
# A prompt costs as much as an agent, and these scenes have few: prompts and rank as elsewhere here.
PEFT = ("prompts=8", "adapter_rank=16")
ARMS = {
    "Forecast-PEFT": ("forecast-peft", PEFT),
    "full, MLP head": ("full", ()),
}
ELSEWHERE, STRAIGHT, TAKEN = "27 places, not adapted", "constant velocity", "taken by adapt"
HORIZONS = (4, 8, 12)
TURN_DEGREES, MOVED_M, CROWD = 20.0, 1.0, 5
PRETRAIN_STEPS = 1_000  # not to convergence, for which there was no time
SETTINGS = {"sizes": list(SIZES), "peft": list(PEFT), "pretrain_steps": PRETRAIN_STEPS}


def group_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """(how the focal agent moves, how many are near), of which the first needs the future."""
    scene = in_focal_frame(row, STEPS["history_steps"], RADIUS)
    end = torch.from_numpy(scene["future"][0, -1, :2])
    straight = torch.from_numpy(scene["history"][0, -1, :2]) * STEPS["future_steps"]
    if end.norm() < MOVED_M or straight.norm() < MOVED_M:
        moves = "stands, starts or stops"
    else:
        cosine = torch.nn.functional.cosine_similarity(end, straight, dim=0).clamp(-1, 1)
        turned = torch.rad2deg(torch.arccos(cosine)) > TURN_DEGREES
        moves = "turns" if turned else "goes on"
    return moves, "crowded" if len(scene["kind"]) >= CROWD else "few near"


def measured(forecasts: Sequence[torch.Tensor], rows: Sequence[Any]) -> dict[str, Any]:
    """Mean errors in m: of the best mode and the likeliest, at each horizon, by group."""
    traj, scores, truth, valid = forecasts
    found: dict[str, Any] = {"scenes": len(rows)}
    for name, modes in (("best", traj), ("likeliest", likeliest(traj, scores, 1))):
        average, final = displacements(modes, truth, valid)
        found[f"ADE {name}"] = average.amin(1).mean().item()
        for steps in HORIZONS:
            at = displacements(modes[:, :, :steps], truth[:, :steps], valid[:, :steps])[1].amin(1)
            found[f"FDE {name} at {steps}"] = at.mean().item()
        errors = final.amin(1)
        groups: dict[str, list[float]] = {}
        for row, error in zip(rows, errors.tolist(), strict=True):
            for group in group_of(row):
                groups.setdefault(group, []).append(error)
        found[f"groups {name}"] = {g: [sum(e), len(e)] for g, e in groups.items()}
    return found


def adapted(
    base: ForecastMAE, name: str, changes: Sequence[str], tasks: TaskCollection, seed: int
) -> Any:
    """What `foretune forecast adapt` does with these settings, in memory."""
    method, run = adapt_settings(name, changes, seed)
    model = copy.deepcopy(base)
    if name == "full":
        seed_generators(seed)
        add_head(model, spread=True)
    return foretune.adapt(model, tasks, method, run.replace(device="cpu"))


def of_seed(data: Path, seed: int) -> dict[str, Any]:
    """Pretraining, and a row for each arm and scene."""
    began = time.process_time()
    places = load_scenes(data / "trajnet_sdd", **STEPS)
    pooled = places.pooled()
    drone = TaskCollection((Task("places", pooled.train, pooled.validation, ()),))
    objective = foretune.Forecast(**STEPS, radius=RADIUS)
    scenes = with_held_out(load_scenes(data / "eth_ucy", **STEPS).with_objective(objective))

    settings = pretrain_settings([*SIZES, f"steps={PRETRAIN_STEPS}"], seed)
    seed_generators(seed)
    outcome = foretune.retrain(
        ForecastMAE(settings.sizes),
        drone.with_objective(foretune.SceneReconstruction(**STEPS, radius=RADIUS)),
        make("standard", learning_rate=settings.learning_rate),
        settings.run.replace(device="cpu"),
    )
    base: Any = outcome.model
    spent = {"pretraining": round(time.process_time() - began, 1)}
    taken = {"pretraining": outcome.history[-1]["step"]}
    print(seed, "pretrained", spent, taken, file=sys.stderr, flush=True)

    rows: list[dict[str, Any]] = []

    def add(arm: str, task: Task, model: Any, **more: Any) -> None:
        found = measured(forecast_rows(model, task.test, objective), task.test)
        rows.append({"arm": arm, "task": task.name, **more, **found})

    for task in scenes:
        add(STRAIGHT, task, None)
    began = time.process_time()
    elsewhere = adapted(base, "full", (), drone.with_objective(objective), seed)
    spent[ELSEWHERE] = round(time.process_time() - began, 1)
    taken[ELSEWHERE] = elsewhere.stopped.get(("places", 0), "all")
    print(seed, ELSEWHERE, spent, taken, file=sys.stderr, flush=True)
    for task in scenes:
        model = elsewhere.models["places", 0]
        choice = choose(model, task.validation, objective)
        add(ELSEWHERE, task, model, held_out=dataclasses.asdict(choice))
    for arm, (name, changes) in ARMS.items():
        began = time.process_time()
        result = adapted(base, name, changes, scenes, seed)
        spent[arm] = round(time.process_time() - began, 1)
        for task in scenes:
            model = result.models[task.name, 0]
            choice = choose(model, task.validation, objective)
            add(
                arm,
                task,
                model,
                train=len(task.train),
                steps=result.stopped.get((task.name, 0), "all"),
                held_out=dataclasses.asdict(choice),
            )
            print(seed, arm, task.name, rows[-1], file=sys.stderr, flush=True)
    return {"seed": seed, "seconds": spent, "steps": taken, "rows": rows}


# --- tables ---------------------------------------------------------------------------------------


def by_task(result: Mapping[str, Any], arm: str, key: str) -> dict[str, float]:
    """The mean over seeds of a measure, by scene; of `TAKEN`, of what held-out scenes chose."""
    cells: dict[str, list[float]] = {}
    for run in result["runs"]:
        table = {(row["arm"], row["task"]): row for row in run["rows"]}
        for name in dict.fromkeys(task for _, task in table):
            row = table[arm if arm != TAKEN else "Forecast-PEFT", name]
            if arm == TAKEN and row["held_out"]["chosen"] == STRAIGHT:
                row = table[STRAIGHT, name]
            cells.setdefault(name, []).append(row[key])
    return {name: statistics.fmean(values) for name, values in cells.items()}


EVERY_ARM = ("Forecast-PEFT", "full, MLP head", ELSEWHERE, STRAIGHT, TAKEN)


def scene_table(result: Mapping[str, Any], key: str) -> str:
    """Errors of each arm on each scene, and their mean."""
    scenes = list(by_task(result, STRAIGHT, key))
    lines = [f"| arm | {' | '.join(scenes)} | mean |", "|---" * (len(scenes) + 2) + "|"]
    columns = {arm: by_task(result, arm, key) for arm in EVERY_ARM}
    for arm, cells in columns.items():
        values = [*cells.values(), statistics.fmean(cells.values())]
        lines.append(f"| {arm} | {' | '.join(f'{v:.2f}' for v in values)} |")
    return "\n".join(lines)


def best_table(result: Mapping[str, Any]) -> str:
    return scene_table(result, "FDE best at 12")


def likeliest_table(result: Mapping[str, Any]) -> str:
    return scene_table(result, "FDE likeliest at 12")


def choice_table(result: Mapping[str, Any]) -> str:
    """What held-out scenes said of Forecast-PEFT on each scene, and the steps it took."""
    lines = [
        "| scene | training, held-out scenes | steps | held out: Forecast-PEFT | "
        "constant velocity | taken |",
        "|---|---|---|---|---|---|",
    ]
    rows = [r for run in result["runs"] for r in run["rows"] if r["arm"] == "Forecast-PEFT"]
    for name in dict.fromkeys(row["task"] for row in rows):
        found = [row for row in rows if row["task"] == name]
        held = [row["held_out"] for row in found]
        errors = [h["minFDE"] for h in held if h["minFDE"] is not None]
        straight = [h["constant_velocity"] for h in held if h["minFDE"] is not None]
        ours = statistics.fmean(errors) if errors else float("nan")
        theirs = statistics.fmean(straight) if straight else float("nan")
        count = sum(h["chosen"] == "forecaster" for h in held)
        lines.append(
            f"| {name} | {found[0]['train']}, {held[0]['scenes']} | "
            f"{' '.join(str(row['steps']) for row in found)} | {ours:.2f} | {theirs:.2f} | "
            f"forecaster, {count} of {len(held)} seeds |"
        )
    return "\n".join(lines)


def where_table(result: Mapping[str, Any]) -> str:
    """Final error by horizon and by kind of window, over all scenes."""
    kinds = ["goes on", "turns", "stands, starts or stops", "few near", "crowded"]
    arms = ("Forecast-PEFT", ELSEWHERE, STRAIGHT)
    head = [f"{arm}, {name}" for arm in arms[:2] for name in ("best of 6", "likeliest")]
    lines = [
        f"| windows | number | {' | '.join(head)} | {STRAIGHT} |",
        "|---" * (len(head) + 3) + "|",
    ]
    seeds = len(result["runs"])

    def pooled(arm: str, which: str, kind: str) -> tuple[float, int]:
        pairs = [
            row[f"groups {which}"].get(kind, [0.0, 0])
            for run in result["runs"]
            for row in run["rows"]
            if row["arm"] == arm
        ]
        count = sum(n for _, n in pairs)
        return sum(e for e, _ in pairs) / max(count, 1), count // seeds

    for steps in HORIZONS:
        cells = []
        for arm in arms[:2]:
            for which in ("best", "likeliest"):
                cells.append(
                    statistics.fmean(by_task(result, arm, f"FDE {which} at {steps}").values())
                )
        cells.append(statistics.fmean(by_task(result, STRAIGHT, f"FDE best at {steps}").values()))
        lines.append(
            f"| after {0.4 * steps:.1f} s, mean of scenes | | "
            f"{' | '.join(f'{v:.2f}' for v in cells)} |"
        )
    for kind in kinds:
        cells = [pooled(arm, w, kind)[0] for arm in arms[:2] for w in ("best", "likeliest")]
        straight, count = pooled(STRAIGHT, "best", kind)
        lines.append(
            f"| {kind} | {count:,} | {' | '.join(f'{v:.2f}' for v in [*cells, straight])} |"
        )
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "best": best_table,
    "likeliest": likeliest_table,
    "choice": choice_table,
    "where": where_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="holds trajnet_sdd/ and eth_ucy/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"claim": "forecast_pays", "settings": SETTINGS, "runs": []}
    if options.out.exists():
        held = json.loads(options.out.read_text("utf-8"))
        result = held if held["settings"] == SETTINGS else result
    for seed in options.seeds:
        if any(run["seed"] == seed for run in result["runs"]):
            continue
        result["runs"].append(of_seed(options.data, seed))
        result["environment"] = environment() | {"threads": torch.get_num_threads()}
        options.out.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
