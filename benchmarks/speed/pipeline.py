"""Is the data pipeline the bottleneck? Time and memory of a large collection; tokens a second.

python benchmarks/speed/pipeline.py                              # 10,000 tasks, 5,000,000 rows
python benchmarks/speed/pipeline.py --tasks 100 --rows 20000     # a trial

1. A collection of texts is generated in a temporary folder. Separate processes read and split it,
   plan a recipe on it (`foretune plan`), and draw training batches from it; of each the seconds
   and the peak of resident memory, also beyond what a process has when all is imported.
2. In one process and on one thread, in turns: TaskData, sampler and collate encode rows that are
   read for the first time, and the same rows again; a PEFT-ML step on MiniLM trains on as many
   tokens. CPU seconds, medians.

Writes benchmarks/results/speed-pipeline.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "speed-pipeline.json"
KINDS = ("classification", "choice")
SPLIT_OPTIONS = {"unseen": 10}
BATCH = 8
TASKS_A_STEP = 8
# Of part 2: rows enough that few responses come twice as distractors, and steps large enough that
# the optimiser is not most of them.
MEASURED_TASKS, MEASURED_ROWS = 40, 100_000
MEASURED_BATCH = {"classification": 16, "choice": 2}
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


def write_collection(path: Path, kind: str, num_tasks: int, num_rows: int) -> None:
    """JSONL of short texts, the tasks' rows interleaved: the order that costs a reader most."""
    rng = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("", "n", "rt", "st", "nd")]
    with path.open("w", encoding="utf-8") as stream:
        for i in range(num_rows):
            text = f"{' '.join(rng.choices(words, k=12))} {i}"
            row = {"task": f"task-{i % num_tasks:05d}"}
            if kind == "classification":
                row |= {"text": text, "label": f"class-{i // num_tasks % 2}"}
            else:
                row |= {"context": text, "response": f"{' '.join(rng.choices(words, k=8))} {i}"}
            stream.write(json.dumps(row) + "\n")


def write_recipe(path: Path, source: Path, kind: str) -> None:
    """Both controls, whose memory does not grow with the number of tasks; small timed steps."""
    objective = {"kind": kind, **({"train_candidates": 2} if kind == "choice" else {})}
    path.write_text(
        json.dumps(
            {
                "name": "pipeline",
                "model": {"name": "minilm"},
                "tasks": {"source": str(source), **SPLIT_OPTIONS},
                "objective": objective,
                "retrain": {
                    "methods": ["none", "standard"],
                    "batch_size": BATCH,
                    "tasks_per_step": TASKS_A_STEP,
                },
                "adapt": {"batch_size": 2},
            }
        ),
        encoding="utf-8",
    )


def peak_mb() -> float:
    """Peak resident memory of this process (what getrusage says begins with its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What the work returns; its seconds, and how far the peak of memory is above that before."""
    before, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
    found = work()
    return found, {
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mb": round(peak_mb(), 1),
        "peak_mb_beyond_imports": round(peak_mb() - before, 1),
    }


def load(source: str, kind: str, steps: int) -> Iterator[dict[str, Any]]:
    """Reads, splits and draws batches, in this process.

    Args:
        source: The collection.
        kind: Of its objective.
        steps: Batches to draw.
    """
    # What a training process has in memory before it reads any data.
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from foretune.models.loading import load_model
    from foretune.run import Run
    from foretune.tasks.objectives import make_objective
    from foretune.tasks.sources import Source, load_tasks
    from foretune.training.data import TaskData

    _, tokenizer = load_model("minilm")
    (seen, _), cost = measured(lambda: load_tasks(Source(source=source, **SPLIT_OPTIONS), kind))
    yield {"measured": "read and split", **cost}
    objective, cost = measured(lambda: make_objective(kind, tokenizer).fit(seen))
    yield {"measured": "fit the objective", **cost}
    data = TaskData.of(seen, objective)
    run = Run(batch_size=BATCH, tasks_per_step=TASKS_A_STEP)
    for method in ("standard", "peft-ml"):
        draw = batches(data, method, run)
        _, cost = measured(lambda draw=draw: [next(draw) for _ in range(steps)])
        yield {"measured": f"draw batches ({method})", "batches": steps, **cost}


def batches(data: Any, method: str, run: Any, first: int = 0) -> Iterator[Any]:
    """The training steps of a method, from a step on."""
    from foretune.methods import make
    from foretune.training.data import sampler_for

    sampler = sampler_for(data, run, pooled=make(method).pooled)
    step = first
    while True:
        yield data.step(sampler.picks(step), "train", train=True, seed=[run.seed, step, 1])
        step += 1


def in_a_process(*arguments: str) -> list[dict[str, Any]]:
    """Runs a part of this file in a process of its own, whose memory nothing else has touched."""
    found = subprocess.run(
        [sys.executable, __file__, "--part", *arguments],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in found.stdout.splitlines()]


