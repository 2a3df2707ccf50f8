"""Pretraining a Forecast-MAE: how long a step takes, and how much of the time validating.

python benchmarks/speed/forecast.py --data FOLDER/trajectories/trajnet_sdd

The Stanford scenes (TrajNet), the sizes of the released model, 32 scenes of each place in a step as
`foretune forecast pretrain` takes them: all of a step's scenes at once, and 2,048 tokens at once.
Every variant is measured in a process of its own, in turns. `--quick` takes made-up junctions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timing

import foretune
from foretune.forecasting import folders
from foretune.forecasting.config import ForecastMAEConfig
from foretune.forecasting.junctions import junctions
from foretune.forecasting.model import ForecastMAE
from foretune.forecasting.readers import load_scenes
from foretune.tasks.task import Task, TaskCollection
from foretune.training.data import TaskData, sampler_for
from foretune.training.learners.joint import Learner
from foretune.training.record import _peak_mb, _reset_peak
from foretune.training.scoring import score_slots, spread

KEY = ("tokens_at_once",)
SIZES = {"history_steps": 8, "future_steps": 12, "lane_points": 10}
TINY = {"width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "history_steps": 10,
        "future_steps": 12, "lane_points": 10}  # fmt: skip


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder of tracks")
    parser.add_argument("--one", help="of a process of its own: tokens at once, or all")
    options = parser.parse_args()
    if options.data is None and not options.quick:
        parser.error("--data is missing")
    timing.begin(options)
    if options.one:
        print(json.dumps(measured(options)))
        return
    results = timing.Results("forecast", KEY, options)
    variants = [name for name in ("all", str(folders.TOKENS_AT_ONCE))
                if not results.has(tokens_at_once=name)]  # fmt: skip
    turns = [
        {name: in_a_process(options, name) for name in variants} for _ in range(options.repeats)
    ]
    for name in variants:
        found = [turn[name] for turn in turns]
        medians = {
            key: value if isinstance(value, int) else median_of(found, key)
            for key, value in found[0].items()
        }
        results.add({"tokens_at_once": name, "repeats": options.repeats, **medians})


def median_of(rows: list[dict[str, Any]], key: str) -> float:
    return round(statistics.median(row[key] for row in rows), 3)


def in_a_process(options: argparse.Namespace, name: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--one", name]
    command += ["--threads", str(options.threads)]
    command += ["--quick"] if options.quick else ["--data", str(options.data)]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of a step and of a validation, and the share of the latter in pretraining."""
    sizes = ForecastMAEConfig(**(TINY if options.quick else SIZES))
    run = folders.pretrain_settings([], 0).run
    steps = {"history_steps": sizes.history_steps, "future_steps": sizes.future_steps}
    objective = foretune.SceneReconstruction(**steps)
    if options.quick:
        one = Task("one", junctions(40, 0), junctions(8, 1))
        tasks = TaskCollection((one,), objective)
    else:
        tasks = load_scenes(options.data, **SIZES).with_objective(objective)
    model = ForecastMAE(sizes).train()
    learner = Learner(model, objective, learning_rate=1e-3, pooled=True)
    learner.start(run)
    data, budget = TaskData.of(tasks, objective), None if options.one == "all" else int(options.one)
    sampler = sampler_for(data, run, pooled=True)
    parts = [data.step(sampler.picks(i), "train", train=True, seed=[0, i], budget=budget)
             for i in range(3)]  # fmt: skip
    _reset_peak()
    seconds = []
    for part in parts:
        start = time.process_time()
        learner.update([part], run, 1.0)
        seconds.append(time.process_time() - start)
    peak = _peak_mb()
    step = statistics.median(seconds[1:])
    rows = run.eval_rows
    score_slots(model, data, "validation", 1)
    start = time.process_time()
    score_slots(model, data, "validation", rows, budget=budget)
    validation = time.process_time() - start
    period = run.steps // 10
    return {
        "scenes": sum(len(task.train) for task in tasks),
        "places": len(tasks),
        "scenes_per_step": len(parts[0].slots),
        "scenes_per_validation": sum(
            len(spread(data.num_rows(slot, "validation"), rows)) for slot in range(len(data))
        ),
        "steps_between_validations": period,
        "step_seconds": step,
        "validation_seconds": validation,
        "share_of_validating": validation / (validation + period * step),
        "peak_mb": peak or 0.0,
    }


if __name__ == "__main__":
    main()
