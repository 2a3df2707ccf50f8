"""Building the adapters of many tasks: foretune's bank against peft's add_adapter.

python benchmarks/speed/bank.py
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import systems
import timing

from foretune.adapters.bank import AdapterBank

KEY = ("model", "system", "tasks")


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--tasks", default="1000")
    parser.add_argument("--peft-tasks", default="10,50,100,200")
    options = parser.parse_args()
    timing.begin(options)
    size = "tiny" if options.quick else "roberta-base"
    results = timing.Results("bank", KEY, options)
    plans = [("ours", bank, options.tasks), ("peft", adapters, options.peft_tasks)]
    for system, build, counts in plans:
        for num_tasks in map(int, ("4" if options.quick else counts).split(",")):
            cell = {"model": size, "system": system, "tasks": num_tasks}
            if not results.has(**cell):
                repeats = options.repeats if system == "ours" else 1
                results.add({**cell, **measure(build, size, num_tasks, repeats)})


def measure(
    build: Callable[[systems.Any, int], object], size: str, num_tasks: int, repeats: int
) -> dict[str, object]:
    """CPU and wall seconds; the first build touches memory that the process has never used."""
    found = []
    for _ in range(repeats):
        model = systems.encoder(size)
        wall, cpu = time.perf_counter(), time.process_time()
        made = build(model, num_tasks)
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
        del made, model
        gc.collect()
    cpus, walls = zip(*found, strict=True)
    middle = len(found) // 2
    return {
        "repeats": repeats,
        "cpu_seconds": round(sorted(cpus)[middle], 2),
        "seconds": round(sorted(walls)[middle], 2),
        "first_cpu_seconds": round(cpus[0], 2),
    }


def bank(model: systems.Any, num_tasks: int) -> object:
    return AdapterBank(model, [str(i) for i in range(num_tasks)], lora=systems.LORA)


def adapters(model: systems.Any, num_tasks: int) -> object:
    return systems.peft_model(model, num_tasks)


if __name__ == "__main__":
    main()