def plan(recipe: Path) -> dict[str, Any]:
    """`foretune plan` as a user runs it; its children's peak, which is its own."""
    wall = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "foretune.cli", "plan", str(recipe)],
        env={**os.environ, **ONE_THREAD},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "measured": "foretune plan",
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2
        ),
        "peak_mb": round(after.ru_maxrss / 1024, 1),
    }


def large_collection(kind: str, num_tasks: int, num_rows: int, steps: int) -> list[dict[str, Any]]:
    """Part 1."""
    about = {"part": "large collection", "kind": kind, "tasks": num_tasks, "rows": num_rows}
    with tempfile.TemporaryDirectory(prefix="foretune-pipeline-") as folder:
        source, recipe = Path(folder) / "rows.jsonl", Path(folder) / "recipe.yaml"
        write_collection(source, kind, num_tasks, num_rows)
        about["source_mb"] = round(source.stat().st_size / 2**20, 1)
        small, small_recipe = Path(folder) / "small.jsonl", Path(folder) / "small.yaml"
        write_collection(small, kind, 40, 1000)
        write_recipe(recipe, source, kind)
        write_recipe(small_recipe, small, kind)
        rows = in_a_process("load", str(source), kind, str(steps))
        planned = in_a_process("plan", str(recipe))[0]
        # The same plan with next to no data: its peak is that of the two steps that a plan times.
        planned["peak_mb_of_a_small_plan"] = in_a_process("plan", str(small_recipe))[0]["peak_mb"]
        rows.append(planned)
    return [{**about, **row} for row in rows]


def throughput(kind: str, repeats: int, steps: int) -> Iterator[dict[str, Any]]:
    """Part 2: tokens a second that the pipeline gives, and that a training step takes.

    Args:
        kind: Of the objective.
        repeats: Rounds; in each all three are measured, one after the other.
        steps: Batches of a round.
    """
    import torch

    from foretune.methods import make
    from foretune.models.loading import load_model
    from foretune.run import Run
    from foretune.tasks.objectives import make_objective
    from foretune.tasks.sources import Source, load_tasks
    from foretune.training.data import TaskData

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="foretune-pipeline-") as folder:
        source = Path(folder) / "rows.jsonl"
        write_collection(source, kind, MEASURED_TASKS, MEASURED_ROWS)
        seen, _ = load_tasks(Source(source=str(source)), kind)
    unfitted = make_objective(kind, None).fit(seen)
    head = "classification" if kind == "classification" else "none"
    model, tokenizer = load_model("minilm", head=head, num_labels=unfitted.num_outputs())
    objective = make_objective(kind, tokenizer).fit(seen)
    data = TaskData.of(seen, objective)
    run = Run(batch_size=MEASURED_BATCH[kind], tasks_per_step=TASKS_A_STEP)
    learner = make("peft-ml").learner(model, objective, data.keys, run)
    learner.start(run)
    model.train()
    rates: dict[str, list[float]] = {"fresh": [], "warm": [], "training": []}
    with learner.ready():
        for turn in range(-1, repeats):  # the first round, which warms things up, does not count
            first = (turn + 1) * steps
            found = {}
            for name in ("fresh", "warm"):
                draw = batches(data, "peft-ml", run, first)
                start = time.process_time()
                drawn = [next(draw) for _ in range(steps)]
                found[name] = sum(step.num_tokens for step in drawn) / since(start)
            start = time.process_time()
            learner.update([drawn[0]], run, 1.0)
            found["training"] = drawn[0].num_tokens / since(start)
            for name, rate in found.items():
                rates[name] += [rate] if turn >= 0 else []
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name in ("fresh", "warm"):
        yield {
            "part": "tokens a second",
            "kind": kind,
            "measured": f"{name} rows",
            "pipeline_tokens_per_cpu_second": round(medians[name]),
            "training_tokens_per_cpu_second": round(medians["training"]),
            "ratio": round(medians[name] / medians["training"], 1),
            "repeats": repeats,
        }


def since(start: float) -> float:
    return max(time.process_time() - start, 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--steps", type=int, default=200, help="training batches to draw")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of the second part")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        for row in run_part(*given.part):
            print(json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = []
    for kind in given.kinds:
        rows += show(in_a_process("throughput", kind, str(given.repeats), "4"))
        rows += show(large_collection(kind, given.tasks, given.rows, given.steps))
    from foretune.training.record import environment

    options = " ".join(sys.argv[1:])
    result = {
        "benchmark": "pipeline",
        "command": f"python benchmarks/speed/pipeline.py {options}".strip(),
        "machine": environment(),
        "rows": rows,
    }
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_part(name: str, *arguments: str) -> Iterator[dict[str, Any]]:
    """One measurement, in this process."""
    if name == "load":
        source, kind, steps = arguments
        yield from load(source, kind, int(steps))
    elif name == "plan":
        yield plan(Path(arguments[0]))
    else:
        kind, repeats, steps = arguments
        yield from throughput(kind, int(repeats), int(steps))


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
