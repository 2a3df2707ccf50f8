"""What it costs to search how to adapt, compared with adapting the unseen tasks once.

python benchmarks/speed/search.py                       # this version
python benchmarks/speed/search.py --before CHECKOUT     # and an earlier one, in turns

    tower   the packaged quickstart: head and basis of a small network on cached embeddings
    lora    the same votes, head and LoRA on the last layer of MiniLM, the others frozen and cached

A turn is a process of its own: for each number of shots it searches on the held-out tasks, then
adapts all unseen tasks by what was chosen and scores them, in the chosen number of steps and in
all that the recipe allows. CPU seconds, one thread.

Writes benchmarks/results/speed-search.json.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
CASES: dict[str, dict[str, Any]] = {
    "tower": {"shots": (4, None), "changes": []},
    "lora": {
        "shots": (4,),
        "changes": [
            *(
                "model.tower=null",
                "model.trainable_layers=1",
                "tasks.unseen=40",
                "adapt.search_tasks=32",
                "adapt.steps=16",
            ),
            *("adapt.batch_size=4", "adapt.methods=[head, lora]", "adapt.learning_rates=null"),
        ],
    },
}
KEY = ("case", "shots", "version", "threads")


def measure(case: str, quick: bool) -> list[dict[str, Any]]:
    """One turn, in this process."""
    import torch

    from foretune.allocator import keep_freed_memory
    from foretune.evaluation.adapt_search import search
    from foretune.recipes.adapting import candidates_of
    from foretune.recipes.console import SILENT
    from foretune.recipes.schema import load_recipe
    from foretune.recipes.setup import set_up
    from foretune.training.adapt_plan import Setting
    from foretune.training.verbs import adapt

    torch.set_num_threads(1)
    keep_freed_memory()
    changes = [*CASES[case]["changes"], *(["tasks.unseen=4", "adapt.steps=2"] if quick else [])]
    recipe = load_recipe("quickstart", changes)
    setup = set_up(recipe, SILENT)
    assert setup.held_out is not None and setup.unseen is not None
    model = base_of(case, setup)
    methods, run = candidates_of(recipe), recipe.adapt_run(seed=0)
    rows = []
    for shots in CASES[case]["shots"]:
        found, searching = timed(partial(search, model, setup.held_out, methods, run, (shots,)))
        planned = found.plan.settings[0]
        method, seconds = planned.setting.method, {"search": searching}
        for name, steps in (("all steps", run.steps), ("chosen steps", planned.setting.steps)):
            once = Setting(method=method, steps=steps).run(run)
            again = partial(adapt, model, setup.unseen, method, once, shots=shots)
            _, seconds[name] = timed(again)
        rows.append(
            {
                "case": case,
                "shots": shots or "all",
                "candidates": len(methods),
                "held_out": len(setup.held_out),
                "unseen": len(setup.unseen),
                "steps": run.steps,
                "examples": found.cost["examples"],
                "chosen": {"method": method.name, "steps": planned.setting.steps},
                "seconds": seconds,
            }
        )
    return rows


def base_of(case: str, setup: Any) -> Any:
    """A base that was retrained for a short time; with a basis where one is a candidate."""
    import foretune
    from foretune.methods import make

    model, run = setup.model, setup.recipe.adapt_run(seed=0)
    if case == "lora":
        return model
    short = foretune.Run(steps=100, tasks_per_step=48, batch_size=8, patience=None)
    retrained = foretune.retrain(
        model, setup.seen, foretune.Standard(learning_rate=2e-3), short
    ).model
    head = make("head", learning_rate=3e-3)
    basis = foretune.fit_basis(retrained, setup.seen, head, run.replace(steps=5 * run.steps))
    foretune.set_basis(retrained, basis)
    return retrained


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def turn(case: str, source: Path, quick: bool) -> list[dict[str, Any]]:
    """One turn with the version in a folder of sources, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", str(HERE), "--part", case]
    found = subprocess.run(
        [*words, *(["--quick"] if quick else [])],
        env={**environment, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(found.stdout.splitlines()[-1])
    return rows


def main() -> None:
    if "--part" in sys.argv:
        case = sys.argv[sys.argv.index("--part") + 1]
        print(json.dumps(measure(case, "--quick" in sys.argv)))
        return
    import timing

    parser = timing.parser(__doc__)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    timing.begin(options)
    results = timing.Results("search", KEY, options)
    versions = {"after": HERE.parents[2] / "src"}
    if options.before is not None:
        versions["before"] = options.before.resolve() / "src"
    for case in options.cases:
        shots = ["all" if k is None else k for k in CASES[case]["shots"]]
        cells = [
            {"case": case, "shots": k, "version": v, "threads": 1} for k in shots for v in versions
        ]
        if all(results.has(**cell) for cell in cells):
            continue
        turns: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in versions}
        rng = random.Random(0)
        for _ in range(options.repeats):
            for name in rng.sample(list(versions), len(versions)):
                turns[name].append(turn(case, versions[name], options.quick))
        for cell in cells:
            rows = [rows[shots.index(cell["shots"])] for rows in turns[cell["version"]]]
            results.add({**summary(rows), **cell, "repeats": options.repeats})


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the turns, and the ratio of each turn's search to its own adaptations."""
    import timing

    times = {name: [row["seconds"][name] for row in rows] for name in rows[0]["seconds"]}
    return {
        **rows[-1],
        "seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "to_all_steps": timing.ratio(times, "search", "all steps"),
        "to_chosen_steps": timing.ratio(times, "search", "chosen steps"),
    }


if __name__ == "__main__":
    main()
