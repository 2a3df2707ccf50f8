"""Peak memory of forward and backward: plain fine-tuning, ours, and ours with a token budget.

python benchmarks/speed/memory.py

Each variant runs in a process of its own. What is reported is how far the process's resident memory
rises during one forward and backward above what it has with all gradients in place; memory that is
freed is given back first, and glibc's default handling of large blocks is left on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import systems
import timing
import torch

from foretune.allocator import give_back_freed_memory
from foretune.training.record import _peak_mb, _reset_peak

KEY = ("model", "tasks", "batch", "length", "variant")
VARIANTS = ("floor", "ours", "ours, a quarter at once", "ours, blocks computed again")


def main() -> None:
    parser = timing.parser(__doc__)
    parser.add_argument("--cells", default="minilm:10x4x64,minilm:50x1x64")
    parser.add_argument("--one", help="of a process of its own: the variant to measure")
    options = parser.parse_args()
    cells = "tiny:8x2x16" if options.quick else options.cells
    if options.one:
        torch.set_num_threads(options.threads)
        print(peak(options.one, cells))
        return
    results = timing.Results("memory", KEY, options)
    for text in cells.split(","):
        size, numbers = text.split(":")
        num_tasks, batch, length = map(int, numbers.split("x"))
        for variant in VARIANTS:
            cell = {"model": size, "tasks": num_tasks, "batch": batch, "length": length,
                    "variant": variant}  # fmt: skip
            if results.has(**cell):
                continue
            found = [in_a_process(options, variant, text) for _ in range(options.repeats)]
            megabytes = sorted(found)[len(found) // 2]
            results.add({**cell, "repeats": options.repeats, "megabytes": megabytes})


def in_a_process(options: argparse.Namespace, variant: str, cell: str) -> float:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--one", variant]
    command += ["--cells", cell, "--threads", str(options.threads)]
    if options.quick:
        command.append("--quick")
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak(variant: str, cell: str) -> float:
    """Megabytes that one forward and backward need beyond weights and gradients."""
    size, numbers = cell.split(":")
    num_tasks, batch, length = map(int, numbers.split("x"))
    tasks = systems.made_up_tasks(num_tasks, batch, [length], systems.SIZES[size]["vocab_size"])
    model = systems.encoder(size)
    if variant == "floor":
        inputs = systems.inputs_of([row for rows in tasks for row in rows])
        return rise(lambda: systems.losses_of(model, inputs).mean().backward(), [model])
    learner = systems.learner(model, num_tasks)
    learner.recompute = variant.endswith("computed again")
    whole = num_tasks * batch * length
    budget = whole // 4 if variant.endswith("at once") else whole
    step = systems.joint_step(tasks, budget=budget)
    assert learner.bank is not None
    with learner.ready():
        return rise(lambda: learner.backward(step), [model, learner.bank])


def rise(work: systems.Callable[[], object], owners: list[torch.nn.Module]) -> float:
    for owner in owners:
        for p in owner.parameters():
            p.grad = torch.zeros_like(p)
    work()  # what is made once (buffers of the libraries) is not the step's
    give_back_freed_memory()
    before = resident_mb()
    _reset_peak()
    work()
    after = _peak_mb()
    assert after is not None
    return round(after - before, 1)


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
